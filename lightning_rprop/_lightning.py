"""All private names of Lightning that this package uses, with the reason for each.

``test_lightning_private.py`` names the releases that they hold for; everything else in this package is public API.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

# Classes whose hooks do nothing, or what Lightning does by default.
_HAVE_EMPTY_HOOKS = frozenset({"Callback", "ModelHooks", "LightningModule"})
_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")

# Attributes by which Lightning, DeepSpeed and torch's ZeroRedundancyOptimizer hold the optimizer that they wrap.
_WRAPPED = ("_optimizer", "optimizer", "optim")


def is_called(value: Any, name: str) -> bool:
    """Return whether the value's class or a base class has this name.

    isinstance() by class name, because ``lightning`` and ``pytorch_lightning`` define separate classes.
    """
    return any(cls.__name__ == name for cls in type(value).__mro__)


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that makes the moves: the innermost wrapped one, or the optimizer itself."""
    while inside := [vars(optimizer)[name] for name in _WRAPPED if isinstance(vars(optimizer).get(name), Optimizer)]:
        optimizer = inside[0]
    return optimizer


def logged_step(trainer: pl.Trainer) -> int:
    """Give the step at which Lightning logs its own values of this batch.

    The only number that is right under accumulation and with several optimizers; Lightning's own monitors read it too.
    ``trainer.global_step`` counts from one, and the steps of all optimizers.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def evaluate_by(
    trainer: pl.Trainer, evaluate: Callable[[tuple[Any, ...], int, bool], tuple[Tensor, dict[str, Any]]]
) -> Callable[[], None]:
    """Make every call of the closure that Lightning hands to ``optimizer_step`` a call of ``evaluate``.

    Lightning has no hook around its closure, which evaluates one batch. Whoever calls it, and however often (LBFGS, an
    overridden ``optimizer_step``, an optimizer set in mid-fit), then gets what ``evaluate`` returns.

    Args:
        trainer: The Trainer that fits.
        evaluate: Called with the arguments of training_step, the batch index, and whether to compute gradients, which
            StochasticWeightAveraging turns off; returns the loss and what else training_step returned.

    Returns:
        A function that puts Lightning's closure back.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    closure_class = vars(_module_of(loop, "_AutomaticOptimization"))["Closure"]

    def make_closure(kwargs: Mapping[str, Any], optimizer: Optimizer, batch_idx: int) -> Any:
        def step_fn() -> Any:
            loss, extra = evaluate(tuple(kwargs.values()), batch_idx, not loop._skip_backward)
            return loop.output_result_cls(loss, extra=extra)

        return closure_class(step_fn)

    loop._make_closure = make_closure  # type: ignore[method-assign]
    return lambda: vars(loop).pop("_make_closure", None)


def wrap_train_dataloader(trainer: pl.Trainer, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Make the Trainer take ``wrap(loader)`` wherever it asks for its training data loader.

    The public hooks come when Lightning has derived the length of an epoch from the loader and put a sampler into it.

    Returns:
        A function that undoes this.
    """
    source = trainer.fit_loop._data_source
    dataloader = source.dataloader
    source.dataloader = lambda: wrap(dataloader())  # type: ignore[method-assign]
    return lambda: vars(source).pop("dataloader", None)


def forget_loader_state(checkpoint: dict[str, Any]) -> None:
    """Remove the state of the training data loader, with which only the same kind of loader could resume."""
    checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).pop("combined_loader", None)


def has_no_optimizer(trainer: pl.Trainer) -> bool:
    """Return whether ``configure_optimizers`` returned None, for which Lightning puts an optimizer of its own."""
    return not trainer.optimizers or is_called(trainer.optimizers[0], "_MockOptimizer")


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


def run_hook(trainer: pl.Trainer, name: str, *args: Any) -> None:
    """Call a hook of all callbacks and of the module as Lightning does."""
    call._call_callback_hooks(trainer, name, *args)
    run_module_hook(trainer, name, *args)


def overridden_hooks(trainer: pl.Trainer, names: Iterable[str]) -> set[str]:
    """Return which of these hooks the module or a callback overrides."""
    owners = (trainer.lightning_module, *trainer.callbacks)  # type: ignore[attr-defined]
    return {name for name in names if any(hasattr(o, name) and not _is_default(getattr(o, name)) for o in owners)}


def methods_in_the_way(trainer: pl.Trainer) -> list[str]:
    """Return methods around ``backward`` that a plugin or strategy of the user's own overrides: they are not called."""
    owners = (trainer.precision_plugin, trainer.strategy)
    names = ("pre_backward", "post_backward")
    methods = [getattr(owner, name) for owner in owners for name in names] + [trainer.strategy.backward]
    return [getattr(method, "__qualname__", repr(method)) for method in methods if not is_lightnings(method)]


def is_lightnings(hook: Any) -> bool:
    """Return whether a hook is one that Lightning defines, in either of its packages."""
    return getattr(hook, "__module__", "").startswith(_PACKAGES)


def _is_default(hook: Any) -> bool:
    """Return whether a hook does nothing, or what Lightning does by default."""
    owner = getattr(hook, "__qualname__", "").rpartition(".")[0]
    return owner in _HAVE_EMPTY_HOOKS and is_lightnings(hook)


def before_batch_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """Call ``on_before_batch_transfer`` of the datamodule or the module, whichever Lightning would."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def weigh_logs(trainer: pl.Trainer, weight: float) -> None:
    """Set the weight of what ``self.log`` gets next: Lightning knows only the size of the loader's batch.

    A float, because Lightning's ``sync_dist`` cuts the decimals off a mean of whole numbers.
    """
    results = trainer._results
    if results is not None:
        results.batch_size = float(weight)  # type: ignore[assignment]


def is_logged(trainer: pl.Trainer, name: str) -> bool:
    """Return whether something is logged by this name in this epoch, other than at the end of a batch."""
    results = trainer._results
    for metric in (results or {}).values():
        forks = (f"{metric.meta.name}_step", f"{metric.meta.name}_epoch") if metric.meta.forked else ()
        if name in (metric.meta.name, *forks) and metric.meta.fx != "on_train_batch_end" and not metric.has_reset:
            return True  # those of another epoch are still there, but reset
    return False


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
    return _module_of(trainer.strategy.launcher, "_SubprocessScriptLauncher")


def _module_of(value: Any, class_name: str) -> ModuleType | None:
    """Return the module that defines the class of this name among those of a value."""
    return next((sys.modules[cls.__module__] for cls in type(value).__mro__ if cls.__name__ == class_name), None)


class StepLogs:
    """Makes ``self.log(..., on_step=True)`` show all micro-batches of a step, where Lightning shows the last one.

    Means weigh by samples; sums, minima and maxima run over all micro-batches; a torchmetrics object shows what it
    would have computed of all of them. What ``sync_dist`` asks for is done once a step, over all micro-batches of all
    ranks, instead of at each (but for the first that a value is logged in).
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._before: dict[str, Any] = {}
        self._seen: dict[str, list[tuple[Tensor, float]]] = {}
        self._syncs: dict[str, tuple[Any, Any]] = {}
        self._kept: dict[str, Tensor] | None = None
        self._kept_metrics: list[tuple[Metric, dict[str, Any], int]] = []
        self._copies: dict[int, _OfOneStep] = {}  # of torchmetrics objects, by their id
        self._has_begun = False

    def begin(self) -> None:
        """Put the values of the step before aside."""
        self.cancel()
        if not self._has_begun:
            self._has_begun = True
            metrics = [m for m in self._trainer.lightning_module.modules() if isinstance(m, Metric)]
            self._copies = {id(metric): _OfOneStep(metric) for metric in metrics}
        for copied in self._copies.values():
            copied.reset()
        self._seen, self._before = {}, {}
        for key, metric in self._metrics():
            self._before[key], metric._forward_cache = metric._forward_cache, None
            self._defer(key, metric)

    def put_aside(self) -> None:
        """Remember the sums of the epoch, before a micro-batch that does not count."""
        self._kept = {key: metric.value for key, metric in self._tensors()}
        metrics = [metric for metric in self._trainer.lightning_module.modules() if isinstance(metric, Metric)]
        self._kept_metrics = [(metric, metric._copy_state_dict(), metric._update_count) for metric in metrics]
        for copied in self._copies.values():
            copied.is_counting = False

    def take(self, weight: float) -> None:
        """Collect what a micro-batch logged; of one that does not count leave out what is not finite."""
        kept, self._kept = self._kept, None
        if kept is not None:
            for key, metric in self._tensors():
                if not metric.value.isfinite():  # its size stays: it has grown by nearly nothing, and is a float now
                    metric.value = kept.get(key, torch.full_like(metric.value, _neutral(metric.meta)))
            for metric, state, count in self._kept_metrics:
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count, metric._computed = count, None
            for copied in self._copies.values():
                copied.is_counting = True
            self._kept_metrics = []
        for key, metric in self._metrics():
            if metric._forward_cache is not None:
                value, metric._forward_cache = metric._forward_cache, None
                if key not in self._syncs and metric.meta.sync.should and metric.meta.is_sum_reduction:
                    value = value / self._trainer.world_size  # self.log has added up the ranks when it made the metric
                if kept is not None and not value.isfinite():  # seen all the same, as other ranks may wait for it
                    nothing = torch.full_like(value, _neutral(metric.meta))
                    self._seen.setdefault(key, []).append((nothing, 0.0))
                else:
                    self._seen.setdefault(key, []).append((value, weight))
            self._defer(key, metric)

    def end(self) -> None:
        """Show the step's values, and the old ones of what was not logged."""
        self.cancel()
        for key, metric in self._metrics():
            if key in self._seen:
                metric._forward_cache = _merged(metric.meta, self._seen[key])
            elif metric._forward_cache is None:
                metric._forward_cache = self._before.get(key)
        for metric in list((self._trainer._results or {}).values()) if self._copies else ():
            if not metric.is_tensor and (copied := self._copies.get(id(metric.value))):
                if metric.meta.on_step:
                    metric._forward_cache = copied.show()
                else:
                    copied.remove()
                    del self._copies[id(metric.value)]
        for copied in self._copies.values():
            copied.show()  # to hooks that log it later

    def cancel(self) -> None:
        """Let Lightning synchronize again."""
        for metric, function in self._syncs.values():
            metric.meta.sync._fn = function  # looked up again: self.log copies a metric's meta
        self._syncs = {}

    def close(self) -> None:
        """Leave the torchmetrics objects as they were."""
        self.cancel()
        for copied in self._copies.values():
            copied.remove()
        self._copies, self._has_begun = {}, False

    def _defer(self, key: str, metric: Any) -> None:
        sync = metric.meta.sync
        if sync.should and key not in self._syncs:
            self._syncs[key] = metric, sync._fn
            sync._fn = sync.no_op

    def _metrics(self) -> list[tuple[str, Any]]:
        return [(key, metric) for key, metric in self._tensors() if metric.meta.on_step]

    def _tensors(self) -> list[tuple[str, Any]]:
        results = self._trainer._results
        return [
            (key, metric)
            for key, metric in (results.items() if results else ())
            if metric.is_tensor and metric.meta.fx == "training_step"
        ]


class _OfOneStep:
    """A copy of a torchmetrics object, which gets what that gets, but of one step only."""

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
        """Show the value of this rank's micro-batches, or of all ranks' with ``dist_sync_on_step``, to ``self.log``."""
        if self._has_seen:
            self._has_seen = False
            synced = self._metric.dist_sync_on_step
            # the method of the class, because that of the object synchronizes
            self._metric._forward_cache = self._copy.compute() if synced else type(self._copy).compute(self._copy)
        return self._metric._forward_cache

    def remove(self) -> None:
        self._handle.remove()


def _neutral(meta: Any) -> float:
    """Return what changes no mean, sum, maximum or minimum."""
    return -torch.inf if meta.is_max_reduction else torch.inf if meta.is_min_reduction else 0.0


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
