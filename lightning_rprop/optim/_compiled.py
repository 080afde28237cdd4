"""Steps under ``torch.compile``, with the same bits as in eager mode.

Inductor keeps intermediate bfloat16 and float16 results in float32 and removes the conversions that would round them.
Parameters of these dtypes are therefore updated by a custom operator that the compiler does not look into.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rprop.optim._dispatch import Lists, local_parts, prepare
from lightning_rprop.optim._rule import Rule, update
from lightning_rprop.optim._sharding import as_real

_HALVES = frozenset({torch.bfloat16, torch.float16})


def prepare_compiled(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    rule: Rule,
    *,
    differentiable: bool,
) -> list[Callable[[], None]]:
    """Prepare one move while the compiler traces it; arguments as in ``lightning_rprop.optim._dispatch.prepare()``.

    The compiler itself fuses the plain loop across all tensors.
    """
    moves = []
    for part, rule_here in local_parts((params, grads, prevs, step_sizes), rule):
        halves: Lists = ([], [], [], [])
        others: Lists = ([], [], [], [])
        for row in zip(*part, strict=True):
            real = list(map(as_real, row))
            lists = halves if real[0].dtype in _HALVES and not differentiable else others
            for tensors, tensor in zip(lists, real, strict=True):
                tensors.append(tensor)
        if others[0]:
            moves.append(update(*others, rule_here, scratch={}, differentiable=differentiable))
        if halves[0]:
            moves.append(update_opaque(*halves, rule_here))
    return moves


def update_opaque(
    params: list[Tensor], grads: list[Tensor], prevs: list[Tensor], step_sizes: list[Tensor], rule: Rule
) -> Callable[[], None]:
    """Prepare one move by the operator; arguments as in ``lightning_rprop.optim._rule.update()``."""
    *_, maximize, forget, take_back, retreat = rule
    flags = [maximize, forget, take_back is True, retreat is True]
    take_back_if, retreat_if = (flag if isinstance(flag, Tensor) else None for flag in (take_back, retreat))

    def move() -> None:
        _move(params, grads, prevs, step_sizes, list(rule[:5]), flags, take_back_if, retreat_if)

    return move


@torch.library.custom_op("lightning_rprop::move", mutates_args=("params", "prevs", "step_sizes"))
def _move(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    numbers: list[float],
    flags: list[bool],
    take_back_if: Tensor | None,
    retreat_if: Tensor | None,
) -> None:
    maximize, forget, take_back, retreat = flags
    rule = Rule._make(
        [
            *numbers,
            maximize,
            forget,
            take_back if take_back_if is None else take_back_if,
            retreat if retreat_if is None else retreat_if,
        ]
    )
    for move in prepare(params, grads, prevs, step_sizes, rule, foreach=None, fused=None, scratch={}):
        move()
