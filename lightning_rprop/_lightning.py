"""The private Lightning names that this package uses, with the reason for each; for logs, see ``_lightning_logs.py``.

``test_lightning_private.py`` names the Lightning releases for which they hold. All other modules use public API only.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer import call
from torch import Tensor
from torch.optim import Optimizer

# Lightning classes whose hooks are no-ops or Lightning's default behavior.
_DEFAULT_OWNERS = frozenset({"Callback", "ModelHooks", "LightningModule"})
_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")

# Attributes in which Lightning, DeepSpeed and torch's ZeroRedundancyOptimizer keep the optimizer that they wrap.
_WRAPPED = ("_optimizer", "optimizer", "optim")


def is_called(value: Any, name: str) -> bool:
    """Return whether the value's class or a base class has this name.

    isinstance() by class name, because ``lightning`` and ``pytorch_lightning`` define separate classes.
    """
    return any(cls.__name__ == name for cls in type(value).__mro__)


def callbacks_called(trainer: pl.Trainer, name: str) -> list[Any]:
    """Return the Trainer's callbacks whose class or a base class has this name."""
    return [callback for callback in trainer.callbacks if is_called(callback, name)]  # type: ignore[attr-defined]


def attributes_of(callback: Any) -> dict[str, Any]:
    """Return a callback's attributes without the two that Lightning sets and that refer to the module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


def innermost(optimizer: Any) -> Any:
    """Return the innermost wrapped optimizer, which updates the parameters, or the optimizer itself."""
    while inside := [vars(optimizer)[name] for name in _WRAPPED if isinstance(vars(optimizer).get(name), Optimizer)]:
        optimizer = inside[0]
    return optimizer


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step number under which Lightning logs this batch.

    Only this number is right with gradient accumulation and several optimizers; Lightning's own monitors read it too.
    ``trainer.global_step`` counts from one and adds up the steps of all optimizers.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def replace_closure(
    trainer: pl.Trainer, evaluate: Callable[[tuple[Any, ...], int, bool], tuple[Tensor, dict[str, Any]]]
) -> Callable[[], None]:
    """Replace the closure that Lightning passes to ``optimizer_step`` by one that calls ``evaluate``.

    Lightning's closure evaluates one batch, and there is no hook around it. After the replacement every closure call
    goes to ``evaluate``: from LBFGS, an overridden ``optimizer_step`` or an optimizer that is set during the fit.

    Args:
        trainer: The Trainer, during a fit.
        evaluate: Called with the arguments of training_step, the batch index, and whether to compute gradients
            (StochasticWeightAveraging turns them off). Returns the loss and the other outputs of training_step.

    Returns:
        A function that restores Lightning's closure.
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
    """Make the Trainer use ``wrap(loader)`` as its training data loader.

    The public hooks run too late: Lightning has then read the epoch's length and inserted its own sampler.

    Returns:
        A function that undoes this.
    """
    source = trainer.fit_loop._data_source
    dataloader = source.dataloader
    source.dataloader = lambda: wrap(dataloader())  # type: ignore[method-assign]
    return lambda: vars(source).pop("dataloader", None)


def forget_loader_state(checkpoint: dict[str, Any]) -> None:
    """Remove the state of the training data loader, so that the run can resume with another kind of loader."""
    checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).pop("combined_loader", None)


def has_no_optimizer(trainer: pl.Trainer) -> bool:
    """Return whether ``configure_optimizers`` returned None, which Lightning replaces by a dummy optimizer."""
    return not trainer.optimizers or is_called(trainer.optimizers[0], "_MockOptimizer")


def run_training_step(trainer: pl.Trainer, *args: Any) -> Any:
    """Run training_step as Lightning does, under the profiler and with ``self.log`` set up for the hook."""
    # whenever the hook changes in an epoch's first batch, self.log drops what the new hook has logged so far
    trainer._logger_connector._current_fx = "training_step"
    output: Any = call._call_strategy_hook(trainer, "training_step", *args)
    return output


def run_module_hook(trainer: pl.Trainer, name: str, *args: Any, **kwargs: Any) -> None:
    """Call a hook of the module as Lightning does, under the profiler and with ``self.log`` set up for the hook."""
    call._call_lightning_module_hook(trainer, name, *args, **kwargs)


def run_hook(trainer: pl.Trainer, name: str, *args: Any) -> None:
    """Call a hook of all callbacks and of the module, as Lightning does."""
    call._call_callback_hooks(trainer, name, *args)
    run_module_hook(trainer, name, *args)


def overridden_hooks(trainer: pl.Trainer, names: Iterable[str]) -> set[str]:
    """Return which of these hooks the module or a callback overrides."""
    owners = (trainer.lightning_module, *trainer.callbacks)  # type: ignore[attr-defined]
    return {name for name in names if any(hasattr(o, name) and not _is_default(getattr(o, name)) for o in owners)}


def overridden_backward_methods(trainer: pl.Trainer) -> list[str]:
    """Return the methods around ``backward`` that the user's plugin or strategy overrides; FullBatch skips these."""
    owners = (trainer.precision_plugin, trainer.strategy)
    names = ("pre_backward", "post_backward")
    methods = [getattr(owner, name) for owner in owners for name in names] + [trainer.strategy.backward]
    return [getattr(method, "__qualname__", repr(method)) for method in methods if not is_from_lightning(method)]


def is_from_lightning(hook: Any) -> bool:
    """Return whether a hook is defined by ``lightning`` or ``pytorch_lightning``."""
    return getattr(hook, "__module__", "").startswith(_PACKAGES)


def _is_default(hook: Any) -> bool:
    """Return whether a hook is a no-op or Lightning's default."""
    owner = getattr(hook, "__qualname__", "").rpartition(".")[0]
    return owner in _DEFAULT_OWNERS and is_from_lightning(hook)


def before_batch_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """Call ``on_before_batch_transfer`` of the datamodule or the module, whichever Lightning would call."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def starts_scripts(trainer: pl.Trainer) -> bool:
    """Return whether the strategy starts the other ranks by running the script again (``ddp``, ``fsdp``, ...)."""
    return _script_launcher(trainer) is not None


def starts_ranks(trainer: pl.Trainer) -> bool:
    """Return whether Lightning starts the other ranks itself, rather than torchrun or SLURM."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and not environment.creates_processes_externally


@contextmanager
def start_ranks_by(
    trainer: pl.Trainer,
    start: Callable[[int, dict[str, str]], subprocess.Popen[bytes]],
    watch: Callable[[list[subprocess.Popen[bytes]]], None],
) -> Iterator[None]:
    """Make the script launcher start local rank ``r`` with ``start(r, environment)``, then call ``watch(processes)``.

    Lightning's own command would rerun the whole Hydra sweep in each rank (Lightning issues 11300 and 18175). Its
    observer would kill this process, and so the sweep, when a rank fails. Both are names in the launcher's module.
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
    """Return the module of the script launcher, from the same package (``pytorch_lightning`` too) as the Trainer."""
    return _module_of(trainer.strategy.launcher, "_SubprocessScriptLauncher")


def _module_of(value: Any, class_name: str) -> ModuleType | None:
    """Return the module that defines the named class among the value's classes."""
    return next((sys.modules[cls.__module__] for cls in type(value).__mro__ if cls.__name__ == class_name), None)
