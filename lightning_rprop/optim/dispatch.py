"""Which implementation serves which tensors: decided at each call from the tensors alone, never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_rprop.optim.foreach import update_foreach
from lightning_rprop.optim.fused import PLAIN, fused_update, fused_update_of_all
from lightning_rprop.optim.sharding import aligned, is_sharded, local
from lightning_rprop.optim.update import update

# Devices on which a foreach call is one launch for many tensors; elsewhere it is a loop that needs more memory.
_FOREACH_DEVICES = frozenset({"cuda", "xpu", "mtia"})

# The parameters, gradients, previous gradients and step sizes.
Lists = Sequence[list[Tensor]]


class Update(Protocol):
    """The signature that all implementations of the rule share."""

    def __call__(  # noqa: D102 (update.py says it)
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
    ) -> None: ...


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
        params: parameters, real or complex.
        grads: their gradients.
        prevs: their previous gradients.
        step_sizes: their step sizes.
        foreach: ``True`` or ``False`` to have the foreach implementation or not; ``None`` to have it for what no fused
            kernel serves, if it is a plain tensor on a device with foreach kernels.
        fused: ``True`` to have nothing but fused kernels, ``False`` to have none; ``None`` to have them wherever one
            serves, unless ``foreach`` says what to have.
        take_back: as the implementations take it.
        differentiable: autograd must go through the step, which excludes foreach and fused kernels.

    Returns:
        Implementations, each with the four lists (params, grads, prevs, step_sizes) for it, in which a complex number
        is two real ones and a DTensor is the part of it that is here.

    Raises:
        RuntimeError: If ``fused`` is ``True`` and no kernel serves one of the parameters.
    """
    lists: Lists = (params, grads, prevs, step_sizes)
    if torch.compiler.is_compiling():  # the compiler fuses the plain loop itself, across all tensors
        return [(update, [[as_real(local(t)) for t in tensors] for tensors in lists])]
    if fused is None and (foreach is not None or differentiable):
        fused = False
    if fused is not False and (kernel := fused_update_of_all(params, grads, prevs, step_sizes, take_back)):
        return [(kernel, lists)]
    if not differentiable and any(map(is_sharded, params)):
        grads = [*map(aligned, grads, params)]
        lists = [[*map(local, tensors)] for tensors in (params, grads, prevs, step_sizes)]
        return dispatch(*lists, foreach=foreach, fused=fused, take_back=take_back, differentiable=differentiable)

    batches: dict[tuple[Update, torch.device, torch.dtype], list[list[Tensor]]] = {}
    for i, row in enumerate(zip(*lists, strict=True)):
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
        names: what to call the parameters.
        rows: parameter, gradient, previous gradient and step size of each, or what will be like them.

    Raises:
        RuntimeError: If there is such a parameter.
    """
    rows = [(local(param), local(aligned(grad, param)), local(prev), local(size)) for param, grad, prev, size in rows]
    params, grads, prevs, step_sizes = ([row[i] for row in rows] for i in range(4))
    if not rows or fused_update_of_all(params, grads, prevs, step_sizes, take_back=False):
        return
    for name, row in zip(names, rows, strict=True):
        param, grad, prev, step_size = map(as_real, row)
        _refuse(name, fused_update(param, grad, prev, step_size, take_back=False))


def _refuse(name: str, chosen: Update | str) -> None:
    if isinstance(chosen, str):
        raise RuntimeError(
            f"fused=True, but no fused kernel serves {name}: {chosen}. Leave fused=None, which has one wherever it can"
        )


def as_real(tensor: Tensor) -> Tensor:
    """Give a view of the tensor in which a complex number is two real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
