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

    A fit of several members is stopped only if all of them have such a loss.

    Args:
        evaluation: The evaluation whose losses are checked.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._trainer = evaluation.trainer
        self.has_state = False  # the optimizer, before the step
        self._is_first = True
        self._is_warned = False
        self._bad_at_start = 0  # members that do not train
        self._unread: list[tuple[int, set[bool], Any]] = []  # step, values of maximize, loss
        self._in_a_row = 0

    def check(self, losses: Tensor, step: int, groups: list[dict[str, Any]]) -> None:
        """Check the loss of an evaluation, or the losses of its members.

        Args:
            losses: One loss, or several in a vector, the same on every rank.
            step: The number of optimizer steps before.
            groups: The optimizer's parameter groups.

        Raises:
            RuntimeError: If no loss is finite at the first evaluation, or in the last of 10 evaluations in a row.
        """
        scaler = self._evaluation.scaler
        if scaler is not None and losses.dim() and not (finite := losses.isfinite()).all():
            self._evaluation.zero_gradients(~finite)  # else the scaler would skip the step of all members
        if self._is_first:
            self._is_first = False
            if not all(group.get("retreat") is False for group in groups):
                self._check_first(losses)
        # shared_loss is set, so that None means True
        maximize = {group["maximize"] for group in groups if group.get("retreat", False) is not False}
        if not maximize:
            return
        is_read = losses.is_cpu or scaler is not None  # a GradScaler reads from the device in each step anyway
        values = losses.tolist() if is_read else losses.clone()  # a graph may reuse the memory
        self._unread.append((step, maximize, values))
        if (is_read or len(self._unread) == _EVERY) and self.read() and scaler is not None:
            self._evaluation.zero_gradients()  # else the scaler would skip the step that retreats

    def read(self) -> bool:
        """Read the losses since the last call, and return whether the last ones are all bad, so that Rprop retreats."""
        unread, self._unread = self._unread, []
        if not unread:
            return False
        read = [losses for _, _, losses in unread]
        if isinstance(read[0], Tensor):
            read = torch.stack(read).tolist()
        for (step, maximize, _), values in zip(unread, read, strict=True):
            losses = values if isinstance(values, list) else [values]
            if math.isfinite(sum(losses)):  # much faster, with many members
                bad = []
            else:
                bad = [loss for loss in losses if any(is_bad(loss, each) for each in maximize)]
            self._in_a_row = self._in_a_row + 1 if len(bad) == len(losses) else 0
            if len(bad) > self._bad_at_start and not self._is_warned:
                self._is_warned = True
                is_one = len(losses) == 1
                what = f"was {bad[0]}" if is_one else f"of {len(bad)} of {len(losses)} members was NaN or infinite"
                whose = "every weight" if is_one else "each of their weights"
                rank_zero_warn(
                    f"The loss {what} at step {step}, so Rprop took back the last move of {whose} and shrank its step "
                    "size. If this happens often (StepSizeMonitor logs step_size/retreats), use a smaller lr or a "
                    "smaller upper bound of step_sizes=(min, max)."
                )
        if self._in_a_row >= _MOST:
            found = find_nonfinite(self._evaluation) or (
                "no parameter or input is NaN or infinite. Check what else training_step depends on, such as random "
                "numbers or the step"
            )
            raise RuntimeError(
                f"{_none_is_finite(losses)} at step {step} and was NaN or infinite {self._in_a_row} times in a row, "
                f"although Rprop took back its last move; {found}."
            )
        return self._in_a_row > 0

    def _check_first(self, losses: Tensor) -> None:
        values = losses.flatten().tolist()
        bad = [value for value in values if not math.isfinite(value)]
        if not bad or any(gather(self._trainer, self.has_state)):  # a resumed run has a move to undo
            return
        remedy = "Start from other parameters, or scale inputs and targets, so that the loss is finite there"
        if len(bad) < len(values):
            self._bad_at_start = len(bad)
            rank_zero_warn(
                f"The loss of {len(bad)} of {len(values)} members is NaN or infinite at the first evaluation, before "
                f"any move that could be undone, so such members do not train. {remedy}."
            )
            return
        found = find_nonfinite(self._evaluation) or f"no parameter or input is NaN or infinite. {remedy}"
        raise RuntimeError(
            f"{_none_is_finite(values)} at the first evaluation, before any move that could be undone; {found}."
        )


def _none_is_finite(losses: list[float]) -> str:
    if len(losses) == 1:
        return f"The loss is {losses[0]}"
    return f"The loss of each of the {len(losses)} members is NaN or infinite"
