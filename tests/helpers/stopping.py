"""The stopping rule of Convergence in plain Python, for recorded losses, gradients and step sizes."""

from __future__ import annotations

import math


def stop_step(losses, grads=(), step_sizes=(), change=None, grad=None, step=None, patience=10):
    """Return the step (from 1) at which the run has converged, or ``None``.

    Args:
        losses: The loss of each step.
        grads: The largest absolute gradient entry of each step; ``None`` for no gradient.
        step_sizes: The largest step size of each step; ``None`` for none.
        change: ``tolerance_change``.
        grad: ``tolerance_grad``.
        step: ``tolerance_step``.
        patience: Number of steps in a row.
    """
    in_a_row = 0
    for i, loss in enumerate(losses):
        before = losses[i - 1] if i else math.nan
        holds = [
            change is not None and math.isfinite(before) and abs(loss - before) <= change * max(abs(loss), abs(before)),
            grad is not None and grads[i] is not None and grads[i] <= grad,
            step is not None and step_sizes[i] is not None and step_sizes[i] <= step,
        ]
        in_a_row = in_a_row + 1 if any(holds) and math.isfinite(loss) else 0
        if in_a_row == patience:
            return i + 1
    return None
