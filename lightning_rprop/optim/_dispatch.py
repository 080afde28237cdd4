"""Which implementation serves which tensors: decided at each call from the tensors alone, never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_rprop._torch import is_simulated, is_simulating, is_watched
from lightning_rprop.optim._compiled import HALVES, update_opaque
from lightning_rprop.optim._foreach import update_foreach
from lightning_rprop.optim._fused import DTYPES, PLAIN, fused_update, fused_update_of_all
from lightning_rprop.optim._rule import update
from lightning_rprop.optim._scratch import Scratch
from lightning_rprop.optim._sharding import aligned, is_sharded, local

# Devices on which a foreach call is one launch for many tensors; elsewhere it is a loop that needs more memory.
_FOREACH_DEVICES = frozenset({"cuda", "xpu", "mtia"})

# The parameters, gradients, previous gradients and step sizes.
Lists = Sequence[list[Tensor]]


class Update(Protocol):
    """The signature that all implementations of the rule share.

    A call prepares the move and may fail; the function that it returns makes the move.
    """

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        prevs: list[Tensor],
        step_sizes: list[Tensor],
        *,
        etaminus: float,
        etaplus: float,
        step_size_min: float,
        step_size_max: float,
        weight_decay: float,
        maximize: bool,
        forget: bool,
        take_back: bool | Tensor,
        differentiable: bool,
        scratch: Scratch,
    ) -> Callable[[], None]: ...


def dispatch(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    *,
    foreach: bool | None,
    fused: bool | None,
    take_back: bool | Tensor,
    differentiable: bool,
) -> list[tuple[Update, Lists]]:
    """Split the tensors among the implementations.

    Args:
        params: Parameters, real or complex.
        grads: Their gradients.
        prevs: Their previous gradients.
        step_sizes: Their step sizes.
        foreach: ``True`` or ``False`` to have the foreach implementation or not; ``None`` to have it for what no fused
            kernel serves, if it is a plain tensor on a device with foreach kernels.
        fused: ``True`` to have nothing but fused kernels, ``False`` to have none; ``None`` to have them wherever one
            serves, unless ``foreach`` says what to have or a ``TorchDispatchMode`` watches. Steps that are traced or
            simulated have none in any case: a kernel would not be seen.
        take_back: As the implementations take it.
        differentiable: Autograd must go through the step, which excludes foreach and fused kernels.

    Returns:
        Implementations, each with the four lists (params, grads, prevs, step_sizes) for it, in which a complex number
        is two real ones and a DTensor is its local shard.

    Raises:
        RuntimeError: If ``fused`` is ``True`` and no kernel serves one of the parameters, or if a parameter cannot be
            updated at all.
    """
    lists: Lists = (params, grads, prevs, step_sizes)
    if torch.compiler.is_compiling():  # the compiler fuses the plain loop itself, across all tensors
        rows = [[as_real(local(tensor)) for tensor in row] for row in zip(*lists, strict=True)]
        opaque = [row[0].dtype in HALVES and not differentiable for row in rows]
        pairs = (
            (update, [row for row, is_opaque in zip(rows, opaque, strict=True) if not is_opaque]),
            (update_opaque, [row for row, is_opaque in zip(rows, opaque, strict=True) if is_opaque]),
        )
        return [(function, [*map(list, zip(*rows, strict=True))]) for function, rows in pairs if rows]
    if fused is None and (foreach is not None or differentiable or is_watched()):
        fused = False
    if fused and is_simulating():
        fused = False
    if fused is not False and (kernel := fused_update_of_all(params, grads, prevs, step_sizes, take_back)):
        return [(kernel, lists)]
    if not differentiable and any(map(is_sharded, params)):
        grads = [*map(aligned, grads, params)]
        lists = [[*map(local, tensors)] for tensors in (params, grads, prevs, step_sizes)]
        return dispatch(*lists, foreach=foreach, fused=fused, take_back=take_back, differentiable=differentiable)
    if any(map(is_simulated, params)):
        fused = False

    batches: dict[tuple[Update, torch.device, torch.dtype], list[list[Tensor]]] = {}
    for i, row in enumerate(zip(*lists, strict=True)):
        check_parameter(f"parameter {i}", row[0])  # its dtype may have changed since its state was made
        param, grad, prev, step_size = map(as_real, row)
        chosen = "" if fused is False else fused_update(param, grad, prev, step_size, take_back)
        if isinstance(chosen, str):
            if fused:
                _refuse(f"parameter {i}", chosen)
            plain = type(param) in PLAIN and not differentiable
            by_list = plain and param.device.type in _FOREACH_DEVICES if foreach is None else foreach
            chosen = update_foreach if by_list else update
        batch = batches.setdefault((chosen, param.device, param.dtype), [[], [], [], []])
        for tensors, tensor in zip(batch, (param, grad, prev, step_size), strict=True):
            tensors.append(tensor)
    return [(chosen, batch) for (chosen, _, _), batch in batches.items()]


def check_fused(names: Sequence[str], rows: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Refuse ``fused=True`` for parameters that no fused kernel serves.

    Args:
        names: What to call the parameters.
        rows: Parameter, gradient, previous gradient and step size of each, or what will be like them. Those that have
            no values yet, as on the meta device, may be served later.

    Raises:
        RuntimeError: If there is such a parameter.
    """
    names = [name for name, row in zip(names, rows, strict=True) if not is_lazy(row[0])]
    rows = [row for row in rows if not is_lazy(row[0])]  # the others get their shapes later
    rows = [(local(param), local(aligned(grad, param)), local(prev), local(size)) for param, grad, prev, size in rows]
    params, grads, prevs, step_sizes = ([row[i] for row in rows] for i in range(4))
    if not rows or fused_update_of_all(params, grads, prevs, step_sizes, take_back=False):
        return
    for name, row in zip(names, rows, strict=True):
        if not is_simulated(row[0]):
            param, grad, prev, step_size = map(as_real, row)
            _refuse(name, fused_update(param, grad, prev, step_size, take_back=False))


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse a parameter that operations cannot update in place.

    Args:
        name: What to call it.
        param: The parameter.

    Raises:
        TypeError: If there is no arithmetic for its dtype, as for integers and float8.
        ValueError: If several of its elements are one number in memory, as in an expanded tensor.
    """
    if param.dtype not in DTYPES and not param.is_complex():
        raise TypeError(
            f"Rprop cannot update {name}: its dtype is {param.dtype}. Make it float64, float32, bfloat16, float16 or "
            "complex, or leave it out"
        )
    is_plain = type(param) in PLAIN and param.layout is torch.strided
    if is_plain and any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(
            f"Rprop cannot update {name}: elements share memory, its shape is {tuple(param.shape)} and its strides are "
            f"{param.stride()}. Make a parameter of a copy, torch.nn.Parameter(param.detach().contiguous())"
        )


def _refuse(name: str, chosen: Update | str) -> None:
    if isinstance(chosen, str):
        raise RuntimeError(
            f"fused=True, but no fused kernel serves {name}: {chosen}. Leave fused=None, which has one wherever it can"
        )


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of the tensor in which a complex number is two real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
