"""Closures that one step evaluates several times, which is correct only if they zero the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_rprop._torch import is_true, version_of
from lightning_rprop.optim._sharding import whole


def evaluate_checked(closure: Callable[[], float | Tensor], groups: list[dict[str, Any]]) -> float | Tensor:
    """Evaluate a closure and check that it zeroes the gradients.

    The gradients are infinite before the call. A closure that accumulates then leaves no finite gradient, and one that
    does nothing leaves all of them in place. If no loss is finite, the gradients show nothing.

    Args:
        closure: Zeroes the gradients, evaluates the model, calls ``backward`` and returns the loss.
        groups: The optimizer's parameter groups.

    Returns:
        The closure's result.

    Raises:
        RuntimeError: If the closure did not zero the gradients, which are then restored.
    """
    params = [p for group in groups for p in group["params"] if p.requires_grad and p.numel() > 0]
    grads = [p.grad for p in params]
    try:
        for p in params:
            p.grad = torch.full_like(p, _marker(p), requires_grad=False)
        markers = [(p.grad, version_of(p.grad)) for p in params]
        loss = closure()
        stayed = [(p.grad is marker, version_of(marker) == v) for p, (marker, v) in zip(params, markers, strict=True)]
        untouched = [same and unchanged for same, unchanged in stayed]
        added_to = [p.grad for p, (same, unchanged) in zip(params, stayed, strict=True) if same and not unchanged]
        if params and (all(untouched) or (_has_finite(loss) and any(map(_was_added_to, added_to)))):
            raise RuntimeError(
                f"max_iter={groups[0]['max_iter']} evaluates the closure several times, but it did not zero the "
                "gradients. Call zero_grad() and backward() in the closure, as for torch.optim.LBFGS; with gradient "
                "accumulation or manual optimization, use max_iter=1."
            )
    except BaseException:
        untouched = [True] * len(params)
        raise
    finally:
        for p, grad, restore in zip(params, grads, untouched, strict=True):
            if restore:  # after a failure all, else those that the closure does not use
                p.grad = grad
    return loss


def _has_finite(loss: Any) -> bool:
    if not isinstance(loss, (float, int, Tensor)):
        return True
    return is_true(whole(torch.as_tensor(loss)).isfinite().any(), unknown=True)


def _marker(param: Tensor) -> float | complex:
    return complex(torch.inf, torch.inf) if param.is_complex() else torch.inf


def _was_added_to(grad: Tensor) -> bool:
    """Return whether a gradient is a sum with infinite ones; a zeroed one may be NaN for other reasons."""
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    return is_true(grad.isposinf().any() & ~grad.isfinite().any(), unknown=False)
