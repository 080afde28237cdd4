"""Warnings about common mistakes with Rprop, each given once per run and with its remedy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rprop.monitor._record import Record
from lightning_rprop.monitor._rows import find_rprop

# The topics of the warnings; each can be silenced.
TOPICS = (
    "no_logger",
    "lr_scheduler",
    "gradient_clipping",
    "sign_changes",
    "lower_bound",
    "upper_bound",
    "zero_gradients",
    "no_rprop",
    "no_record",
)

# When signs change too often, of those that can be compared: nearly all of them in a few records, or nearly half, as in
# pure noise, in many that are apart. Whole data sets stay below, but for the first steps and for weights that go to and
# fro at the lower bound: about one sign in five changes where step sizes neither grow nor shrink, as 1.2^4 * 0.5 is 1.
_NEARLY_ALL_SIGNS, _FEW = 0.8, 5
_NEARLY_HALF, _MANY, _STEPS_APART = 0.43, 20, 10

_NEARLY_ALL = 0.95
_MANY_ZEROS = 0.1


def why_no_record(steps: int | None, interval: int, has_rprop: bool, is_by_epoch: bool) -> str:
    """Explain why there is no record, and what to change.

    Args:
        steps: Optimizer steps that were made, ``None`` before any training.
        interval: Steps from one record to the next, 0 for none.
        has_rprop: Whether an optimizer was an Rprop.
        is_by_epoch: Whether records are made at the end of each epoch instead.
    """
    if steps is None or (interval and not steps):
        return (
            "StepSizeMonitor has seen no optimizer step in this process. Pass it to Trainer(callbacks=[monitor]) and "
            "call fit"
        )
    if not interval and not is_by_epoch:
        return (
            "StepSizeMonitor makes no records, because Trainer(log_every_n_steps=0) turns logging off. Set "
            "StepSizeMonitor(every_n_steps=1), or a larger interval"
        )
    if not has_rprop:
        return (
            "StepSizeMonitor found no Rprop among the optimizers. Return lightning_rprop.Rprop(...) or "
            "torch.optim.Rprop(...) from configure_optimizers"
        )
    if is_by_epoch:
        return (
            "StepSizeMonitor records at the end of an epoch, and found no step sizes there. Check that an epoch ended "
            "and that training_step returns a loss, or set every_n_steps instead of logging_interval='epoch'"
        )
    if steps < interval:
        return (
            f"StepSizeMonitor recorded none of the {steps} steps, because it records every {interval} steps. Set "
            f"StepSizeMonitor(every_n_steps={max(steps // 10, 1)}), for example"
        )
    return (
        f"StepSizeMonitor found no step sizes at the steps it records, every {interval}. Check that training_step "
        "returns a loss, or set a smaller every_n_steps"
    )


class Advice:
    """Give each warning once.

    Args:
        silence: Topics to leave out.
    """

    def __init__(self, silence: Iterable[str]) -> None:
        self.silence = frozenset(silence)
        self.said: set[str] = set()
        self.in_a_row = 0  # records in which nearly all signs changed
        self.changes: deque[float] = deque(maxlen=_MANY)  # share of changed signs in records that are apart
        self.step = -_STEPS_APART  # of the last of those

    def at_start(self, trainer: pl.Trainer) -> None:
        """Check how the Trainer is set up."""
        if not trainer.loggers:
            self._say(
                "no_logger",
                "StepSizeMonitor has no logger to write to, so its values only go to callback_metrics. "
                "Give the Trainer one, for example logger=CSVLogger('logs')",
            )
        if not any(find_rprop(optimizer) for optimizer in trainer.optimizers):
            found = ", ".join(f"{type(o).__module__}.{type(o).__qualname__}" for o in trainer.optimizers) or "none"
            self._say(
                "no_rprop",
                f"StepSizeMonitor needs an Rprop optimizer, but configure_optimizers returned: {found}. Return "
                "lightning_rprop.Rprop(...) or torch.optim.Rprop(...), or switch to one later; nothing is recorded "
                "until then",
            )
            return
        for config in trainer.lr_scheduler_configs:
            scheduled = getattr(config.scheduler, "optimizer", None)  # a custom scheduler may have none
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

    def of_no_record(self, trainer: pl.Trainer, reason: str) -> None:
        """Warn that a run leaves no record.

        Args:
            trainer: The Trainer. A run that only tries the code (``fast_dev_run``) is not warned about.
            reason: From :func:`why_no_record`.
        """
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._say("no_record", reason)

    def of_record(self, record: Record, step: int, half: bool) -> None:
        """Check a record.

        Args:
            record: The record.
            step: The optimizer step after which it was measured.
            half: Whether all gradients were computed in float16.
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
        """Return what was said, for a checkpoint."""
        return {"said": sorted(self.said), "in_a_row": self.in_a_row, "changes": [*self.changes], "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it from a checkpoint."""
        self.said, self.in_a_row, self.step = set(state["said"]), state["in_a_row"], state["step"]
        self.changes = deque(state["changes"], maxlen=_MANY)

    def _say(self, topic: str, text: str) -> None:
        if topic not in self.said and topic not in self.silence:
            self.said.add(topic)
            rank_zero_warn(f"{text}. (StepSizeMonitor says this once; silence=[{topic!r}] turns it off)")
