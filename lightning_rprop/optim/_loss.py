"""What a step reads from its loss: whether it is bad, and whether it is the same on every process."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rprop._torch import is_simulating, is_transformed
from lightning_rprop.optim._members import is_per_member
from lightning_rprop.optim._sharding import PLAIN, whole


def is_loss(loss: Any) -> bool:
    """Return whether this is one loss, or one for each member."""
    return is_number(loss) or is_per_member(loss)


def check_loss(loss: Any) -> None:
    """Check what a step is given as its loss.

    Raises:
        ValueError: If it is neither one real number nor one for each member.
    """
    if not is_loss(loss):
        raise ValueError(
            "loss must be a number, a tensor of one element, or a tensor of shape (n,) for parameters of shape "
            f"(n, ...), got {loss!r}. Reduce it: loss.mean()."
        )


def is_number(loss: Any) -> bool:
    """Return whether a loss is a real number or a real tensor of one element."""
    return loss.numel() == 1 and not loss.is_complex() if isinstance(loss, Tensor) else isinstance(loss, Real)


def is_local(shared_loss: bool) -> bool:
    """Return whether the processes may have different losses."""
    return not shared_loss and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_surely_finite(loss: float | Tensor) -> bool:
    """Return whether the host knows that a loss is finite."""
    if is_per_member(loss):
        return _is_known(loss) and math.isfinite(loss.detach().sum().item())
    if isinstance(loss, Tensor):
        return _is_known(loss) and -math.inf < loss.item() < math.inf
    return not torch.compiler.is_compiling() and -math.inf < loss < math.inf


def is_bad(loss: float | Tensor, maximize: bool) -> bool | Tensor:
    """Return whether a loss is NaN, or infinite in the bad direction: one bool, or ``(n,)`` for losses of members.

    The result is a tensor on the loss's device if the host does not know the value, so that nothing waits for it.
    """
    if is_per_member(loss):
        loss = whole(loss.detach())
    elif isinstance(loss, Tensor):
        loss = loss.item() if _is_known(loss) else whole(loss.detach()).reshape(())
    elif torch.compiler.is_compiling():  # a number would become a constant of the graph
        loss = torch.tensor(loss, dtype=torch.float64)
    # NaN compares as false
    good = loss > -math.inf if maximize else loss < math.inf
    return ~good if isinstance(good, Tensor) else not good


def _is_known(loss: Tensor) -> bool:
    """Return whether reading a loss takes no time: it is on the CPU, and is neither traced nor simulated."""
    if type(loss) not in PLAIN or not loss.is_cpu or torch.compiler.is_compiling():
        return False
    return not (is_transformed() or is_simulating())
