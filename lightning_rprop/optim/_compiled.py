"""Steps with bfloat16 and float16 under ``torch.compile``, where each result must be rounded as in eager mode.

Inductor keeps intermediate results of these dtypes in float32, and removes conversions that would round them. So that
the bits stay the same, such parameters are updated by an operator that the compiler does not look into.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rprop.optim._scratch import Scratch

HALVES = frozenset({torch.bfloat16, torch.float16})


def update_opaque(
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
) -> Callable[[], None]:
    """Prepare one move of all tensors; arguments as in :func:`lightning_rprop.optim._rule.update`."""
    del differentiable, scratch
    numbers = [etaminus, etaplus, step_size_min, step_size_max, weight_decay]
    when = take_back if isinstance(take_back, Tensor) else None

    def move() -> None:
        _move(params, grads, prevs, step_sizes, numbers, maximize, forget, take_back is True, when)

    return move


@torch.library.custom_op("lightning_rprop::move", mutates_args=("params", "prevs", "step_sizes"))
def _move(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    numbers: list[float],
    maximize: bool,
    forget: bool,
    always: bool,
    when: Tensor | None,
) -> None:
    from lightning_rprop.optim._dispatch import dispatch  # which imports this module

    etaminus, etaplus, step_size_min, step_size_max, weight_decay = numbers
    take_back = always if when is None else when
    lists = (params, grads, prevs, step_sizes)
    for update, tensors in dispatch(*lists, foreach=None, fused=None, take_back=take_back, differentiable=False):
        update(
            *tensors,
            etaminus=etaminus,
            etaplus=etaplus,
            step_size_min=step_size_min,
            step_size_max=step_size_max,
            weight_decay=weight_decay,
            maximize=maximize,
            forget=forget,
            take_back=take_back,
            differentiable=False,
            scratch={},
        )()
