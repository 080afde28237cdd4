"""The Lightning callback for full-batch training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rprop._lightning import (
    attributes_of,
    callbacks_called,
    forget_loader_state,
    overridden_backward_methods,
    replace_closure,
    wrap_train_dataloader,
)
from lightning_rprop._ranks import check_agreement, compare
from lightning_rprop.full_batch._evaluation import Evaluation
from lightning_rprop.full_batch._fit import Fit
from lightning_rprop.full_batch._samplers import in_order
from lightning_rprop.full_batch.loader import FullBatchLoader


class FullBatch(Callback):
    """Makes each optimizer step use the whole data set, exactly, at any micro-batch size and on any number of ranks.

    Needs a ``FullBatchLoader`` as the training data loader (or ``take_over=True``), automatic
    optimization and one optimizer. The optimizer gets the gradient of the mean loss over all samples of all ranks. Each
    sample counts once, however the data are cut, and gradients are synchronized once per evaluation.

    Every call of the optimizer's closure evaluates the whole set and returns the mean loss, the same number on every
    rank. This holds for iRprop+, ``max_iter``, ``torch.optim.LBFGS``, an ``optimizer_step`` that calls the closure
    twice, and an optimizer that is set during the fit (``trainer.optimizers = [...]``).

    training_step runs once per micro-batch. ``self.log`` in it weights by samples, or by ``weight`` if given, over all
    micro-batches of a step (``on_step``) and of an epoch (``on_epoch``). Other hooks run once per evaluation:
    ``on_before_zero_grad``, ``on_before_backward`` (with the loss of the first micro-batch), ``on_after_backward``,
    ``on_before_optimizer_step`` and ``configure_gradient_clipping``. The last three see the gradient of all samples. A
    hook on a parameter (``Tensor.register_hook``) sees the scaled gradient of each micro-batch.

    After an exception or Ctrl-C, parameters, buffers and optimizer state are those of a whole number of steps (with
    DeepSpeed only the buffers), and the loader and the optimizer are as they were before the fit. Each step therefore
    begins by copying parameters, optimizer state and buffers into memory that is reused.

    If the loss becomes NaN or infinite, a ``lightning_rprop.Rprop`` takes back its last move, unless it has
    ``retreat=False``. FullBatch warns about the first such step, and stops the fit after 10 in a row; of several
    members all must have such a loss. On an accelerator it looks at the losses every 10 evaluations.

    For a ``Stacked``, training_step returns ``{"loss": losses.sum(), "member_losses": losses}``.
    The losses of the members, of shape ``(n,)``, are averaged like the loss. They replace it for a
    ``Rprop``, whose closure then returns them, and for ``KeepBest``. ``outputs`` of
    ``on_train_batch_end`` holds both. A member whose loss is NaN does not disturb the others.

    Args:
        reduction: How training_step reduces the loss over its samples: ``"mean"`` or ``"sum"``.
        weight: Returns the weight of a micro-batch if that is not its number of samples (tokens, entries of a mask). It
            is called with each micro-batch before the transfer to the device, and returns a number or a one-element
            tensor. With ``reduction="mean"`` the losses are averaged with these weights. A micro-batch of weight 0 is
            left out of loss, gradient and logs, even if its loss is NaN.
        log_as: The name under which to log the loss, once per step; ``None`` does not log it. Of several members,
            ``<log_as>/min``, ``<log_as>/median`` and ``<log_as>/max`` are logged instead. NaN counts as the worst loss:
            ``inf``, or ``-inf`` with ``maximize=True`` of the optimizer.
        prog_bar: Whether to show the logged loss in the progress bar.
        take_over: Whether to wrap the Trainer's training DataLoader in a FullBatchLoader, for packages that build the
            DataLoader themselves. Its batches become the micro-batches, and an epoch is one step. A shuffling sampler
            is replaced by a sequential one, with a warning.

    Raises:
        ValueError: If an argument has an invalid value.
        MisconfigurationException: At the start of ``fit``, if the Trainer accumulates gradients, the module optimizes
            manually or has no optimizer or several, the training data do not come from a FullBatchLoader, or
            DeepSpeed clips gradients; in the first step, if the module logs something under the name ``log_as``, or
            the Trainer clips the gradient norm of several members.
        ValueError: At the start of ``fit``, if shapes, hyperparameters or data differ between the ranks. In a step, if
            ``member_losses`` has another shape than ``(n,)``, or not the same n in every micro-batch and on every rank.
        TypeError: If the loss or ``member_losses`` is not a tensor.
        RuntimeError: If the loss is not finite at the first evaluation, unless an Rprop has ``retreat=False``; or if an
            Rprop has taken back its last move in 10 evaluations in a row, without reaching a finite loss.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FullBatch(log_as="train/loss")], logger=False)

    Lightning's own accumulation gives all micro-batches the same weight, including a short last one, and its sampler
    repeats samples so that all ranks get the same number (lightning issues 19987, 2199).
    """

    def __init__(
        self,
        reduction: Literal["mean", "sum"] = "mean",
        weight: Callable[[Any], Any] | None = None,
        log_as: str | None = None,
        prog_bar: bool = False,
        take_over: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if weight is not None and not callable(weight):
            raise ValueError(f"weight must be a function of a micro-batch, or None, got {weight!r}")
        if log_as is not None and (not isinstance(log_as, str) or not log_as):
            raise ValueError(
                f"log_as must be a name for the logged loss, such as 'train/loss', or None, got {log_as!r}"
            )
        for name, value in (("prog_bar", prog_bar), ("take_over", take_over)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if prog_bar and log_as is None:
            raise ValueError("prog_bar=True shows the logged loss, got log_as=None. Set log_as to a name")
        self.reduction = reduction
        self.weight = weight
        self.log_as = log_as
        self.prog_bar = prog_bar
        self.take_over = take_over
        self._fit: Fit | None = None
        self._cleanup = ExitStack()  # undoes the changes to the Trainer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the configuration, and move this callback in front of all others."""
        if stage != "fit":
            return
        self._close()  # in case an earlier fit ended without teardown
        self._check(trainer, pl_module)
        check_agreement(trainer)
        # a new list, because Lightning is iterating over the old one; first, so that the others see a complete step
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]
        if self.take_over:
            self._cleanup.callback(wrap_train_dataloader(trainer, _wrapped))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the hyperparameters agree between the ranks."""
        check_agreement(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the loader and the optimizer, and replace Lightning's closure."""
        loader = _find_loader(trainer)
        self._cleanup.callback(loader._release)
        self._share(trainer, loader)
        evaluation = Evaluation(trainer, pl_module, loader, self.reduction, self.weight)
        self._cleanup.callback(evaluation.close)
        if evaluation.engine is not None and (clip := evaluation.engine.gradient_clipping()):
            raise MisconfigurationException(
                "DeepSpeed clips gradients before FullBatch has scaled them to those of the mean loss, but "
                f"gradient_clip_val is {clip}: leave it None. Rprop uses only the signs, which clipping does not change"
            )
        self._fit = Fit(evaluation, self.log_as)
        self._cleanup.callback(self._fit.close)
        self._fit.follow_optimizer()
        self._cleanup.callback(replace_closure(trainer, self._fit.evaluate))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to a new loader, which ``reload_dataloaders_every_n_epochs`` may have created."""
        if self._fit is None:
            return
        self._fit.start_epoch()
        evaluation = self._fit.evaluation
        if trainer.train_dataloader is not evaluation.loader:
            evaluation.loader._release()
            loader = _find_loader(trainer)
            self._share(trainer, loader)
            evaluation.attach(loader)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step."""
        if self._fit is not None:
            self._fit.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step and log its loss."""
        if self._fit is None:
            return
        losses = self._fit.end()
        if outputs is not None:
            outputs.update(losses)  # for the other callbacks and the module
        for name, value in self._fit.values_to_log(losses).items():
            pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=self.prog_bar, batch_size=1)
        self._fit.interrupts.release()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a step that the module's ``on_train_batch_start`` has skipped."""
        if self._fit is not None:
            self._fit.skip()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the losses that are still on the accelerator."""
        if self._fit is not None:
            self._fit.bad_losses.read()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remove the loader's state, so that the run can resume with any training data loader."""
        forget_loader_state(checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo an incomplete step before another callback saves it. Lightning calls no ``teardown`` in this case."""
        try:
            if self._fit is not None:
                self._fit.undo()
        finally:
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizer and the loader as they were, and drop all references to the module."""
        self._close()
        self.__dict__ = self.__getstate__()

    def _listen(self, listener: Callable[[Tensor, int], None]) -> None:
        """Call a function after each evaluation of this fit, while the weights are still those of the loss.

        Args:
            listener: Takes the loss, or the losses of several members, and the number of optimizer steps before.
        """
        if self._fit is not None:
            self._fit.listeners.append(listener)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which takes no part in a running fit."""
        return attributes_of(self) | {"_fit": None, "_cleanup": ExitStack()}

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise an error for settings under which a step would not be one over the whole data set."""
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "FullBatch uses all samples in one step, but accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}: leave it at 1. To save memory, use "
                "FullBatchLoader(micro_batch_size=...)"
            )
        if callbacks_called(trainer, "GradientAccumulationScheduler"):
            raise MisconfigurationException(
                "FullBatch uses all samples in one step: remove the GradientAccumulationScheduler"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "FullBatch needs automatic optimization, but the module has automatic_optimization=False. Return the "
                "loss from training_step; or remove FullBatch, keep the FullBatchLoader in the module, pass "
                "train_dataloaders=range(steps), and iterate over loader.micro_batches() in training_step"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "FullBatch calls training_step with each micro-batch, but it takes dataloader_iter: take a batch"
            )
        if trainer.strategy.handles_gradient_accumulation and not hasattr(trainer.strategy, "deepspeed_engine"):
            raise MisconfigurationException(
                f"FullBatch does not support {type(trainer.strategy).__name__}, which scales gradients itself. Use "
                "strategy='ddp'"
            )
        if skipped := overridden_backward_methods(trainer):
            raise MisconfigurationException(
                f"FullBatch calls precision_plugin.backward() for each micro-batch, and so not {', '.join(skipped)}: "
                "override backward() of the module or of the precision plugin instead"
            )
        is_limited = trainer.overfit_batches or trainer.limit_train_batches != 1.0  # type: ignore[attr-defined]
        if self.take_over and is_limited and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "FullBatch(take_over=True) uses all batches in one step, but overfit_batches or limit_train_batches "
                "ask for some of them. Remove these, or use a DataLoader with fewer samples"
            )
        if len(callbacks_called(trainer, "FullBatch")) > 1:
            raise MisconfigurationException("FullBatch is among the callbacks more than once: leave one")

    def _share(self, trainer: pl.Trainer, loader: FullBatchLoader) -> None:
        """Take this rank's share of the data, after checking that all ranks have the same data."""
        if trainer.world_size > 1:
            values = {
                "FullBatch's reduction": self.reduction,
                "whether FullBatch has a weight": str(self.weight is not None),
                **loader._fingerprint(),
            }
            compare(
                trainer,
                values,
                "the ranks have different data: {}. Give every rank the whole set, in the same order (seed a random "
                "split); FullBatchLoader splits it",
            )
        share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        loader.share(**share, device=trainer.strategy.root_device, convert=trainer.precision_plugin.convert_input)

    def _close(self) -> None:
        self._fit = None
        self._cleanup.close()


def _wrapped(loader: Any) -> FullBatchLoader:
    """Wrap the DataLoader that the Trainer would train with."""
    if isinstance(loader, FullBatchLoader):
        return loader
    if isinstance(loader, DataLoader):
        ordered = in_order(loader)
        if ordered is not loader:
            rank_zero_warn(
                "FullBatch(take_over=True) reads the training DataLoader in order instead of shuffling it. A step over "
                "all samples is the same in any order, except for rounding"
            )
        return FullBatchLoader(ordered)
    raise MisconfigurationException(
        f"FullBatch(take_over=True) takes over one DataLoader, got {type(loader).__name__}: give the Trainer one "
        "DataLoader, or a FullBatchLoader"
    )


def _find_loader(trainer: pl.Trainer) -> FullBatchLoader:
    """Return the Trainer's training data loader, which must be a FullBatchLoader used for training only."""
    loader = trainer.train_dataloader
    if not isinstance(loader, FullBatchLoader):
        raise MisconfigurationException(
            f"FullBatch needs a FullBatchLoader as the training data loader, got {type(loader).__name__}: wrap the "
            "data, as in FullBatchLoader(TensorDataset(x, y)) or FullBatchLoader(DataLoader(...)). If another package "
            "builds the DataLoader, use FullBatch(take_over=True)"
        )
    others = trainer.val_dataloaders
    if any(other is loader for other in (others if isinstance(others, list | tuple) else [others])):
        raise MisconfigurationException(
            "the training data loader is also a validation data loader. Use another FullBatchLoader for the validation"
        )
    return loader
