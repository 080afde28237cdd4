"""The Lightning side of the monitor: when to measure, and where the numbers go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_rprop.lightning_private import logged_step
from lightning_rprop.monitor.statistics import STATISTICS, summarize

# What torch.compile and FSDP put into a parameter's name.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


class StepSizeMonitor(Callback):
    """Log the step sizes of Rprop: which parameters still learn, and how fast.

    Works with :class:`lightning_rprop.Rprop` and ``torch.optim.Rprop``, in automatic and manual optimization. The
    values go to every logger of the Trainer, at the step count of Lightning's own values, and to
    ``trainer.callback_metrics``, where ``EarlyStopping(monitor="step_size/mean")`` and ``ModelCheckpoint`` find them;
    there they are also refreshed before each validation and at the end of each epoch.

    Logged, in the parameters' unit:

    - ``step_size/mean``, ``step_size/min``, ``step_size/max``: over all weights of all Rprop optimizers;
    - ``step_size/<parameter name>/mean``, ``.../min``, ``.../max``: over the weights of one parameter.

    Args:
        logging_interval: ``"step"`` logs every ``every_n_steps`` optimizer steps, ``"epoch"`` at the end of each
            training epoch; ``None`` is ``"step"``.
        every_n_steps: Optimizer steps between two records; ``None`` follows ``Trainer(log_every_n_steps=...)``.
        statistics: Which statistics to log: any of ``"mean"``, ``"min"`` and ``"max"``.
        per_parameter: Whether to log each parameter's statistics beside those over all.

    Raises:
        ValueError: If an argument is not one of its choices.
        MisconfigurationException: At the start of ``fit``, if no optimizer is an Rprop.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StepSizeMonitor(logging_interval="epoch")], logger=False)
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        every_n_steps: int | None = None,
        statistics: Sequence[str] = STATISTICS,
        per_parameter: bool = True,
    ) -> None:
        super().__init__()
        if logging_interval not in (None, "step", "epoch"):
            raise ValueError(f"logging_interval must be 'step', 'epoch' or None, got {logging_interval!r}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a number of steps >= 1, or None, got {every_n_steps!r}")
        if every_n_steps is not None and logging_interval == "epoch":
            raise ValueError(f"every_n_steps={every_n_steps} needs logging_interval='step', got 'epoch'")
        if isinstance(statistics, str) or not statistics or not set(statistics) <= set(STATISTICS):
            raise ValueError(f"statistics must be a list of some of {', '.join(STATISTICS)}, got {statistics!r}")
        self.logging_interval = logging_interval
        self.every_n_steps = every_n_steps
        self.statistics = tuple(statistics)
        self.per_parameter = per_parameter
        self._steps_seen = 0
        self._measured: tuple[int, dict[str, float]] | None = None  # at which step, what

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to monitor what is not there."""
        if not any(map(_is_rprop, trainer.optimizers)):
            found = ", ".join(f"{type(o).__module__}.{type(o).__qualname__}" for o in trainer.optimizers) or "none"
            raise MisconfigurationException(
                f"StepSizeMonitor needs an Rprop optimizer, but configure_optimizers returned: {found}. "
                "Return lightning_rprop.Rprop(...) or torch.optim.Rprop(...), or remove the callback."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the step that a checkpoint may have restored."""
        self._steps_seen = trainer.global_step
        self._measured = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where it is due; at the end of an epoch have the values ready for those who ask then."""
        interval = self.every_n_steps
        if interval is None:
            interval = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        stepped = trainer.global_step > self._steps_seen  # not so while gradients accumulate
        self._steps_seen = trainer.global_step
        step = logged_step(trainer)
        if stepped and self.logging_interval != "epoch" and interval > 0 and (step + 1) % interval == 0:
            self._log(trainer, pl_module, step)
        elif trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the values ready for callbacks that act after a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log once an epoch if so asked."""
        if self.logging_interval == "epoch":
            self._log(trainer, pl_module, logged_step(trainer) - 1)  # the count is one on, once the batches are done

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        metrics = self._measure(trainer, pl_module)
        if metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Compute the metrics of the current step once, and publish them in ``callback_metrics``."""
        if self._measured is not None and self._measured[0] == trainer.global_step:
            return self._measured[1]
        overall, each = summarize(_step_sizes(trainer, pl_module))
        metrics = self._keyed("step_size", overall)
        if self.per_parameter:
            for name, values in each.items():
                metrics |= self._keyed(f"step_size/{name}", values)
        tensors = torch.tensor(list(metrics.values()), device=trainer.strategy.root_device).unbind()
        trainer.callback_metrics.update(zip(metrics, tensors, strict=True))
        self._measured = (trainer.global_step, metrics)
        return metrics

    def _keyed(self, prefix: str, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{prefix}/{statistic}": values[statistic] for statistic in self.statistics if statistic in values}


def _is_rprop(optimizer: torch.optim.Optimizer) -> bool:
    """Tell an Rprop, ours or torch's, by the two options that no other optimizer has."""
    return {"etas", "step_sizes"} <= optimizer.defaults.keys()


def _step_sizes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """Find the step sizes of every parameter of an Rprop that had a gradient so far, by the parameter's name."""
    names = {id(p): name for name, p in pl_module.named_parameters()}
    found: dict[str, Tensor] = {}
    for i, optimizer in enumerate(filter(_is_rprop, trainer.optimizers)):
        for j, group in enumerate(optimizer.param_groups):
            for k, param in enumerate(group["params"]):
                if (state := optimizer.state.get(param)) and "step_size" in state:
                    name = names.get(id(param), f"optimizer{i}.group{j}.{k}")
                    for wrapper in _WRAPPERS:
                        name = name.replace(wrapper, "")
                    found[name] = state["step_size"]
    return found
