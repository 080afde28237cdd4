"""Which implementation serves which tensors: decided at each call from the tensors alone, never stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lightning_rprop.optim.foreach import update_foreach
from lightning_rprop.optim.update import update

# Devices on which a foreach call is one launch for many tensors; elsewhere it is a loop that needs more memory.
_FOREACH_DEVICES = frozenset({"cuda", "xpu", "mtia"})


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
    differentiable: bool,
) -> Iterator[tuple[Update, list[list[Tensor]]]]:
    """Split the tensors among the implementations.

    Args:
        params: real parameters.
        grads: their gradients.
        prevs: their previous gradients.
        step_sizes: their step sizes.
        foreach: ``True`` or ``False`` to have the foreach implementation or not, ``None`` to have it where every
            parameter is a plain tensor on a device with foreach kernels, as ``torch.optim`` chooses.
        differentiable: autograd must go through the step, which excludes foreach.

    Yields:
        An implementation and the four lists (params, grads, prevs, step_sizes) for it.
    """
    if not params:
        return
    if foreach is None:
        foreach = not differentiable and all(
            type(p) in (Tensor, torch.nn.Parameter) and p.device.type in _FOREACH_DEVICES for p in params
        )
    if not foreach or torch.compiler.is_compiling():  # the compiler fuses the plain loop itself, across all tensors
        yield update, [params, grads, prevs, step_sizes]
        return
    # foreach kernels take tensors of one device and dtype
    batches: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for row in zip(params, grads, prevs, step_sizes, strict=True):
        batches.setdefault((row[0].device, row[0].dtype), []).append(row)
    for batch in batches.values():
        yield update_foreach, [list(column) for column in zip(*batch, strict=True)]
