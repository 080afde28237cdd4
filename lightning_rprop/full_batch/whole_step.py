"""A step that was made wholly or not at all, whatever breaks into it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Interrupts:
    """Holds Ctrl-C back while weights move, and lets it through afterwards; a second one goes through at once."""

    def __init__(self) -> None:
        self._handler: Callable[..., Any] | int | None = None
        self._held: tuple[Any, ...] | None = None

    def hold(self) -> None:
        """Keep an interrupt back from now on; does nothing outside the main thread, where none comes."""
        if self._handler is None and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # not ignored, and not set by something else than Python
                self._held = None
                self._handler = handler
                signal.signal(signal.SIGINT, self._keep)

    def release(self, deliver: bool = True) -> None:
        """Let interrupts through again, and the one that came meanwhile, unless all is ending anyway."""
        if self._handler is not None:
            handler, self._handler = self._handler, None
            signal.signal(signal.SIGINT, handler)
            if deliver and self._held is not None and callable(handler):
                handler(*self._held)

    def _keep(self, *args: Any) -> None:
        again = self._held is not None
        self._held = args
        if again:
            self.release()


class Snapshot:
    """Parameters and state of an optimizer before a step that moves more than once."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.values = [p.detach().clone() for p in self.params]
        self.state = {p: _copy(state) for p, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for param, value in zip(self.params, self.values, strict=True):
            param.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


class Buffers:
    """The buffers that forward passes change, such as BatchNorm's statistics: those that the first step changed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._watched = list(module.buffers())
        self._saved: list[Tensor] = []
        self._all = True

    def begin(self) -> None:
        """Save them before a step."""
        self._saved = [buffer.detach().clone() for buffer in self._watched]

    def end(self) -> None:
        """Keep what the step made of them."""
        if self._all:  # by value: BatchNorm's kernel does not count versions
            pairs = zip(self._watched, self._saved, strict=True)
            self._watched = [buffer for buffer, value in pairs if not torch.equal(buffer, value)]
            self._all = False
        self._saved = []

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, if a step has begun."""
        for buffer, value in zip(self._watched, self._saved, strict=False):
            buffer.copy_(value)
        self._saved = []


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(v) for v in value)
    return value
