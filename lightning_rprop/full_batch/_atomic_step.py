"""Copies and delayed interrupts, by which a step is complete or undone."""

from __future__ import annotations

import operator
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_rprop._torch import buffer_dicts
from lightning_rprop.optim._sharding import PLAIN, local


class Interrupts:
    """Delays Ctrl-C while the parameters are updated; a second Ctrl-C is delivered immediately."""

    def __init__(self) -> None:
        self._handler: Callable[..., Any] | int | None = None
        self._held: tuple[Any, ...] | None = None

    def hold(self) -> None:
        """Delay interrupts from now on; a no-op outside the main thread, which receives none."""
        if self._handler is None and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # neither ignored nor set outside Python
                self._held = None
                self._handler = handler
                signal.signal(signal.SIGINT, self._delay)

    def release(self, deliver: bool = True) -> None:
        """Stop delaying interrupts, and deliver a delayed one if asked."""
        if self._handler is not None:
            handler, self._handler = self._handler, None
            signal.signal(signal.SIGINT, handler)
            if deliver and self._held is not None and callable(handler):
                handler(*self._held)

    def _delay(self, *args: Any) -> None:
        again = self._held is not None
        self._held = args
        if again:
            self.release()


_signature = operator.attrgetter("shape", "dtype", "device")  # `param.data = ...` can change these


class _Copies:
    """Copies of tensors, in memory that the next step reuses."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._values: list[Tensor] = []
        self._signatures: list[Any] | None = []

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> None:
        """Copy the tensors, except those that a lazy module has not initialized yet."""
        if not PLAIN.issuperset(map(type, tensors)):
            tensors = [local(tensor) for tensor in tensors if not is_lazy(tensor)]
        signatures = [*map(_signature, tensors)]
        if signatures == self._signatures and all(map(operator.is_, tensors, self._tensors)):
            if tensors:
                torch._foreach_copy_(self._values, tensors)
            return
        self._tensors, self._values = [], []  # frees their memory first
        self._values = [tensor.clone() for tensor in tensors]
        self._tensors = tensors
        is_dense = all(tensor.layout is torch.strided for tensor in tensors)  # sparse ones are cloned in each step
        self._signatures = signatures if is_dense else None

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the tensors."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            if tensor.shape == value.shape:  # otherwise FSDP has gathered it for an evaluation, which updates nothing
                with suppress(RuntimeError):  # expanded and inference tensors, which cannot have been written to
                    tensor.copy_(value)


class Snapshot:
    """The parameters, state and options of an optimizer and its wrapper before a step."""

    def __init__(self) -> None:
        self._copies = _Copies()
        self._states: list[tuple[Any, list[tuple[Any, Any]]]] = []
        self._options: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._retreats: int | Tensor | None = None  # of a lightning_rprop.Rprop

    def take(self, optimizer: Any, inner: Optimizer) -> None:
        """Copy them.

        Args:
            optimizer: The Trainer's optimizer.
            inner: The optimizer that it wraps, or itself.
        """
        self._states = []
        self._options = [(group, dict(group)) for group in optimizer.param_groups]
        tensors = [param for group in optimizer.param_groups for param in group["params"]]
        states = []
        for each in (inner,) if optimizer is inner else (inner, optimizer):
            copies: list[tuple[Any, Any]] = []
            for param, state in getattr(each, "state", {}).items():
                if not isinstance(state, dict):
                    copies.append((param, _copied(state)))
                    continue
                kept = dict(state)
                copies.append((param, kept))
                for key, value in state.items():
                    if type(value) in PLAIN or isinstance(value, Tensor):
                        tensors.append(value)
                    else:
                        kept[key] = _copied(value)
            states.append((each, copies))
        self._retreats = getattr(inner, "retreats", None)
        if isinstance(self._retreats, Tensor):
            tensors.append(self._retreats)
        self._copies.take(tensors)
        self._states = states

    def restore(self) -> None:
        """Restore them, if they were copied."""
        if self._states:
            self._copies.restore()
            for each, copies in self._states:
                each.state.clear()
                each.state.update(copies)
            if self._retreats is not None:
                self._states[0][0].retreats = self._retreats
            for group, options in self._options:
                group.clear()
                group.update(options)
            self._states = []


class Buffers:
    """A module's buffers before a step: the tensors and their values.

    Each step copies all buffers, because it is unknown which ones will change: BatchNorm may be frozen at first, and
    its kernel does not update versions. Frozen parameters, such as those of a target network, are treated as buffers.

    Args:
        module: The module.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._homes: list[dict[str, Tensor | None]] = []
        self._found: list[dict[str, Tensor | None]] = []
        self._frozen: list[Tensor] = []
        self._copies = _Copies()

    def find(self) -> None:
        """Find the submodules and the frozen parameters; once per epoch, because it is slow."""
        self._homes = buffer_dicts(self._module)
        self._frozen = [param for param in self._module.parameters() if not param.requires_grad]

    def take(self) -> None:
        """Copy them."""
        if not self._homes:
            self.find()
        self._found = []
        found = [home.copy() for home in self._homes]
        buffers = [buffer for home in found for buffer in home.values() if buffer is not None]
        self._copies.take(buffers + self._frozen)
        self._found = found

    def restore(self) -> None:
        """Restore them, if they were copied."""
        if self._found:
            for home, found in zip(self._homes, self._found, strict=True):
                home.clear()
                home.update(found)
            self._copies.restore()
            self._found = []


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
