"""The Lightning side of the monitor: when to measure, and where the numbers go."""

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

from lightning_rprop._lightning import is_called, logged_step
from lightning_rprop._ranks import check_agreement
from lightning_rprop.monitor._arguments import (
    check_choice,
    check_flag,
    check_interval,
    check_patterns,
    check_statistics,
)
from lightning_rprop.monitor._history import History
from lightning_rprop.monitor._loggers import send
from lightning_rprop.monitor._names import DEFAULT, PREFIX, key_of
from lightning_rprop.monitor._record import Look, Plan, Record, look, measure
from lightning_rprop.monitor._rows import Listing, find_rprop, plain_name
from lightning_rprop.monitor._warnings import TOPICS, Advice, why_no_record

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


class StepSizeMonitor(Callback):
    """Log what the step sizes of Rprop do: which parameters still learn, which are frozen, which oscillate.

    Works with :class:`lightning_rprop.Rprop` and ``torch.optim.Rprop``, one or several, beside other optimizers, in
    automatic and manual optimization, with parameters that are sharded among processes.

    A record is of one optimizer step, at the step count of Lightning's own values. Every logger gets it in one call.
    ``trainer.callback_metrics`` gets the values over all parameters and of groups, for ``EarlyStopping``,
    ``ModelCheckpoint`` and schedulers: at every record, at the run's last step, and at every step if one of them
    monitors a key that begins with ``step_size/``.

    Logged is ``step_size/<statistic>`` over all weights of all Rprops, ``step_size/<group>/<statistic>`` over a group
    of parameters (``group0``, or the group's ``"name"``; behind ``optimizer1.`` where there are several Rprops), and
    ``step_size/<parameter name>/<statistic>`` over one parameter:

    ======================  =================  ========================================================================
    statistic               unit               what it is
    ======================  =================  ========================================================================
    ``mean``                of the weights     mean of the step sizes
    ``min``, ``max``        of the weights     the smallest and the largest
    ``median``              of the weights     half of them are smaller; as ``q50``
    ``q10``, ``q2.5``, ...  of the weights     quantile: so many per cent are smaller; ``q0`` to ``q100``
    ``std_log10``           powers of ten      standard deviation of log10 of the step sizes (of the population)
    ``lower_bound``,        of the weights     the bounds in force, ``step_sizes`` of the optimizer
    ``upper_bound``
    ``at_lower_bound``,     share, 0 to 1      how many of the weights have a step size at the bound
    ``at_upper_bound``
    ``sign_changed``        share, 0 to 1      how many of the weights saw another sign of the gradient than at the step
                                               before (with the weight decay, as the rule sees it)
    ``zero_gradient``       share, 0 to 1      how many entries of the gradient were exactly zero
    ``nonfinite_gradient``  entries            how many entries of the gradient were infinite or NaN
    ======================  =================  ========================================================================

    The last three are of the gradient just before the step; where a step evaluates several times, of the last
    evaluation. A parameter appears with its first gradient, also one that joins the optimizer later. Quantiles of
    sharded parameters are exact up to 4,096 step sizes on each process; of more, each process shows as many to the
    others, evenly spaced in their order, which moves a quantile by at most 0.02 per cent.

    Optimizers may be replaced during a fit. While none is an Rprop there are no records, and ``callback_metrics`` keeps
    its last values. A Trainer can have several monitors that differ in ``logging_interval`` or ``every_n_steps``.

    Args:
        logging_interval: ``"step"`` makes a record every ``every_n_steps`` optimizer steps, ``"epoch"`` at the end of
            each training epoch; ``None`` is ``"step"``.
        every_n_steps: Optimizer steps between two records; ``None`` follows ``Trainer(log_every_n_steps=...)``.
        statistics: Which statistics, by the names above; by default all but quantiles and ``std_log10``, which take
            longer.
        per_parameter: Whether to log each parameter's statistics beside those over all: ``True`` for all parameters,
            or one or several patterns of their names, written like patterns of file names: ``"encoder.*"``.
        per_group: Whether those of each parameter group are.
        histogram: Whether loggers that have histograms (TensorBoard, W&B) get those of log10 of the step sizes,
            ``step_size/log10`` and ``step_size/<parameter name>/log10``.
        prog_bar: Statistics that the progress bar shows, over all parameters.
        silence: Warnings to turn off: any of ``"no_logger"``, ``"lr_scheduler"`` and ``"gradient_clipping"`` (neither
            has an effect on Rprop), ``"sign_changes"`` (the gradient is noisy), ``"lower_bound"`` and ``"upper_bound"``
            (nearly all step sizes are there), ``"zero_gradients"`` (float16 underflows), ``"no_rprop"`` (training
            starts without an Rprop) and ``"no_record"`` (``log_every_n_steps=0``, or a run that is shorter than the
            interval). Each is given once per run.

    Raises:
        ValueError: If an argument is not one of its choices.
        MisconfigurationException: At the start of ``fit``, if a pattern fits no parameter of the module, or DeepSpeed's
            ZeRO has joined the parameters.
        ValueError: At the start of ``fit``, if shapes or hyperparameters differ between the ranks.

    Example:
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
        self._begin()

    def _begin(self) -> None:
        self._advice = Advice(self.silence)
        self._history, self._validations = History(), History()
        self._listing = Listing()
        self._plan = Plan(self.statistics, self.per_group, frozenset(), self.histogram)
        self._is_watched = False  # by a callback
        self._is_epoch_measured = False  # the last step of this epoch
        self._is_logged = self._is_measured = False  # the step of this batch
        self._looks: dict[int, Look] = {}  # of the optimizers that step in this batch
        self._record: Record | None = None
        self._metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._interval = 0  # steps from a record to the next, 0 for none
        self._first_step = 0  # by Lightning's logged step
        self._steps: int | None = None  # made since, once a training has started
        self._has_rprop = False  # whether this run had one, at any time
        self._steps_before = self._step_measured = self._step_logged = 0  # by Lightning's global_step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run, and refuse ranks whose models differ."""
        self._restored = None
        if stage == "fit":
            _check_agreement(trainer)
        if stage == "fit" and trainer.global_step == 0:
            self._begin()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse parameters that cannot be told apart, and patterns that fit none."""
        if any(is_called(optimizer, "DeepSpeedOptimizer") for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "StepSizeMonitor cannot tell apart the step sizes of parameters that DeepSpeed's ZeRO has joined, with "
                "padding: remove the callback, or use a strategy that leaves parameters as they are ('ddp', 'fsdp', "
                "ModelParallelStrategy)"
            )
        _check_agreement(trainer)
        self._list(trainer)
        of_module = [plain_name(name) for name, _ in pl_module.named_parameters()]  # those of an Rprop may be others
        names = [*dict.fromkeys([*of_module, *(row.name for row in self._listing.rows)])]
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                more = f" and {len(names) - 20} more" if len(names) > 20 else ""
                raise MisconfigurationException(
                    f"per_parameter: {pattern!r} fits none of the module's parameters: {', '.join(names[:20])}{more}"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the records of a checkpoint, and check how the Trainer is set up."""
        self._restore()
        if self.logging_interval != "epoch":
            self._interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._step_measured = self._step_logged = trainer.global_step
        self._first_step, self._steps = logged_step(trainer), 0
        self._record = None
        self._begin_epoch(trainer)  # Lightning does not call the hook where a run resumes in the middle of an epoch
        self._advice.at_start(trainer)
        if not self._interval and self.logging_interval != "epoch":
            self._advice.of_no_record(trainer, self._why_no_record())

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide whether the last step of this epoch is measured."""
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: pl.Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._is_watched = any(_is_ours(getattr(callback, "monitor", None)) for callback in callbacks)
        self._is_epoch_measured = self.logging_interval == "epoch" or trainer.current_epoch + 1 == trainer.max_epochs

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether the step of this batch is measured, and whether it is logged."""
        step = logged_step(trainer)
        self._steps = step - self._first_step
        self._is_logged = self._interval > 0 and (step + 1) % self._interval == 0
        self._is_measured = self._is_logged or self._is_watched or self._ends(trainer)
        for config in trainer.lr_scheduler_configs:  # they may have come with an optimizer since the epoch began
            self._is_measured |= _is_ours(config.monitor)
        if self._is_measured:
            self._steps_before = trainer.global_step
            self._looks = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradient, if the step is measured."""
        if self._is_measured and (rprop := find_rprop(optimizer)) is not None:
            self._list(trainer)
            rows, shared = self._listing.rows, self._listing.are_shared
            seen = look(row for row in rows if row.optimizer is rprop and (row.counts or not shared))
            if seen is not None:
                self._looks[id(rprop)] = seen

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the step, and log it, if it was made: not so while gradients accumulate."""
        if self._is_measured and trainer.global_step > self._steps_before:
            self._measure(trainer, outputs.get("loss") if isinstance(outputs, Mapping) else None)
            if self._is_logged:
                self._log(trainer, logged_step(trainer))
            self._looks = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the losses of a validation for the picture."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            losses = {name: float(value) for name, value in metrics.items() if re.match("val.*loss", name)}
            if losses:
                self._validations.add(logged_step(trainer), losses)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log once an epoch if so asked."""
        if self.logging_interval == "epoch":
            self._measure(trainer)
            self._log(trainer, logged_step(trainer) - 1)  # the count is one on, once the batches are done

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the values of the last step, also of a run that was stopped."""
        self._measure(trainer)
        self._steps = logged_step(trainer) - self._first_step
        if self._interval and self._record is not None and not len(self._history):
            self._advice.of_no_record(trainer, self._why_no_record())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the parameters and optimizers."""
        if stage == "fit":
            self._restore()  # a fit that resumes where it has to end starts no training
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release them here too, because Lightning calls no ``teardown`` after an exception."""
        self._release()

    def _release(self) -> None:
        self.__dict__ = self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the parameters and optimizers of a running fit out of a copy or a pickle."""
        # Lightning sets these two on every callback, bound to the module
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return kept | {"_listing": Listing(), "_looks": {}}

    @property
    def state_key(self) -> str:
        """Tell the monitors of a Trainer apart in a checkpoint, by when they record."""
        interval = {"logging_interval": self.logging_interval, "every_n_steps": self.every_n_steps}
        return f"{type(self).__qualname__}{interval}"

    def state_dict(self) -> dict[str, Any]:
        """Return what was said and what ``plot`` draws, for a checkpoint."""
        return {
            "advice": self._advice.state_dict(),
            "history": self._history.state_dict(),
            "validations": self._validations.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until a fit resumes from it: a test of a checkpoint must not overwrite later records."""
        self._restored = state_dict

    def _restore(self) -> None:
        if self._restored is not None:
            self._advice.load_state_dict(self._restored["advice"])
            self._history.load_state_dict(self._restored["history"])
            self._validations.load_state_dict(self._restored["validations"])
            self._restored = None

    def plot(self, title: str = "") -> tuple[Figure, np.ndarray[Any, Any]]:
        """Draw the records: loss above, below it the step sizes over the steps, of each parameter if they were logged.

        The whole run is drawn, from at most 800 records that are kept. ``python -m lightning_rprop.monitor FOLDER``
        draws what a logger wrote.

        Args:
            title: Stands above it.

        Returns:
            The figure, and its axes from top to bottom.

        Raises:
            ValueError: If there is no record, with the reason.
            ModuleNotFoundError: Without Matplotlib.
        """
        from lightning_rprop.monitor.plot import plot_series

        if not len(self._history):
            raise ValueError(f"there is no record to plot: {self._why_no_record()}")
        return plot_series(self._history.series() | self._validations.series(), title)

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Tell whether this batch ends an epoch that is to be logged, or the run."""
        if self._is_epoch_measured and trainer.is_last_batch:
            return True
        return trainer.max_steps >= 0 and trainer.global_step + len(trainer.optimizers) >= trainer.max_steps

    @property
    def _patterns(self) -> tuple[str, ...]:
        return () if isinstance(self.per_parameter, bool) else self.per_parameter

    def _list(self, trainer: pl.Trainer) -> None:
        """Bring the list of the parameters up to date, and choose those that are shown one by one."""
        if self._listing.update(trainer):
            names = [row.name for row in self._listing.rows]
            chosen = (name for name in names if any(fnmatchcase(name, pattern) for pattern in self._patterns))
            self._plan = self._plan._replace(parameters=frozenset(names if self.per_parameter is True else chosen))
            self._has_rprop |= bool(names)

    def _why_no_record(self) -> str:
        return why_no_record(self._steps, self._interval, self._has_rprop, self.logging_interval == "epoch")

    def _measure(self, trainer: pl.Trainer, loss: Any = None) -> None:
        """Measure the last step, once, and publish the values over all parameters and of groups."""
        if self._step_measured == trainer.global_step:
            return
        self._step_measured = trainer.global_step
        self._list(trainer)
        gather = trainer.strategy.all_gather if self._listing.are_shared else None
        self._record = measure(self._listing.rows, self._looks.values(), self._plan, loss, gather)
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
        """Bring the record to the loggers, in one call each, to the picture and to the advice."""
        if self._record is None or self._step_logged == trainer.global_step:
            return
        self._step_logged = trainer.global_step
        record, metrics = self._record, self._metrics
        histograms = {key_of(scope[1], "log10"): found for scope, found in record.histograms.items()}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                send(logger, metrics, histograms, step)
        self._history.add(step, metrics if record.loss is None else {"loss": record.loss, **metrics})
        self._advice.of_record(record, step, half=str(trainer.precision).startswith("16"))


def _is_ours(key: Any) -> bool:
    """Return whether a callback or a scheduler that monitors this key monitors one of ours."""
    return isinstance(key, str) and key.startswith(PREFIX)


def _check_agreement(trainer: pl.Trainer) -> None:
    if not any(is_called(callback, "FullBatch") for callback in trainer.callbacks):  # type: ignore[attr-defined]
        check_agreement(trainer)  # else FullBatch does it
