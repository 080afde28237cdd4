"""Warnings about common mistakes with Rprop, each given once per run, with its remedy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rprop.monitor._record import Record
from lightning_rprop.monitor._rows import find_rprop

# The warnings; each can be silenced.
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

# A gradient is noisy if nearly all comparable signs changed in a few consecutive records, or nearly half (pure noise)
# in many records that are some steps apart. Full-batch training stays below both, except in the first steps and at the
# lower bound: where step sizes neither grow nor shrink, about one sign in five changes (1.2^4 * 0.5 is about 1).
_NEARLY_ALL_SIGNS, _FEW = 0.8, 5
_NEARLY_HALF, _MANY, _STEPS_APART = 0.43, 20, 10

_NEARLY_ALL = 0.95
_MANY_ZEROS = 0.1


def why_no_record(steps: int | None, interval: int, has_rprop: bool, is_by_epoch: bool) -> str:
    """Explain why there is no record, and what to change.

    Args:
        steps: Number of optimizer steps so far, ``None`` before any training.
        interval: Steps between two records, 0 for no records.
        has_rprop: Whether there was an Rprop at any time.
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
        f"StepSizeMonitor found no step sizes, although it recorded every {interval} steps. Check that training_step "
        "returns a loss, or set a smaller every_n_steps"
    )


class Advice:
    """Warnings that are given once each.

    Args:
        silence: Topics to skip.
    """

    def __init__(self, silence: Iterable[str]) -> None:
        self.silence = frozenset(silence)
        self.said: set[str] = set()
        self.in_a_row = 0  # consecutive records in which nearly all signs changed
        self.changes: deque[float] = deque(maxlen=_MANY)  # shares of changed signs, in records apart
        self.step = -_STEPS_APART  # of the last one of those

    def at_start(self, trainer: pl.Trainer) -> None:
        """Check the Trainer's configuration."""
        if not trainer.loggers:
            self._warn(
                "no_logger",
                "StepSizeMonitor has no logger to write to, so its values only go to callback_metrics. "
                "Give the Trainer one, for example logger=CSVLogger('logs')",
            )
        if not any(find_rprop(optimizer) for optimizer in trainer.optimizers):
            found = ", ".join(f"{type(o).__module__}.{type(o).__qualname__}" for o in trainer.optimizers) or "none"
            self._warn(
                "no_rprop",
                f"StepSizeMonitor needs an Rprop optimizer, but configure_optimizers returned: {found}. Return "
                "lightning_rprop.Rprop(...) or torch.optim.Rprop(...), or switch to one later; nothing is recorded "
                "until then",
            )
            return
        for config in trainer.lr_scheduler_configs:
            scheduled = getattr(config.scheduler, "optimizer", None)  # a custom scheduler may have none
            if scheduled is not None and find_rprop(scheduled) is not None:
                self._warn(
                    "lr_scheduler",
                    f"{type(config.scheduler).__name__} schedules the lr of an Rprop, which has no effect: lr is only "
                    "the initial step size, and every weight adapts its own. Return only the optimizer",
                )
        if trainer.gradient_clip_val:
            self._warn(
                "gradient_clipping",
                f"gradient_clip_val={trainer.gradient_clip_val} has no effect on Rprop, which uses only the sign of a "
                "gradient. Leave it out; step_sizes=(min, max) bounds the steps",
            )

    def at_no_record(self, trainer: pl.Trainer, reason: str) -> None:
        """Warn that a run leaves no record, unless it is a ``fast_dev_run``.

        Args:
            trainer: The Trainer.
            reason: From ``why_no_record()``.
        """
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._warn("no_record", reason)

    def at_record(self, record: Record, step: int, half: bool) -> None:
        """Check a record.

        Args:
            record: The record.
            step: The optimizer step that it was measured after.
            half: Whether all gradients were computed in float16.
        """
        values = record.total
        if self._is_noisy(values, step):
            self._warn(
                "sign_changes",
                f"{values['changed_of_compared']:.0%} of the gradient's signs changed, and as many in earlier records: "
                "the gradient is noisy (small batches, dropout, data augmentation) or lr is far too large, and Rprop "
                "shrinks its steps. Train on the whole data set (callback FullBatch with FullBatchLoader) without "
                "randomness in training_step, or use Adam",
            )
        if values["at_lower_bound"] >= _NEARLY_ALL:
            self._warn(
                "lower_bound",
                f"{values['at_lower_bound']:.0%} of the step sizes are at their lower bound, "
                f"{values['lower_bound']:g}: training has converged, or is stuck because the gradient is noisy. Stop "
                "it, lower the bound (step_sizes=(min, max)), or check that every step has the same loss function",
            )
        if values["at_upper_bound"] >= _NEARLY_ALL:
            self._warn(
                "upper_bound",
                f"{values['at_upper_bound']:.0%} of the step sizes are at their upper bound, "
                f"{values['upper_bound']:g}: the bound slows training down. Raise the bound (step_sizes=(min, max)), "
                "or check that the loss has a lower bound",
            )
        zero = values.get("zero_gradient", 0.0) if half else record.zero_in_half
        if zero >= _MANY_ZEROS:
            self._warn(
                "zero_gradients",
                f"{zero:.0%} of the float16 gradients are exactly zero, and those weights do not move. Unless unused "
                "inputs or ReLU explain it, the gradients underflow: scale the loss up (precision='16-mixed' on a GPU "
                "does, and it does not change Rprop's steps), or use bfloat16, precision='bf16-mixed'",
            )

    def _is_noisy(self, values: dict[str, float], step: int) -> bool:
        change = values.get("changed_of_compared")  # after a sign change, most variants skip one comparison
        if change is None or values["at_lower_bound"] > 0.5:
            return False
        self.in_a_row = self.in_a_row + 1 if change > _NEARLY_ALL_SIGNS else 0
        if step >= self.step + _STEPS_APART:
            self.step = step
            self.changes.append(change)
        many = len(self.changes) == _MANY and sum(self.changes) / _MANY > _NEARLY_HALF
        return many or self.in_a_row >= _FEW

    def state_dict(self) -> dict[str, Any]:
        """Return the warnings given so far and the signs seen, for a checkpoint."""
        return {"said": sorted(self.said), "in_a_row": self.in_a_row, "changes": [*self.changes], "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.said, self.in_a_row, self.step = set(state["said"]), state["in_a_row"], state["step"]
        self.changes = deque(state["changes"], maxlen=_MANY)

    def _warn(self, topic: str, text: str) -> None:
        if topic not in self.said and topic not in self.silence:
            self.said.add(topic)
            rank_zero_warn(f"{text}. (StepSizeMonitor says this once; silence=[{topic!r}] turns it off)")
