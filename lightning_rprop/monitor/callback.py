"""The Lightning side of the monitor: when to measure, and where to send the values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_rprop._lightning import attributes_of, callbacks_called, is_called, logged_step
from lightning_rprop._ranks import check_agreement
from lightning_rprop._torch import plain_name
from lightning_rprop.monitor._arguments import (
    check_choice,
    check_flag,
    check_interval,
    check_patterns,
    check_statistics,
)
from lightning_rprop.monitor._history import History
from lightning_rprop.monitor._loggers import send
from lightning_rprop.monitor._names import DEFAULT, MEMBER_LOSS, PREFIX, key_of
from lightning_rprop.monitor._record import GradientSummary, Plan, Record, measure, summarize_gradients
from lightning_rprop.monitor._retreats import Retreats
from lightning_rprop.monitor._rows import Listing, find_rprop
from lightning_rprop.monitor._warnings import TOPICS, Advice, why_no_record
from lightning_rprop.optim._members import is_per_member

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


class StepSizeMonitor(Callback):
    """Log the step sizes of Rprop: which parameters still learn, which are frozen, which oscillate.

    Works with one or several ``lightning_rprop.Rprop`` or ``torch.optim.Rprop``, next to other optimizers, in
    automatic and manual optimization, and with sharded parameters.

    A record holds the statistics of one optimizer step, logged at the step number of Lightning's own values. Every
    logger gets it in one call. The values of all parameters and of groups are also published in
    ``trainer.callback_metrics``, for ``EarlyStopping``, ``ModelCheckpoint`` and schedulers: at every record, at the
    last step of the run, and at every step if one of them monitors a key that starts with ``step_size/``.

    The keys are ``step_size/<statistic>`` for all weights of all Rprops, ``step_size/<group>/<statistic>`` for a
    parameter group (``group0``, or its ``"name"``; prefixed with ``optimizer1.`` if there are several Rprops), and
    ``step_size/<parameter name>/<statistic>`` for one parameter:

    - ``mean``, ``min``, ``max``: of the step sizes, in the unit of the weights.
    - ``median``: half of the step sizes are smaller; the same as ``q50``.
    - ``q10``, ``q2.5``, ...: quantiles of the step sizes, named by their level in per cent, ``q0`` to ``q100``.
    - ``std_log10``: (population) standard deviation of log10 of the step sizes, in powers of ten.
    - ``lower_bound``, ``upper_bound``: the bounds in force, ``step_sizes`` of the optimizer, in the same unit.
    - ``at_lower_bound``, ``at_upper_bound``: share (0 to 1) of the weights whose step size is at the bound.
    - ``sign_changed``: share of the weights whose gradient changed sign since the step before (after weight decay, as
      the rule sees it).
    - ``zero_gradient``: share of the entries of the gradient that were exactly zero.
    - ``nonfinite_gradient``: number of entries of the gradient that were infinite or NaN.
    - ``retreats``: how often in this run a ``lightning_rprop.Rprop`` took back its last move because of the loss, that
      of at least one member if there are several, also before a resume; not for groups or single parameters.

    The three of the gradient describe it just before the step, or the last one if the step evaluates several times. A
    parameter appears with its first gradient, even if it joins the optimizer later. Quantiles of sharded parameters are
    exact up to 4,096 step sizes per process. A larger shard sends 4,096 evenly spaced order statistics to the other
    processes, which moves a quantile by at most 0.02 percentage points.

    Optimizers may be replaced during a fit. While none is an Rprop there are no records, and ``callback_metrics`` keeps
    its last values. A Trainer can have several monitors that differ in ``logging_interval`` or ``every_n_steps``.

    Args:
        logging_interval: ``"step"`` records every ``every_n_steps`` optimizer steps, ``"epoch"`` at the end of each
            training epoch; ``None`` means ``"step"``.
        every_n_steps: Optimizer steps between two records; ``None`` follows ``Trainer(log_every_n_steps=...)``.
        statistics: Names from the list above; by default all except quantiles and ``std_log10``, which are slower.
        per_parameter: Which parameters to log separately as well: ``True`` for all, or one or more file name patterns
            of their names, such as ``"encoder.*"``.
        per_group: Whether to log each parameter group separately as well.
        histogram: Whether to log histograms of log10 of the step sizes, ``step_size/log10`` and
            ``step_size/<parameter name>/log10``, to loggers that support them (TensorBoard, W&B).
        prog_bar: Statistics to show in the progress bar, for all parameters together.
        silence: Warnings to turn off: any of ``"no_logger"``, ``"lr_scheduler"`` and ``"gradient_clipping"`` (neither
            affects Rprop), ``"sign_changes"`` (the gradient is noisy), ``"lower_bound"`` and ``"upper_bound"`` (nearly
            all step sizes are there), ``"zero_gradients"`` (float16 underflow), ``"no_rprop"`` (training starts without
            an Rprop) and ``"no_record"`` (``log_every_n_steps=0``, or a run shorter than the interval). Each is given
            once per run.

    Raises:
        ValueError: If an argument is invalid. At the start of ``fit``, if shapes or hyperparameters differ between the
            ranks.
        MisconfigurationException: At the start of ``fit``, if a pattern matches no parameter of the module, or
            DeepSpeed ZeRO has merged the parameters.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> monitor = StepSizeMonitor(statistics=["median", "q10", "q90"], per_parameter="net.*")
        >>> trainer = Trainer(callbacks=[monitor], logger=False)
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        every_n_steps: int | None = None,
        statistics: Sequence[str] = DEFAULT,
        per_parameter: bool | str | Sequence[str] = False,
        per_group: bool = False,
        histogram: bool = False,
        prog_bar: Sequence[str] = (),
        silence: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.every_n_steps = check_interval(logging_interval, every_n_steps)
        self.logging_interval = logging_interval
        self.statistics = check_statistics(statistics)
        self.per_parameter = check_patterns(per_parameter)
        self.per_group = check_flag("per_group", per_group)
        self.histogram = check_flag("histogram", histogram)
        self.prog_bar = check_choice("prog_bar", prog_bar, self.statistics, origin="statistics")
        self.silence = check_choice("silence", silence, TOPICS)
        self._reset()

    def _reset(self) -> None:
        self._advice = Advice(self.silence)
        self._history, self._validations = History(), History()
        self._maximize = False  # whether the highest loss is the best
        self._listing = Listing()
        self._retreats = Retreats()
        self._plan = Plan(self.statistics, self.per_group, frozenset(), self.histogram)
        self._is_watched = False  # whether another callback monitors a step size
        self._is_epoch_measured = False  # whether the last step of this epoch is measured
        self._is_logged = self._is_measured = False  # about this batch
        self._gradients: dict[int, GradientSummary] = {}  # of this batch, by the optimizer's id
        self._record: Record | None = None
        self._metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._interval = 0  # steps between two records, 0 for no records
        self._first_step = 0  # in logged steps
        self._steps: int | None = None  # since the first; None before any training
        self._has_rprop = False  # whether this run had one at any time
        self._steps_before = self._step_measured = self._step_logged = 0  # in trainer.global_step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, and check that the ranks agree."""
        self._restored = None
        if stage == "fit":
            _check_agreement(trainer)
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the parameters can be measured and that every pattern matches one."""
        if any(is_called(optimizer, "DeepSpeedOptimizer") for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "StepSizeMonitor cannot separate the step sizes of parameters that DeepSpeed ZeRO has merged: remove "
                "the callback, or use a strategy that keeps parameters separate ('ddp', 'fsdp', ModelParallelStrategy)"
            )
        _check_agreement(trainer)
        self._update_listing(trainer)
        of_module = [plain_name(name) for name, _ in pl_module.named_parameters()]  # an Rprop may hold others
        names = [*dict.fromkeys([*of_module, *(row.name for row in self._listing.rows)])]
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                more = f" and {len(names) - 20} more" if len(names) > 20 else ""
                raise MisconfigurationException(
                    f"per_parameter: {pattern!r} matches none of the module's parameters: {', '.join(names[:20])}{more}"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the records of a checkpoint, and check the Trainer's configuration."""
        self._restore()
        self._retreats.start(self._listing.optimizers)
        if self.logging_interval != "epoch":
            self._interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._step_measured = self._step_logged = trainer.global_step
        self._first_step, self._steps = logged_step(trainer), 0
        self._record = None
        self.on_train_epoch_start(trainer, pl_module)  # Lightning skips it when a run resumes in the middle of an epoch
        self._advice.at_start(trainer)
        if not self._interval and self.logging_interval != "epoch":
            self._advice.at_no_record(trainer, self._why_no_record())

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide whether the last step of this epoch is measured."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._is_watched = any(_is_ours(getattr(callback, "monitor", None)) for callback in callbacks)
        self._is_epoch_measured = self.logging_interval == "epoch" or trainer.current_epoch + 1 == trainer.max_epochs

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether to measure and to log the step of this batch."""
        step = logged_step(trainer)
        self._steps = step - self._first_step
        self._is_logged = self._interval > 0 and (step + 1) % self._interval == 0
        self._is_measured = self._is_logged or self._is_watched or self._ends(trainer)
        for config in trainer.lr_scheduler_configs:  # a new optimizer may have brought some during the epoch
            self._is_measured |= _is_ours(config.monitor)
        if self._is_measured:
            self._steps_before = trainer.global_step
            self._gradients = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Summarize the gradient if the step is measured."""
        if self._is_measured and (rprop := find_rprop(optimizer)) is not None:
            self._update_listing(trainer)
            rows, is_distributed = self._listing.rows, self._listing.is_distributed
            summary = summarize_gradients(
                row for row in rows if row.optimizer is rprop and (row.is_counted or not is_distributed)
            )
            if summary is not None:
                self._gradients[id(rprop)] = summary

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log the step, unless this batch only accumulated gradients."""
        if self._is_measured and trainer.global_step > self._steps_before:
            self._measure(trainer, _losses_in(outputs) if isinstance(outputs, Mapping) else None)
            if self._is_logged:
                self._log(trainer, logged_step(trainer))
            self._gradients = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation losses for ``plot``."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            losses = {name: float(value) for name, value in metrics.items() if re.match("val.*loss", name)}
            if losses:
                self._validations.add(logged_step(trainer), losses)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's last step if ``logging_interval="epoch"``."""
        if self.logging_interval == "epoch":
            self._measure(trainer)
            self._log(trainer, logged_step(trainer) - 1)  # the count is already that of the next step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the values of the last step, even if the run was stopped early."""
        self._measure(trainer)
        self._steps = logged_step(trainer) - self._first_step
        if self._interval and self._record is not None and not len(self._history):
            self._advice.at_no_record(trainer, self._why_no_record())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the parameters and optimizers."""
        if stage == "fit":
            self._restore()  # a fit that resumes at its end starts no training
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the parameters and optimizers: Lightning calls no ``teardown`` after an exception."""
        self._release()

    def _release(self) -> None:
        self.__dict__ = self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the parameters and optimizers of a running fit out of copies and pickles."""
        self._retreats.update(self._listing.optimizers)
        return attributes_of(self) | {"_listing": Listing(), "_gradients": {}}

    @property
    def state_key(self) -> str:
        """Return a checkpoint key that differs between monitors with different intervals."""
        interval = {"logging_interval": self.logging_interval, "every_n_steps": self.every_n_steps}
        return f"{type(self).__qualname__}{interval}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the warnings, the records that ``plot`` draws, and the number of retreats."""
        self._retreats.update(self._listing.optimizers)
        retreats = self._retreats.total
        return {
            "advice": self._advice.state_dict(),
            "history": self._history.state_dict(),
            "validations": self._validations.state_dict(),
            "maximize": self._maximize,
            "retreats": None if retreats is None else int(retreats),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until a fit resumes from it, because ``test`` with a checkpoint must not overwrite records."""
        self._restored = state_dict

    def _restore(self) -> None:
        if self._restored is not None:
            self._advice.load_state_dict(self._restored["advice"])
            self._history.load_state_dict(self._restored["history"])
            self._validations.load_state_dict(self._restored["validations"])
            # checkpoints of older releases have neither
            self._retreats = Retreats(self._restored.get("retreats"))
            self._maximize = self._restored.get("maximize", False)
            self._restored = None

    def plot(self, title: str = "") -> tuple[Figure, np.ndarray[Any, Any]]:
        """Plot the loss and, below it, the step sizes over the steps, of each parameter if they were logged.

        If training_step returns ``member_losses`` (see ``FullBatch``), the loss of each member is
        a thin line, and the best member is emphasised. The plot covers the whole run, with at most 800 records.
        ``python -m lightning_rprop.monitor FOLDER`` plots the files that a logger wrote; they hold no loss of a single
        member.

        Args:
            title: Title of the figure.

        Returns:
            The figure, and its axes from top to bottom.

        Raises:
            ValueError: If there is no record; the message says why.
            ModuleNotFoundError: If Matplotlib is not installed.
        """
        from lightning_rprop.monitor.plot import plot_series

        if not len(self._history):
            raise ValueError(f"there is no record to plot: {self._why_no_record()}")
        return plot_series(self._history.series() | self._validations.series(), title, self._maximize)

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Return whether this batch ends the run, or an epoch whose last step is measured."""
        if self._is_epoch_measured and trainer.is_last_batch:
            return True
        return trainer.max_steps >= 0 and trainer.global_step + len(trainer.optimizers) >= trainer.max_steps

    @property
    def _patterns(self) -> tuple[str, ...]:
        return () if isinstance(self.per_parameter, bool) else self.per_parameter

    def _update_listing(self, trainer: pl.Trainer) -> None:
        """Update the listing, and choose the parameters that are logged separately."""
        optimizers = self._listing.optimizers
        if self._listing.update(trainer):
            self._retreats.update(optimizers)  # they may have been replaced
            names = [row.name for row in self._listing.rows]
            chosen = (name for name in names if any(fnmatchcase(name, pattern) for pattern in self._patterns))
            self._plan = self._plan._replace(parameters=frozenset(names if self.per_parameter is True else chosen))
            self._has_rprop |= bool(names)

    def _why_no_record(self) -> str:
        return why_no_record(self._steps, self._interval, self._has_rprop, self.logging_interval == "epoch")

    def _measure(self, trainer: pl.Trainer, losses: Any = None) -> None:
        """Measure the last step once, and publish the values of all parameters and of groups."""
        if self._step_measured == trainer.global_step:
            return
        self._step_measured = trainer.global_step
        self._update_listing(trainer)
        gather = trainer.strategy.all_gather if self._listing.is_distributed else None
        self._retreats.update(self._listing.optimizers)
        retreats = self._retreats.total
        self._record = measure(self._listing.rows, self._gradients.values(), self._plan, losses, retreats, gather)
        if self._record is None:
            return
        self._metrics = {
            key_of(scope[1], name): value
            for scope, found in self._record.statistics.items()
            for name, value in found.items()
        }
        published = sum(len(found) for scope, found in self._record.statistics.items() if scope[0] != "parameter")
        values = dict(islice(self._metrics.items(), published))  # parameters come last
        tensors = torch.tensor([*values.values()], device=trainer.strategy.root_device).unbind()
        trainer.callback_metrics.update(zip(values, tensors, strict=True))
        shown = {key_of("", name) for name in self.prog_bar}
        if shown:
            trainer.progress_bar_metrics.update({key: value for key, value in values.items() if key in shown})

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        """Pass the record to the loggers, the history and the warnings."""
        if self._record is None or self._step_logged == trainer.global_step:
            return
        self._step_logged = trainer.global_step
        record, metrics = self._record, self._metrics
        histograms = {key_of(scope[1], "log10"): found for scope, found in record.histograms.items()}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                send(logger, metrics, histograms, step)
        self._maximize = all(row.options["maximize"] for row in self._listing.rows)
        names = ["loss"] if len(record.losses) == 1 else [f"{MEMBER_LOSS}{i}" for i in range(len(record.losses))]
        self._history.add(step, {**dict(zip(names, record.losses, strict=True)), **metrics})
        self._advice.at_record(record, step, half=str(trainer.precision).startswith("16"))


def _losses_in(outputs: Mapping[str, Any]) -> Any:
    """Return the losses of several members that are among the outputs of training_step, or the loss."""
    losses = outputs.get("member_losses")
    return losses if is_per_member(losses) else outputs.get("loss")


def _is_ours(key: Any) -> bool:
    """Return whether the ``monitor`` of a callback or scheduler is one of our keys."""
    return isinstance(key, str) and key.startswith(PREFIX)


def _check_agreement(trainer: pl.Trainer) -> None:
    if not callbacks_called(trainer, "FullBatch"):
        check_agreement(trainer)  # otherwise FullBatch checks it
