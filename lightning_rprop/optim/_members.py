"""Losses of the members of stacked parameters: one for each index of the parameters' first dimension."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_rprop.optim._sharding import replicated


def is_per_member(loss: Any) -> TypeGuard[Tensor]:
    """Return whether this is more than one loss, in a real tensor of shape ``(n,)``."""
    return isinstance(loss, Tensor) and loss.dim() == 1 and loss.numel() > 1 and not loss.is_complex()


def check_members(losses: Tensor, params: Iterable[tuple[str, Tensor]]) -> None:
    """Check that parameters have a first dimension of the number of losses.

    Args:
        losses: Losses of shape ``(n,)``.
        params: Names for the error message, and parameters.

    Raises:
        ValueError: If a parameter does not have it.
    """
    n = len(losses)
    for name, param in params:
        if not fits(losses, param):
            raise ValueError(
                f"loss has {n} elements, one for each member, but {name} has the shape {tuple(param.shape)}: its first "
                f"dimension must be {n}. Train members of a lightning_rprop.Stacked, or reduce the loss: loss.sum()."
            )


def check_same_members(loss: Any, before: Any) -> None:
    """Check that there are as many losses as before.

    Raises:
        ValueError: If there are not.
    """
    now = loss.numel() if isinstance(loss, Tensor) else 1
    n = before.numel() if isinstance(before, Tensor) else 1
    if now != n:
        raise ValueError(
            f"loss has {now} elements, but earlier ones had {n}. Pass one loss for each of the same members every time."
        )


def fits(losses: Tensor, param: Tensor) -> bool:
    """Return whether a parameter has a first dimension of the number of losses."""
    return param.shape[:1] == losses.shape


def is_frozen(param: Tensor) -> bool:
    """Return whether a parameter never moves, so that it may be shared by the members."""
    return isinstance(param, nn.Parameter) and not param.requires_grad and param.grad is None


def along(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values of the members, ``(n,)``, so that they broadcast along a tensor's first dimension; or one value."""
    if values.numel() == 1:
        return values.reshape(())
    return replicated(values.view(-1, *[1] * (tensor.dim() - 1)), tensor)
