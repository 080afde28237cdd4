"""Optimizers inside others: Lightning, DeepSpeed and torch's ZeroRedundancyOptimizer wrap the one that moves."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

_LINKS = ("_optimizer", "optimizer", "optim")  # of these three, in their order


def innermost(optimizer: Any) -> Any:
    """Give the optimizer that makes the moves of this one, itself if it wraps none."""
    while inside := [vars(optimizer)[link] for link in _LINKS if isinstance(vars(optimizer).get(link), Optimizer)]:
        optimizer = inside[0]
    return optimizer
