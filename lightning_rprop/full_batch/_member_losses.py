"""The losses of the members of a ``Stacked`` that training_step returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The key in the outputs of training_step.
NAME = "member_losses"
# What is logged of them.
SUMMARY = ("min", "median", "max")


def length_of(losses: Any) -> int:
    """Return the number of members.

    Raises:
        TypeError: If the losses are not a tensor of real numbers.
        ValueError: If they are not one for each member.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"{NAME} must be a tensor of real numbers, got {kind}. Return one loss for each member")
    if losses.dim() != 1 or not len(losses):
        raise ValueError(
            f"{NAME} must have the shape (n,) for n members, got {tuple(losses.shape)}. Reduce the losses over all "
            "dimensions but the first, as in losses.flatten(1).mean(1)"
        )
    return len(losses)


def summarize(losses: Tensor, maximize: bool) -> list[Tensor]:
    """Return the ``SUMMARY`` of the losses; NaN counts as the worst loss."""
    ordered = torch.where(losses.isnan(), -torch.inf if maximize else torch.inf, losses).sort().values
    n = len(ordered)
    median = ordered[(n - 1) // 2] / 2 + ordered[n // 2] / 2  # a sum could overflow
    return [ordered[0], median, ordered[-1]]
