"""The parameters with the lowest loss so far, for any loop and any optimizer."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_rprop._torch import buffer_dicts
from lightning_rprop.optim._loss import check_loss
from lightning_rprop.optim._members import along, check_members, check_same_members, fits, is_frozen, is_per_member
from lightning_rprop.optim._sharding import PLAIN, is_on_host, local, placed, reshard, rows, stored, whole, wide_dtype

# Where a tensor is: a dict, its key there, and the position of its copy. Tied tensors share one copy.
_Slot: TypeAlias = tuple[dict[Any, Any], Any, int]

_layout = operator.attrgetter("shape", "dtype", "device")


class BestWeights:
    """Keep a copy of the parameters with the lowest loss so far.

    Works in any loop and with any optimizer. Call ``update()`` with the loss of the current parameters, before the
    optimizer moves them, and ``restore()`` at the end. The copy is allocated at the first update and reused. If loss
    and parameters are on an accelerator, updates are conditional copies there, and nothing waits for the host. Only a
    tensor that changes its shape costs one comparison on the host.

    With losses of shape ``(n,)`` for the members of ``Stacked``, each member has its own best
    update: row i of the parameters, and of the buffers whose first dimension is n too, is that of member i's lowest
    loss. Other buffers and frozen parameters are those of the lowest loss of all members.

    Every rank keeps its shards of DTensors. The ranks must pass the same loss, or they keep different steps.

    Args:
        params_or_module: A module, whose buffers are kept too, also if they are replaced later. Or what
            ``torch.optim`` takes: an iterable of tensors, of ``(name, tensor)`` pairs or of parameter groups, such as
            ``optimizer.param_groups``. Lazy parameters are kept as soon as they are initialized.

    Raises:
        TypeError: If it is neither.
        ValueError: If it contains no tensor.

    Examples:
        >>> w = torch.zeros(1, requires_grad=True)
        >>> optimizer = torch.optim.Rprop([w], lr=0.25, step_sizes=(0.25, 0.25))
        >>> best = BestWeights([w])
        >>> for _ in range(4):
        ...     loss = (w - 0.5625).square().sum()
        ...     loss.backward()
        ...     best.update(loss)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> best.restore()
        >>> best.loss, best.step, w.tolist()
        (0.00390625, 2, [0.5])
    """

    def __init__(self, params_or_module: nn.Module | Iterable[Any]) -> None:
        self._module = params_or_module if isinstance(params_or_module, nn.Module) else None
        self._homes: list[dict[Any, Tensor | None]] = []
        if self._module is None:
            self._homes = [{f"parameter {i}": tensor for i, tensor in enumerate(_tensors_of(params_or_module))}]
        self._found: list[Tensor | None] = []  # in the homes, when they were listed
        self._listed: tuple[list[Tensor], list[_Slot]] = [], []
        self._find()
        if not any(self._homes):
            raise ValueError(f"BestWeights got no parameters in {params_or_module!r}. Pass a module or its parameters")
        self._slots: list[_Slot] = []  # of the kept tensors
        self._layouts: list[Any] = []
        self._kept: list[Tensor] = []
        self._loss: float | Tensor = math.inf
        self._step: int | Tensor = -1
        self._updates = 0

    @property
    def loss(self) -> float | Tensor:
        """The lowest loss so far; ``inf`` before the first. Reading it waits for the accelerator.

        With members, a float64 tensor of shape ``(n,)`` on the CPU.
        """
        return self._loss.to("cpu", torch.float64, copy=True) if is_per_member(self._loss) else float(self._loss)

    @property
    def step(self) -> int | Tensor | None:
        """The number of updates before that of the lowest loss; ``None`` before the first finite loss.

        With members, an int64 tensor of shape ``(n,)`` on the CPU, in which members without a finite loss have -1.
        """
        if is_per_member(self._step):
            return self._step.to("cpu", copy=True) if bool((self._step >= 0).any()) else None
        step = int(self._step)
        return None if step < 0 else step

    def update(self, loss: float | Tensor) -> None:
        """Copy the parameters if the loss is lower than at every update before.

        Args:
            loss: The loss of the current parameters, a number or a tensor of one element; or the losses of n members,
                a tensor of shape ``(n,)``. NaN and ``inf`` are never the lowest.

        Raises:
            ValueError: If the loss is not one real number, nor one for each member; if the number of members has
                changed; or if a parameter's first dimension is not the number of members. Nothing is changed then.
        """
        self._update(loss, self._updates)
        self._updates += 1

    @torch.inference_mode(False)  # which would not count the changes in place
    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters, in place, to those with the lowest loss. Updates can continue afterwards.

        A member that never had a finite loss stays as it is.

        Raises:
            RuntimeError: If there was no update with a finite loss.
        """
        step = self.step
        if step is None:
            raise RuntimeError(
                "BestWeights has nothing to restore, because no update had a finite loss. Call update(loss) in the "
                "training loop, before the optimizer's step"
            )
        if self._module is not None:
            reshard(self._module)
        missing = torch.as_tensor(step) < 0
        for home, name, i in self._slots:
            tensor, value = stored(home.get(name)), self._kept[i]
            if missing.any() and tensor is not None and tensor.shape == value.shape:
                value = _with_rows(value, tensor, missing)
            if tensor is None or tensor.is_inference():
                home[name] = value.clone()
            elif tensor.shape != value.shape or 0 in tensor.stride():  # an expanded tensor cannot be written to
                tensor.data = value.clone()
            else:
                local(tensor).copy_(local(value))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, which ``torch.load(..., weights_only=True)`` can read.

        The tensors are on the CPU. DTensors are gathered, so every rank must call it. With DeepSpeed ZeRO stage 3, they
        are this rank's slices, because its checkpoints need the same number of ranks.
        """
        kept = [] if self.step is None else self._kept
        return {
            "loss": self.loss,
            "step": self.step,
            "updates": self._updates,
            "tensors": [whole(tensor).to("cpu", copy=True) for tensor in kept],
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a ``BestWeights`` of the same module or parameters, on any number of ranks.

        Args:
            state_dict: The result of ``state_dict()``.

        Raises:
            ValueError: If the number, a shape or a dtype of the tensors differs; then nothing changes.
        """
        values = state_dict["tensors"]
        tensors, slots = self._current()
        kept: list[Tensor] = []
        if values:
            if len(values) != len(tensors):
                raise ValueError(
                    f"the state has {len(values)} tensors, but the model has {len(tensors)}. Load a state of this model"
                )
            is_param = {i for home, _, i in slots if home is self._homes[0]}
            for i, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
                if tensor.dtype != value.dtype or (i in is_param and tensor.shape != value.shape):
                    raise ValueError(
                        f"tensor {i} is {value.dtype} of shape {tuple(value.shape)} in the state, but {tensor.dtype} "
                        f"of shape {tuple(tensor.shape)} in the model. Load a state of this model"
                    )
            for tensor, value in zip(tensors, values, strict=True):
                is_alike = tensor.shape == value.shape  # a buffer may have had another shape
                kept.append(torch.empty_like(tensor) if is_alike else torch.empty_like(value, device=tensor.device))
                local(kept[-1]).copy_(local(placed(value, kept[-1])))
        self._kept, self._slots = kept, slots if kept else []
        self._layouts = [_layout(local(tensor)) for tensor in kept]
        self._loss, self._updates = state_dict["loss"], state_dict["updates"]
        self._step = -1 if state_dict["step"] is None else state_dict["step"]

    def _update(self, loss: float | Tensor, step: int) -> None:
        """Copy the parameters if the loss is lower, and then report this step as the best."""
        now = _comparable(loss)
        if self._kept or is_per_member(self._loss):
            check_same_members(now, self._loss)
        if isinstance(now, float) and not now < self._loss:
            return
        if is_per_member(now):
            params = ((name, stored(p)) for name, p in self._homes[0].items() if p is not None and not is_lazy(p))
            check_members(now, [(name, p) for name, p in params if not is_frozen(p)])
        # in inference mode, the copies would be allocated as read-only
        with torch.inference_mode(False), torch.set_grad_enabled(False):
            if is_per_member(now):
                self._copy_rows(now, step)
            else:
                self._copy(now, step)

    def _copy(self, now: float | Tensor, step: int) -> None:
        """Copy the parameters; if the loss is a tensor, only if it is lower."""
        tensors, slots = self._current()
        shards = _shards(tensors)
        layouts = [*map(_layout, shards)]
        if layouts != self._layouts:
            if isinstance(now, Tensor) and self._kept:  # only one of two layouts can be kept
                if not now < self._loss:
                    return
                now = float(now)
            self._kept = [torch.empty_like(tensor) for tensor in tensors]
            self._layouts = layouts
        self._slots = slots
        copies = _shards(self._kept)
        if isinstance(now, float):
            torch._foreach_copy_(copies, shards)
            self._loss, self._step = now, step
            return
        is_lower = now < self._loss
        on_device = {shard.device: is_lower.to(shard.device) for shard in shards}
        for copy, shard in zip(copies, shards, strict=True):
            torch.where(on_device[shard.device], shard, copy, out=copy)
        self._loss = torch.where(is_lower, now, self._loss)
        self._step = torch.where(is_lower, step, self._step)

    def _copy_rows(self, now: Tensor, step: int) -> None:
        """Copy the rows of the members whose loss is lower, and what belongs to no member if the lowest loss is."""
        if not is_per_member(self._loss):
            self._loss, self._step = torch.full_like(now, math.inf), torch.full_like(now, -1, dtype=torch.int64)
        before = self._loss.to(now)
        is_lower, is_lowest = now < before, now.min() < before.min()
        tensors, slots = self._current()
        is_alike = [*map(_layout, _shards(tensors))] == self._layouts
        if (is_on_host(now) or (self._kept and not is_alike)) and not is_lower.any():
            return
        if not is_alike:
            self._fit_copies(tensors, slots, is_lower, is_lowest)
        self._slots = slots
        for copy, tensor in zip(self._kept, tensors, strict=True):
            part, kept = local(tensor), local(copy)
            if _layout(part) == _layout(kept):  # else it belongs to no member and is that of a lower loss
                which = along(rows(is_lower, tensor), part) if fits(now, tensor) else is_lowest
                torch.where(which.to(part.device), part, kept, out=kept)
        self._loss = torch.where(is_lower, now, before)
        self._step = torch.where(is_lower, step, torch.as_tensor(self._step, device=now.device))

    def _fit_copies(self, tensors: list[Tensor], slots: list[_Slot], is_lower: Tensor, is_lowest: Tensor) -> None:
        """Allocate copies of tensors that are new or have another layout; members have one layout."""
        earlier = {id(home.get(name)): self._kept[i] for home, name, i in self._slots}
        kept: list[Tensor] = []
        for home, name, i in slots:
            if i == len(kept):  # else it is tied
                tensor, copy = tensors[i], earlier.get(id(home[name]))
                if copy is None:
                    copy = tensor.clone()
                elif _layout(local(copy)) != _layout(local(tensor)):
                    has_rows = fits(is_lower, copy) and fits(is_lower, tensor)
                    copy = tensor.clone() if has_rows or bool(is_lowest) else copy
                kept.append(copy)
        self._kept = kept
        self._layouts = [*map(_layout, _shards(kept))]

    def _find(self) -> None:
        """Find the parameters and the dicts of the buffers of a module."""
        if self._module is not None:
            reshard(self._module)
            params: dict[Any, Tensor | None] = dict(self._module.named_parameters())
            self._homes = [params, *buffer_dicts(self._module)]
            self._found = []

    def _current(self) -> tuple[list[Tensor], list[_Slot]]:
        """Return the tensors as they are now, tied ones once, and where they are."""
        found = [tensor for home in self._homes for tensor in home.values()]
        if len(found) == len(self._found) and all(map(operator.is_, found, self._found)):
            return self._listed
        tensors: list[Tensor] = []
        slots: list[_Slot] = []
        positions: dict[int, int] = {}
        for home in self._homes:
            for name, tensor in home.items():
                if tensor is None or is_lazy(tensor):
                    continue
                tensor = stored(tensor)
                if id(tensor) not in positions:
                    positions[id(tensor)] = len(tensors)
                    tensors.append(tensor)
                slots.append((home, name, positions[id(tensor)]))
        # a lazy parameter keeps its identity when it is initialized, and DeepSpeed replaces slices
        is_final = all(tensor is None or (type(tensor) in PLAIN and stored(tensor) is tensor) for tensor in found)
        self._found, self._listed = found if is_final else [], (tensors, slots)
        return self._listed


def _tensors_of(params: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in what ``torch.optim`` takes."""
    if isinstance(params, Tensor | set | Mapping) or not isinstance(params, Iterable):
        raise TypeError(
            f"BestWeights takes a module, or an iterable of tensors or parameter groups, got {type(params).__name__}. "
            "Pass the model, or list(model.parameters())"
        )
    for item in params:
        if isinstance(item, Mapping) and "params" in item:
            group = item["params"]
            yield from [group] if isinstance(group, Tensor) else _tensors_of(group)
            continue
        tensor = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"BestWeights takes tensors, (name, tensor) pairs or parameter groups, got {tensor!r} "
                f"({type(tensor).__name__}). Pass list(model.parameters())"
            )
        yield tensor


def _shards(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if PLAIN.issuperset(map(type, tensors)) else [local(tensor) for tensor in tensors]


def _with_rows(value: Tensor, tensor: Tensor, which: Tensor) -> Tensor:
    """Return a copy of the value that has the tensor's rows of these members; unchanged if it belongs to no member."""
    if fits(which, value):
        value = value.clone()
        part = local(value)
        mask = rows(which, value).to(part.device)
        part[mask] = local(tensor).to(part)[mask]
    return value


def _comparable(loss: float | Tensor) -> float | Tensor:
    """Return the loss as a number if the host has it, else as a tensor that holds it exactly.

    Losses of members are always a tensor, in which NaN is replaced by inf.
    """
    check_loss(loss)
    if not isinstance(loss, Tensor):
        return float(loss)
    value: Tensor = whole(loss)
    if is_per_member(value):
        return value.detach().to(wide_dtype(value.device)).nan_to_num(math.inf, math.inf, -math.inf)
    return float(value.item()) if is_on_host(value) else value.reshape(()).to(wide_dtype(value.device))
