"""The private Lightning names behind ``self.log``, continued from ``_lightning.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

# The weight in self.log of a micro-batch that does not count: negligible, but no division by zero.
_NEGLIGIBLE = 1e-20


def is_logged(trainer: pl.Trainer, name: str) -> bool:
    """Return whether something other than ``on_train_batch_end`` has logged this name in the current epoch."""
    results = trainer._results
    for metric in (results or {}).values():
        forks = (f"{metric.meta.name}_step", f"{metric.meta.name}_epoch") if metric.meta.forked else ()
        if name in (metric.meta.name, *forks) and metric.meta.fx != "on_train_batch_end" and not metric.has_reset:
            return True  # entries of earlier epochs are still there, but reset
    return False


def replace_logged(trainer: pl.Trainer, hook: str, name: str) -> Callable[[Tensor], None]:
    """Return a function that replaces a value that a hook has logged with ``on_step``, until the end of the epoch.

    ``self.log`` takes 0.2 ms each time.
    """
    results = trainer._results
    assert results is not None
    return partial(setattr, results[f"{hook}.{name}"], "_forward_cache")


class StepLogs:
    """Makes ``self.log(..., on_step=True)`` show all micro-batches of a step; Lightning would show the last one.

    Means are weighted by samples. Sums, minima, maxima and torchmetrics objects cover all micro-batches. ``sync_dist``
    synchronizes once per step instead of once per micro-batch, except for the first micro-batch that logs a value.

    Call ``before()`` and ``after()`` around each micro-batch. Values are collected between ``begin()`` and
    ``end()``; without these, only the weight is set.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._is_collecting = False
        self._previous: dict[str, Any] = {}  # what was shown for the last step
        self._values: dict[str, list[tuple[Tensor, float]]] = {}  # of this step, with their weights
        self._syncs: dict[str, tuple[Any, Any]] = {}  # deferred
        self._saved: dict[str, Tensor] | None = None  # the epoch's sums before a micro-batch that does not count
        self._saved_metrics: list[tuple[Metric, dict[str, Any], int]] = []
        self._copies: dict[int, _StepMetric] | None = None  # of torchmetrics objects, by their id

    def begin(self) -> None:
        """Start to collect the values of a step."""
        self.cancel()
        self._is_collecting = True
        if self._copies is None:
            self._copies = {id(metric): _StepMetric(metric) for metric in self._metric_objects()}
        for copied in self._copies.values():
            copied.reset()
        self._values, self._previous = {}, {}
        for key, metric in self._step_results():
            self._previous[key], metric._forward_cache = metric._forward_cache, None
            self._defer_sync(key, metric)

    def before(self, weight: float) -> None:
        """Prepare for a micro-batch of this weight."""
        self._set_weight(weight)
        if weight == 0 and self._is_collecting:
            self._saved = {key: metric.value for key, metric in self._results()}
            self._saved_metrics = [
                (metric, metric._copy_state_dict(), metric._update_count) for metric in self._metric_objects()
            ]
            for copied in self._step_metrics():
                copied.is_counting = False

    def after(self, weight: float) -> None:
        """Collect the values that a micro-batch logged; non-finite ones are dropped if it does not count."""
        if not self._is_collecting:
            return
        saved, self._saved = self._saved, None
        if saved is not None:
            self._restore(saved)
        for key, metric in self._step_results():
            if metric._forward_cache is not None:
                value, metric._forward_cache = metric._forward_cache, None
                if key not in self._syncs and metric.meta.sync.should and metric.meta.is_sum_reduction:
                    value = value / self._trainer.world_size  # self.log has summed over the ranks for a new metric
                if saved is not None and not value.isfinite():  # kept as a placeholder: other ranks may wait for it
                    value, weight_of_value = torch.full_like(value, _neutral(metric.meta)), 0.0
                else:
                    weight_of_value = weight or _NEGLIGIBLE
                self._values.setdefault(key, []).append((value, weight_of_value))
            self._defer_sync(key, metric)

    def end(self, weight: float) -> None:
        """Show the values of the step, whose micro-batches weigh this much together."""
        if not self._is_collecting:
            return
        self.cancel()
        for key, metric in self._step_results():
            if key in self._values:
                metric._forward_cache = _merged(metric.meta, self._values[key])
            elif metric._forward_cache is None:
                metric._forward_cache = self._previous.get(key)
        if self._copies:
            for metric in list((self._trainer._results or {}).values()):
                if not metric.is_tensor and (copied := self._copies.get(id(metric.value))):
                    if metric.meta.on_step:
                        metric._forward_cache = copied.show()
                    else:
                        copied.remove()
                        del self._copies[id(metric.value)]
            for copied in self._copies.values():
                copied.show()  # for hooks that log it later
        self._set_weight(weight)

    def cancel(self) -> None:
        """Stop collecting, and let Lightning synchronize again."""
        self._is_collecting = False
        for metric, function in self._syncs.values():
            metric.meta.sync._fn = function  # looked up again, because self.log copies a metric's meta
        self._syncs = {}

    def close(self) -> None:
        """Leave the torchmetrics objects as they were before the fit."""
        self.cancel()
        for copied in self._step_metrics():
            copied.remove()
        self._copies = None

    def _set_weight(self, weight: float) -> None:
        """Set the weight of what ``self.log`` gets next; Lightning knows only the size of the loader's batch."""
        results = self._trainer._results
        if results is not None:
            # a float, because sync_dist truncates the mean of integers
            results.batch_size = float(weight or _NEGLIGIBLE)  # type: ignore[assignment]

    def _restore(self, saved: dict[str, Tensor]) -> None:
        """Undo what a micro-batch that does not count has added to the epoch's values."""
        for key, metric in self._results():
            if not metric.value.isfinite():  # cumulated_batch_size has grown by a negligible amount only
                metric.value = saved.get(key, torch.full_like(metric.value, _neutral(metric.meta)))
        for metric, state, count in self._saved_metrics:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, None
        for copied in self._step_metrics():
            copied.is_counting = True
        self._saved_metrics = []

    def _defer_sync(self, key: str, metric: Any) -> None:
        sync = metric.meta.sync
        if sync.should and key not in self._syncs:
            self._syncs[key] = metric, sync._fn
            sync._fn = sync.no_op

    def _step_results(self) -> list[tuple[str, Any]]:
        return [(key, metric) for key, metric in self._results() if metric.meta.on_step]

    def _results(self) -> list[tuple[str, Any]]:
        results = self._trainer._results
        return [
            (key, metric)
            for key, metric in (results.items() if results else ())
            if metric.is_tensor and metric.meta.fx == "training_step"
        ]

    def _metric_objects(self) -> list[Metric]:
        return [module for module in self._trainer.lightning_module.modules() if isinstance(module, Metric)]

    def _step_metrics(self) -> list[_StepMetric]:
        return list((self._copies or {}).values())


class _StepMetric:
    """A copy of a torchmetrics object that receives the same updates, but of one step only."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._copy = metric.clone()
        self.is_counting = True
        self._handle = metric.register_forward_hook(self._update, with_kwargs=True)
        self.reset()

    def _update(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.is_counting:
            self._copy.update(*args, **kwargs)
            self._has_seen = True

    def reset(self) -> None:
        if self._copy.device != self._metric.device:
            self._copy.to(self._metric.device)
        self._copy.reset()
        self._has_seen = False

    def show(self) -> Any:
        """Make ``self.log`` show the value over this rank's micro-batches, or all ranks' with ``dist_sync_on_step``."""
        if self._has_seen:
            self._has_seen = False
            synced = self._metric.dist_sync_on_step
            # the class's method, because the object's wrapper synchronizes
            self._metric._forward_cache = self._copy.compute() if synced else type(self._copy).compute(self._copy)
        return self._metric._forward_cache

    def remove(self) -> None:
        self._handle.remove()


def _neutral(meta: Any) -> float:
    """Return the value that changes no mean, sum, maximum or minimum."""
    return -torch.inf if meta.is_max_reduction else torch.inf if meta.is_min_reduction else 0.0


def _merged(meta: Any, values_and_weights: list[tuple[Tensor, float]]) -> Tensor:
    """Merge the values of all micro-batches, and of all ranks if the user asked for ``sync_dist``."""

    def over_ranks(value: Tensor, operation: str) -> Tensor:
        everywhere = meta.sync.should and not meta.sync.rank_zero_only
        merged: Tensor = meta.sync.fn(value, reduce_op=operation, group=meta.sync.group) if everywhere else value
        return merged

    values = torch.stack([value for value, _ in values_and_weights])
    if meta.is_mean_reduction:
        weights = values.new_tensor([weight for _, weight in values_and_weights])
        sums = over_ranks(torch.stack([(values * weights).sum(), weights.sum()]), "sum")
        return sums[0] / sums[1]
    if meta.is_sum_reduction:
        return over_ranks(values.sum(), "sum")
    return over_ranks(values.max(), "max") if meta.is_max_reduction else over_ranks(values.min(), "min")
