"""The private names of Lightning that this package uses, all of them, with the reason for each.

They were looked at in the releases that ``tests/test_lightning_private.py`` names; everything else is public API.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call
from torch import Tensor


def logged_step(trainer: pl.Trainer) -> int:
    """Give the step at which Lightning logs its own values of this batch.

    The only number that is right under accumulation and with several optimizers; Lightning's own monitors read it too.
    ``trainer.global_step`` counts from one, and the steps of all optimizers.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def run_training_step(trainer: pl.Trainer, *args: Any) -> Any:
    """Run training_step as Lightning does: under the profiler, and so that ``self.log`` in it knows where it is.

    ``self.log`` forgets what was logged before whenever the hook changes in the first batch of an epoch; for it the
    micro-batches of a step are one hook.
    """
    trainer._logger_connector._current_fx = "training_step"
    output: Any = call._call_strategy_hook(trainer, "training_step", *args)
    return output


def run_module_hook(trainer: pl.Trainer, name: str, *args: Any, **kwargs: Any) -> None:
    """Call a hook of the module as Lightning does: under the profiler, and so that ``self.log`` knows where it is."""
    call._call_lightning_module_hook(trainer, name, *args, **kwargs)


def before_batch_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """Call ``on_before_batch_transfer`` of the datamodule or the module, whichever Lightning would."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def weigh_logs(trainer: pl.Trainer, samples: float) -> None:
    """Let ``self.log`` weigh what comes next by so many samples: Lightning knows only the loader's batch.

    A float, as Lightning's ``sync_dist`` cuts the decimals off a mean of whole numbers.
    """
    results = trainer._results
    if results is not None:
        results.batch_size = float(samples)  # type: ignore[assignment]


def starts_scripts(trainer: pl.Trainer) -> bool:
    """Tell whether the strategy is one whose other ranks are runs of the script (``ddp``, ``fsdp``, ...)."""
    return _script_launcher(trainer) is not None


def starts_ranks(trainer: pl.Trainer) -> bool:
    """Tell whether Lightning would start the other ranks itself, as neither torchrun nor SLURM has started them."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and not environment.creates_processes_externally


@contextmanager
def start_ranks_by(
    trainer: pl.Trainer,
    start: Callable[[int, dict[str, str]], subprocess.Popen[bytes]],
    watch: Callable[[list[subprocess.Popen[bytes]]], None],
) -> Iterator[None]:
    """Make the script launcher start local rank ``r`` by ``start(r, environment)`` and then call ``watch(processes)``.

    Under Hydra its own command is the whole sweep (Lightning issues 11300 and 18175), and its own observer kills this
    process, and with it the sweep, when a rank fails. These are names in the launcher's module.
    """
    module = _script_launcher(trainer)
    replaced = {
        "subprocess": SimpleNamespace(Popen=lambda command, env, cwd: start(int(env["LOCAL_RANK"]), env)),
        "_hydra_subprocess_cmd": lambda local_rank: ([], None),
        "_launch_process_observer": watch,
    }
    before = {name: getattr(module, name) for name in replaced}
    vars(module).update(replaced)
    try:
        yield
    finally:
        vars(module).update(before)


def _script_launcher(trainer: pl.Trainer) -> ModuleType | None:
    """Give the module of the launcher of scripts, that of the ``pytorch_lightning`` package if it is its trainer."""
    for kind in type(trainer.strategy.launcher).__mro__:
        if kind.__name__ == "_SubprocessScriptLauncher":
            return sys.modules[kind.__module__]
    return None


class StepLogs:
    """Makes ``self.log(..., on_step=True)`` show all micro-batches of a step, where Lightning shows the last one.

    Means weigh by samples; sums, minima and maxima run over all micro-batches. What ``sync_dist`` asks for is done once
    a step, over all micro-batches of all ranks, instead of at each (but for the first that a value is logged in).
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._before: dict[str, Any] = {}
        self._seen: dict[str, list[tuple[Tensor, float]]] = {}
        self._syncs: dict[str, tuple[Any, Any]] = {}

    def begin(self) -> None:
        """Put the values of the step before aside."""
        self.cancel()
        self._seen, self._before = {}, {}
        for key, metric in self._metrics():
            self._before[key], metric._forward_cache = metric._forward_cache, None
            self._defer(key, metric)

    def take(self, samples: float) -> None:
        """Collect what a micro-batch logged."""
        for key, metric in self._metrics():
            if metric._forward_cache is not None:
                self._seen.setdefault(key, []).append((metric._forward_cache, samples))
                metric._forward_cache = None
            self._defer(key, metric)

    def end(self) -> None:
        """Show the step's values, and the old ones of what was not logged."""
        self.cancel()
        for key, metric in self._metrics():
            if key in self._seen:
                metric._forward_cache = _merged(metric.meta, self._seen[key])
            elif metric._forward_cache is None:
                metric._forward_cache = self._before.get(key)

    def cancel(self) -> None:
        """Let Lightning synchronize again."""
        for metric, function in self._syncs.values():
            metric.meta.sync._fn = function  # looked up anew: self.log copies a metric's meta
        self._syncs = {}

    def _defer(self, key: str, metric: Any) -> None:
        sync = metric.meta.sync
        if sync.should and key not in self._syncs:
            self._syncs[key] = metric, sync._fn
            sync._fn = sync.no_op

    def _metrics(self) -> list[tuple[str, Any]]:
        results = self._trainer._results
        return [
            (key, metric)
            for key, metric in (results.items() if results else ())
            if metric.is_tensor and metric.meta.on_step and metric.meta.fx == "training_step"
        ]


def _merged(meta: Any, seen: list[tuple[Tensor, float]]) -> Tensor:
    """Make one value of those of all micro-batches, and of all ranks if the user asked for that."""

    def over_ranks(value: Tensor, operation: str) -> Tensor:
        everywhere = meta.sync.should and not meta.sync.rank_zero_only
        merged: Tensor = meta.sync.fn(value, reduce_op=operation, group=meta.sync.group) if everywhere else value
        return merged

    values = torch.stack([value for value, _ in seen])
    if meta.is_mean_reduction:
        weights = values.new_tensor([samples for _, samples in seen])
        sums = over_ranks(torch.stack([(values * weights).sum(), weights.sum()]), "sum")
        return sums[0] / sums[1]
    if meta.is_sum_reduction:
        return over_ranks(values.sum(), "sum")
    return over_ranks(values.max(), "max") if meta.is_max_reduction else over_ranks(values.min(), "min")
