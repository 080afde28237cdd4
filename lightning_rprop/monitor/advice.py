"""Warnings where users of Rprop go wrong, each once a run, each with its remedy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rprop.monitor.optimizers import find_rprop
from lightning_rprop.monitor.record import Record

# What is warned of; any may be silenced.
TOPICS = (
    "no_logger",
    "lr_scheduler",
    "gradient_clipping",
    "sign_changes",
    "lower_bound",
    "upper_bound",
    "zero_gradients",
)

# When signs change too often, of those that can be compared: nearly all of them in a few records, or nearly half, as in
# pure noise, in many that are apart. Whole data sets stay below, but for the first steps and for weights that go to and
# fro at the lower bound: about one sign in five changes where step sizes neither grow nor shrink, as 1.2^4 * 0.5 is 1.
_NEARLY_ALL_SIGNS, _FEW = 0.8, 5
_NEARLY_HALF, _MANY, _STEPS_APART = 0.43, 20, 10

_NEARLY_ALL = 0.95
_MANY_ZEROS = 0.1


class Advice:
    """Says each thing once.

    Args:
        silence: topics not to speak of.
    """

    def __init__(self, silence: Iterable[str]) -> None:
        self.silence = frozenset(silence)
        self.said: set[str] = set()
        self.in_a_row = 0  # records in which nearly all signs changed
        self.changes: deque[float] = deque(maxlen=_MANY)  # share of changed signs in records that are apart
        self.step = -_STEPS_APART  # of the last of those

    def at_start(self, trainer: pl.Trainer) -> None:
        """Look at how the Trainer is set up."""
        if not trainer.loggers:
            self._say(
                "no_logger",
                "StepSizeMonitor has no logger to write to: its values go to callback_metrics alone. "
                "Give the Trainer one, for example logger=CSVLogger('logs')",
            )
        for config in trainer.lr_scheduler_configs:
            scheduled = getattr(config.scheduler, "optimizer", None)  # a scheduler of one's own need not have it
            if scheduled is not None and find_rprop(scheduled) is not None:
                self._say(
                    "lr_scheduler",
                    f"{type(config.scheduler).__name__} schedules the lr of an Rprop, which has no effect: lr is only "
                    "the first step size, and every weight adapts its own. Return the optimizer alone",
                )
        if trainer.gradient_clip_val:
            self._say(
                "gradient_clipping",
                f"gradient_clip_val={trainer.gradient_clip_val} has no effect on Rprop, which looks at the sign of a "
                "gradient and not at its size. Leave it out; step_sizes=(min, max) bounds the steps",
            )

    def of_record(self, record: Record, step: int, half: bool) -> None:
        """Look at a record.

        Args:
            record: what was measured.
            step: after which optimizer step.
            half: whether all gradients were computed in float16.
        """
        values = record.total
        if self._is_noisy(values, step):
            self._say(
                "sign_changes",
                f"{values['changed_of_compared']:.0%} of the gradient's signs changed, and as many in the records "
                "before: the gradient is noisy, from small batches, dropout or data augmentation, or lr is far too "
                "large. Rprop shrinks its steps then. Take the whole data set for each step (callback FullBatch with "
                "FullBatchLoader), without random numbers in training_step; or use Adam",
            )
        if values["at_lower_bound"] >= _NEARLY_ALL:
            self._say(
                "lower_bound",
                f"{values['at_lower_bound']:.0%} of the step sizes are at their lower bound, "
                f"{values['lower_bound']:g}: training has converged, or is stuck in a noisy gradient. Stop it, lower "
                "the bound (step_sizes=(min, max)), or see whether the loss is the same function at every step",
            )
        if values["at_upper_bound"] >= _NEARLY_ALL:
            self._say(
                "upper_bound",
                f"{values['at_upper_bound']:.0%} of the step sizes are at their upper bound, "
                f"{values['upper_bound']:g}: steps would be larger if they might. Raise the bound "
                "(step_sizes=(min, max)), or see whether the loss can fall without end",
            )
        zero = values.get("zero_gradient", 0.0) if half else record.zero_in_half
        if zero >= _MANY_ZEROS:
            self._say(
                "zero_gradients",
                f"{zero:.0%} of the float16 gradients are exactly zero, and those weights do not move. What is not so "
                "by its nature (unused inputs, ReLU) is too small for float16: scale the loss up (Rprop does not mind, "
                "precision='16-mixed' on a GPU does it), or use bfloat16, precision='bf16-mixed'",
            )

    def _is_noisy(self, values: dict[str, float], step: int) -> bool:
        change = values.get("changed_of_compared")  # after a change of sign most rules compare nothing for a step
        if change is None or values["at_lower_bound"] > 0.5:
            return False
        self.in_a_row = self.in_a_row + 1 if change > _NEARLY_ALL_SIGNS else 0
        if step >= self.step + _STEPS_APART:
            self.step = step
            self.changes.append(change)
        many = len(self.changes) == _MANY and sum(self.changes) / _MANY > _NEARLY_HALF
        return many or self.in_a_row >= _FEW

    def state_dict(self) -> dict[str, Any]:
        """Give what was said, for a checkpoint."""
        return {"said": sorted(self.said), "in_a_row": self.in_a_row, "changes": [*self.changes], "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self.said, self.in_a_row, self.step = set(state["said"]), state["in_a_row"], state["step"]
        self.changes = deque(state["changes"], maxlen=_MANY)

    def _say(self, topic: str, text: str) -> None:
        if topic not in self.said and topic not in self.silence:
            self.said.add(topic)
            rank_zero_warn(f"{text}. (StepSizeMonitor says this once; silence=[{topic!r}] turns it off)")
