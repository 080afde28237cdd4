"""What ``FullBatch`` does about losses that are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rprop._ranks import gather
from lightning_rprop.full_batch._evaluation import Evaluation
from lightning_rprop.full_batch._nonfinite import find_nonfinite
from lightning_rprop.optim._loss import is_bad

_MOST = 10  # retreats in a row
_EVERY = 10  # evaluations between two transfers from an accelerator


class BadLosses:
    """Stops a fit that begins with a loss that is not finite; counts the retreats of an Rprop, and warns once.

    Args:
        evaluation: The evaluation whose losses are checked.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._trainer = evaluation.trainer
        self.has_state = False  # the optimizer, before the step
        self._is_first = True
        self._is_warned = False
        self._unread: list[tuple[int, set[bool], Any]] = []  # step, values of maximize, loss
        self._in_a_row = 0

    def check(self, loss: Tensor, step: int, groups: list[dict[str, Any]]) -> None:
        """Check the loss of an evaluation.

        Args:
            loss: The loss, the same on every rank.
            step: The number of optimizer steps before.
            groups: The optimizer's parameter groups.

        Raises:
            RuntimeError: If the loss is not finite at the first evaluation, or it is the last of 10 bad ones in a row.
        """
        if self._is_first:
            self._is_first = False
            if not all(group.get("retreat") is False for group in groups):
                self._check_first(loss)
        # shared_loss is set, so that None means True
        maximize = {group["maximize"] for group in groups if group.get("retreat", False) is not False}
        if not maximize:
            return
        scaler = self._evaluation.scaler
        is_read = loss.is_cpu or scaler is not None  # a GradScaler reads from the device in each step anyway
        value = loss.item() if is_read else loss.clone()  # a graph may reuse the memory
        self._unread.append((step, maximize, value))
        if (is_read or len(self._unread) == _EVERY) and self.read() and scaler is not None:
            self._evaluation.zero_gradients()  # else the scaler would skip the step that retreats

    def read(self) -> bool:
        """Read the losses since the last call, and return whether the last one makes Rprop retreat."""
        unread, self._unread = self._unread, []
        if not unread:
            return False
        values = [loss for _, _, loss in unread]
        if isinstance(values[0], Tensor):
            values = torch.stack(values).tolist()
        for (step, maximize, _), value in zip(unread, values, strict=True):
            retreats = any(is_bad(value, each) for each in maximize)
            self._in_a_row = self._in_a_row + 1 if retreats else 0
            if retreats and not self._is_warned:
                self._is_warned = True
                rank_zero_warn(
                    f"The loss was {value} at step {step}, so Rprop took back the last move of every weight and shrank "
                    "its step size. If this happens often (StepSizeMonitor logs step_size/retreats), use a smaller lr "
                    "or a smaller upper bound of step_sizes=(min, max)."
                )
        if self._in_a_row >= _MOST:
            found = find_nonfinite(self._evaluation) or (
                "no parameter or input is NaN or infinite. Check what else training_step depends on, such as random "
                "numbers or the step"
            )
            raise RuntimeError(
                f"The loss is {value} at step {step} and was NaN or infinite {self._in_a_row} times in a row, although "
                f"Rprop took back its last move; {found}."
            )
        return self._in_a_row > 0

    def _check_first(self, loss: Tensor) -> None:
        value = loss.item()
        if math.isfinite(value) or any(gather(self._trainer, self.has_state)):  # a resumed run has a move to undo
            return
        found = find_nonfinite(self._evaluation) or (
            "no parameter or input is NaN or infinite. Start from other parameters, or scale inputs and targets, so "
            "that the loss is finite there"
        )
        raise RuntimeError(
            f"The loss is {value} at the first evaluation, before any move that could be undone; {found}."
        )
