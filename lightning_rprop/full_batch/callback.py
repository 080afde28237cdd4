"""The Lightning side of full-batch training: at which hooks the evaluation runs, and what the optimizer gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from lightning_rprop.agreement import check_agreement
from lightning_rprop.class_name import is_called
from lightning_rprop.full_batch.advice import RandomnessCheck, warn_of_batch_statistics, warn_of_dropout
from lightning_rprop.full_batch.evaluation import Evaluation, no_loss
from lightning_rprop.full_batch.loader import FullBatchLoader
from lightning_rprop.full_batch.whole_step import Buffers, Interrupts, Snapshot
from lightning_rprop.inside import innermost


class FullBatch(Callback):
    """Make each optimizer step one over the whole data set: exact at any micro-batch size, on any number of ranks.

    Wants a :class:`~lightning_rprop.FullBatchLoader` as the training data loader, automatic optimization and one
    optimizer. The gradient at the optimizer's step is that of the mean loss over all samples of all ranks: each sample
    counts once, however the samples are cut, and gradients are synchronized once an evaluation. The optimizer's closure
    returns that mean loss, the same number on every rank; so iRprop+, ``max_iter`` and ``torch.optim.LBFGS`` are right.

    training_step runs once for each micro-batch. ``self.log`` in it weighs by samples, over all micro-batches of a step
    (``on_step``) and an epoch (``on_epoch``). Other callbacks see one batch a step, its first micro-batch, and in
    ``on_after_backward`` the gradient of all. An optimizer that evaluates more than once a step runs training_step,
    ``optimizer_zero_grad``, ``backward`` and the clipping of gradients again, and no other hook.

    An exception or Ctrl-C leaves weights, buffers and optimizer as they were before the step, or as they are after it.

    Args:
        reduction: What the loss that training_step returns is of its samples: their ``"mean"``, or their ``"sum"``.
        weight: Gives what a micro-batch counts where that is not the number of its samples (tokens, entries of a mask):
            called with each micro-batch before it is moved to the device, returns a number or a tensor of one element.
            With ``reduction="mean"`` the loss is a mean over that, and the full batch's the mean over all of it.
        log_as: Log the loss of each step by this name, once a step; ``None`` does not.
        prog_bar: Whether to show that in the progress bar.

    Raises:
        ValueError: If an argument is not one of its choices.
        MisconfigurationException: At the start of ``fit``, if the Trainer accumulates gradients, the module optimizes
            manually or has several optimizers, the training data do not come from a FullBatchLoader, or DeepSpeed is to
            clip gradients.
        ValueError: At the start of ``fit``, if shapes, hyperparameters or numbers of samples differ between the ranks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FullBatch(log_as="train/loss")], logger=False)

    Lightning's own accumulation weighs all micro-batches alike, the ragged last one too, and its sampler repeats
    samples to give all ranks as many (lightning issues 19987, 2199).
    """

    def __init__(
        self,
        reduction: Literal["mean", "sum"] = "mean",
        weight: Callable[[Any], Any] | None = None,
        log_as: str | None = None,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if weight is not None and not callable(weight):
            raise ValueError(f"weight must be a function of a micro-batch, or None, got {weight!r}")
        if prog_bar and log_as is None:
            raise ValueError("prog_bar=True shows the logged loss, got log_as=None: give it a name")
        self.reduction = reduction
        self.weight = weight
        self.log_as = log_as
        self.prog_bar = prog_bar
        self._fit: _Fit | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be right, and come before all other callbacks."""
        if stage != "fit":
            return
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "FullBatch takes all samples in one step, but accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}: leave it at 1; FullBatchLoader(micro_batch_size=...) saves memory"
            )
        if any(is_called(callback, "GradientAccumulationScheduler") for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "FullBatch takes all samples in one step: remove the GradientAccumulationScheduler"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "FullBatch needs automatic optimization, but the module has automatic_optimization=False: return the "
                "loss from training_step, or loop over FullBatchLoader.micro_batches() yourself"
            )
        if trainer.strategy.handles_gradient_accumulation and not hasattr(trainer.strategy, "deepspeed_engine"):
            raise MisconfigurationException(
                f"FullBatch does not support {type(trainer.strategy).__name__}, which weighs gradients itself: use "
                "strategy='ddp'"
            )
        check_agreement(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(is_called(callback, "FullBatch") for callback in callbacks) > 1:
            raise MisconfigurationException("FullBatch is among the callbacks more than once: leave one")
        # a new list, as the old one is being walked through; first, so that others see the gradient of all samples
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse ranks whose hyperparameters differ."""
        check_agreement(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the loader and the optimizer's closure."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"FullBatch needs one optimizer, but configure_optimizers returned {len(trainer.optimizers)}: give the "
                "parameters to one, in groups with options of their own"
            )
        optimizer = trainer.optimizers[0]
        if not isinstance(innermost(optimizer), Optimizer):
            raise MisconfigurationException(f"FullBatch needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
        loader = _take_over(trainer)
        evaluation = Evaluation(trainer, pl_module, optimizer, loader, self.reduction, self.weight)
        if evaluation.engine is not None and (clip := evaluation.engine.gradient_clipping()):
            raise MisconfigurationException(
                "DeepSpeed clips gradients before FullBatch has made them those of the mean loss, but "
                f"gradient_clip_val is {clip}: leave it None; Rprop looks at signs, which stay the same"
            )
        self._fit = _Fit(evaluation, optimizer, warned=warn_of_dropout(pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the loader that ``reload_dataloaders_every_n_epochs`` made."""
        if self._fit is not None and trainer.train_dataloader is not self._fit.evaluation.loader:
            self._fit.evaluation.loader.release()
            self._fit.evaluation.attach(_take_over(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step."""
        if self._fit is not None:
            self._fit.begin(batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Weigh the first micro-batch."""
        if self._fit is not None:
            self._fit.check_randomness()
            self._fit.evaluation.weigh_first(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the other micro-batches: from here on the gradient is that of all samples."""
        if self._fit is not None:
            self._fit.evaluation.finish()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step, and log its loss."""
        if self._fit is None:
            return
        loss = self._fit.end()
        outputs["loss"] = loss  # the dict that the other callbacks and the module get
        if self.log_as is not None:
            pl_module.log(self.log_as, loss, on_step=True, on_epoch=False, prog_bar=self.prog_bar, batch_size=1)
        self._fit.interrupts.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo what was made of a step, before another callback saves it."""
        if self._fit is not None:
            self._fit.undo()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave optimizer and loader as they were."""
        if self._fit is not None:
            self._fit.close()
            self._fit = None


class _Fit:
    """What FullBatch has while a Trainer fits."""

    def __init__(self, evaluation: Evaluation, optimizer: Optimizer, warned: bool) -> None:
        self.evaluation = evaluation
        self.interrupts = Interrupts()
        self.buffers = Buffers(evaluation.pl_module)
        self.snapshot: Snapshot | None = None
        self.loss: Tensor | None = None
        self.evaluations = 0
        self.moves = _max_iter(optimizer)
        self.randomness: RandomnessCheck | None = None
        self.step = -1  # Lightning's count before the one that has begun
        self.warned = warned
        self.wrapped = False  # whether a step with our closure is running
        # the one inside takes a loss where one that wraps it does not; DeepSpeed's has no hooks either
        hooked = [each for each in {optimizer, innermost(optimizer)} if isinstance(each, Optimizer)]
        self.take_loss = [each for each in hooked if "loss" in inspect.signature(type(each).step).parameters]
        self.hooks = [each.register_step_pre_hook(self.before_step) for each in hooked]
        self.hooks += [each.register_step_post_hook(self.after_step) for each in hooked]

    def begin(self, batch_idx: int) -> None:
        self.loss = None
        self.evaluations = 0
        self.wrapped = False
        first, self.step = self.step < 0, self.evaluation.trainer.global_step
        self.buffers.begin()
        self.evaluation.begin(batch_idx)
        if first and not self.evaluation.alone:
            warn_of_batch_statistics(self.evaluation.pl_module)
        if first and not self.warned:
            self.randomness = RandomnessCheck(self.evaluation.trainer.strategy.root_device)

    def check_randomness(self) -> None:
        if self.randomness is not None:
            self.randomness.finish()
            self.randomness = None

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the optimizer a closure that returns the loss of all samples; without a closure, the loss itself."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.wrapped:  # the step of a subclass calls its parent's
            return args, kwargs
        if closure is None:
            if optimizer in self.take_loss and "loss" not in kwargs and self.evaluation.loss is not None:
                kwargs = {**kwargs, "loss": self.evaluation.loss}
            if self.evaluation.engine is not None:
                self.evaluation.bring_to_mean(optimizer)
            self.interrupts.hold()
            return args, kwargs
        self.wrapped = True
        return args[:1], {**kwargs, "closure": lambda: self.evaluate(closure)}

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.wrapped = False

    def evaluate(self, closure: Callable[[], Any]) -> Tensor:
        self.interrupts.release()
        self.evaluations += 1
        if self.evaluations == 1:
            closure()
            self.loss = self.evaluation.loss
            if self.moves > 1:
                self.snapshot = Snapshot(self.evaluation.optimizer)
        else:
            with torch.enable_grad():
                self.evaluation.again()
        loss = self.evaluation.loss
        if loss is None:
            raise RuntimeError(no_loss())
        self.interrupts.hold()
        return loss

    def end(self) -> Tensor:
        """End a step, and return the loss that it began with."""
        loss = self.evaluation.loss if self.loss is None else self.loss
        if loss is None:
            raise RuntimeError(no_loss())
        self.moves = max(_max_iter(self.evaluation.optimizer), self.evaluations)
        self.snapshot = None
        self.buffers.end()
        return loss

    def undo(self) -> None:
        if self.evaluation.trainer.global_step == self.step:  # else the step is made, and counted
            if self.snapshot is not None:
                self.snapshot.restore()
            self.buffers.restore()
        self.snapshot = None
        self.evaluation.abandon()
        self.interrupts.release(deliver=False)

    def close(self) -> None:
        self.evaluation.abandon()
        self.evaluation.loader.release()
        self.interrupts.release(deliver=False)
        for hook in self.hooks:
            hook.remove()


def _take_over(trainer: pl.Trainer) -> FullBatchLoader:
    """Find the loader, and give this rank its share of the data."""
    loader = trainer.train_dataloader
    if not isinstance(loader, FullBatchLoader):
        raise MisconfigurationException(
            f"FullBatch needs a FullBatchLoader as the training data loader, got {type(loader).__name__}: wrap the "
            "data, as in FullBatchLoader(TensorDataset(x, y)) or FullBatchLoader(DataLoader(...))"
        )
    others = trainer.val_dataloaders
    if any(other is loader for other in (others if isinstance(others, list | tuple) else [others])):
        raise MisconfigurationException(
            "the training data loader is a validation data loader too: make another FullBatchLoader for the validation"
        )
    samples = loader.num_samples
    strategy = trainer.strategy
    if samples is not None and trainer.world_size > 1:
        counts = torch.tensor([samples, -samples], device=strategy.root_device)
        most, least = strategy.reduce(counts, reduce_op="max").abs().tolist()
        if most != least:
            raise ValueError(
                f"the ranks have different data: {samples} samples here, {least} to {most} on the others. Give every "
                "rank the whole set, which FullBatchLoader shares out"
            )
    share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    loader.share(**share, device=strategy.root_device, convert=trainer.precision_plugin.convert_input)
    return loader


def _max_iter(optimizer: Optimizer) -> int:
    """How often a step moves, in the optimizers that say so."""
    return int(optimizer.param_groups[0].get("max_iter") or 1)
