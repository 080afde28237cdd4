"""Closures that are evaluated more than once in a step, which is right only if they zero the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_rprop._torch import is_true


def evaluate_anew(closure: Callable[[], float | Tensor], groups: list[dict[str, Any]]) -> float | Tensor:
    """Evaluate a closure that must zero the gradients, and refuse one that does not.

    Infinite gradients are put in its way: a closure that accumulates adds to them, which leaves no finite number, and
    one that does nothing leaves all. Where the loss is NaN or infinite, gradients do not show whether they were zeroed.

    Args:
        closure: Zeroes the gradients, evaluates the model, calls ``backward`` and returns the loss.
        groups: The optimizer's parameter groups.

    Returns:
        What the closure returned.

    Raises:
        RuntimeError: If the closure did not zero the gradients; they are then as they were before.
    """
    params = [p for group in groups for p in group["params"] if p.requires_grad and p.numel() > 0]
    grads = [p.grad for p in params]
    try:
        for p in params:
            p.grad = torch.full_like(p, _marker(p), requires_grad=False)
        markers = [(p.grad, p.grad._version) for p in params]
        loss = closure()
        stayed = [(p.grad is marker, marker._version == v) for p, (marker, v) in zip(params, markers, strict=True)]
        untouched = [same and unchanged for same, unchanged in stayed]
        added_to = [p.grad for p, (same, unchanged) in zip(params, stayed, strict=True) if same and not unchanged]
        if params and (all(untouched) or (_is_finite(loss) and any(map(_was_added_to, added_to)))):
            raise RuntimeError(
                f"max_iter={groups[0]['max_iter']} evaluates the closure again, but it did not zero the "
                "gradients: let it call zero_grad() and backward(), as for torch.optim.LBFGS. With gradient "
                "accumulation, and in manual optimization, use max_iter=1"
            )
    except BaseException:
        untouched = [True] * len(params)
        raise
    finally:
        for p, grad, restore in zip(params, grads, untouched, strict=True):
            if restore:  # all if it failed, else those that the closure has nothing to do with
                p.grad = grad
    return loss


def _is_finite(loss: Any) -> bool:
    return not isinstance(loss, (float, int, Tensor)) or is_true(torch.as_tensor(loss).isfinite().all(), unknown=True)


def _marker(param: Tensor) -> float | complex:
    return complex(torch.inf, torch.inf) if param.is_complex() else torch.inf


def _was_added_to(grad: Tensor) -> bool:
    """Return whether a gradient was added to infinite ones; one that was zeroed may be NaN by itself."""
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    return is_true(grad.isposinf().any() & ~grad.isfinite().any(), unknown=False)
