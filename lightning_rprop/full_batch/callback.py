"""The Lightning side of full-batch training: when a step begins and ends, and what is undone if it breaks off."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_rprop._lightning import (
    evaluate_by,
    forget_loader_state,
    has_no_optimizer,
    innermost,
    is_called,
    is_logged,
    methods_in_the_way,
    wrap_train_dataloader,
)
from lightning_rprop._ranks import check_agreement, compare
from lightning_rprop.full_batch._atomic_step import Buffers, Interrupts, Snapshot
from lightning_rprop.full_batch._evaluation import Evaluation
from lightning_rprop.full_batch._samplers import in_order
from lightning_rprop.full_batch._warnings import warn_of_dropout, warn_of_micro_batches
from lightning_rprop.full_batch.loader import FullBatchLoader


class FullBatch(Callback):
    """Make each optimizer step one over the whole data set: exact at any micro-batch size, on any number of ranks.

    Needs a :class:`~lightning_rprop.FullBatchLoader` as the training data loader (or ``take_over=True``), automatic
    optimization and one optimizer. The gradient at the optimizer's step is that of the mean loss over all samples of
    all ranks: each sample counts once, however the samples are cut, and gradients are synchronized once per evaluation.
    The optimizer's closure returns that mean loss, the same number on every rank. Each call of the closure evaluates
    the whole set, whoever makes it: iRprop+, ``max_iter``, ``torch.optim.LBFGS``, an ``optimizer_step`` that calls it
    twice, or an optimizer that is set during the fit (``trainer.optimizers = [...]``).

    training_step runs once for each micro-batch. ``self.log`` in it weighs by samples, or by ``weight`` if that is
    given, over all micro-batches of a step (``on_step``) and an epoch (``on_epoch``). Other hooks run once per
    evaluation: ``on_before_zero_grad``, ``on_before_backward`` (with the loss of the first micro-batch),
    ``on_after_backward``, ``on_before_optimizer_step`` and ``configure_gradient_clipping``, the last three with the
    gradient of all samples. A hook on a parameter (``Tensor.register_hook``) gets the part of each micro-batch, scaled.

    An exception or Ctrl-C leaves weights, buffers and optimizer as they were before the step, or as they are after it
    (with DeepSpeed only the buffers), and the loader and the optimizer as they were before the fit. For that a step
    begins with a copy of parameters, optimizer state and buffers, whose memory serves at all steps.

    Args:
        reduction: What the loss that training_step returns is of its samples: their ``"mean"``, or their ``"sum"``.
        weight: Gives what a micro-batch counts where that is not the number of its samples (tokens, entries of a mask):
            called with each micro-batch before it is moved to the device, returns a number or a tensor of one element.
            With ``reduction="mean"`` the loss is a mean over that, and the full batch's the mean over all of it. A
            micro-batch of weight 0 has no part in loss, gradient and logs, even if its loss is NaN.
        log_as: Log the loss of each step by this name, once a step; ``None`` does not.
        prog_bar: Whether to show that in the progress bar.
        take_over: Whether to replace the Trainer's training DataLoader by a FullBatchLoader around it, for packages
            that build the DataLoader themselves. Its batches are the micro-batches, and an epoch is one step. A sampler
            that shuffles is replaced by one that does not, with a warning.

    Raises:
        ValueError: If an argument is not one of its choices.
        MisconfigurationException: At the start of ``fit``, if the Trainer accumulates gradients, the module optimizes
            manually or has several optimizers or none, the training data do not come from a FullBatchLoader, or
            DeepSpeed is to clip gradients; at the first step, if something else is logged as ``log_as``.
        ValueError: At the start of ``fit``, if shapes, hyperparameters or data differ between the ranks.

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
        take_over: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if weight is not None and not callable(weight):
            raise ValueError(f"weight must be a function of a micro-batch, or None, got {weight!r}")
        if log_as is not None and (not isinstance(log_as, str) or not log_as):
            raise ValueError(
                f"log_as must be the name to log the loss by, such as 'train/loss', or None, got {log_as!r}"
            )
        for name, value in (("prog_bar", prog_bar), ("take_over", take_over)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if prog_bar and log_as is None:
            raise ValueError("prog_bar=True shows the logged loss, got log_as=None: give it a name")
        self.reduction = reduction
        self.weight = weight
        self.log_as = log_as
        self.prog_bar = prog_bar
        self.take_over = take_over
        self._fit: _Fit | None = None
        self._put_back = ExitStack()  # what undoes changes of the Trainer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be right, and come before all other callbacks."""
        if stage != "fit":
            return
        self._close()  # whatever a fit has left that ended in a way of its own
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
                "FullBatch needs automatic optimization, but the module has automatic_optimization=False. Return the "
                "loss from training_step; or leave FullBatch out, keep the FullBatchLoader in the module, give the "
                "Trainer train_dataloaders=range(steps), and iterate over loader.micro_batches() in training_step"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "FullBatch calls training_step with each micro-batch, but it takes dataloader_iter: take a batch"
            )
        if trainer.strategy.handles_gradient_accumulation and not hasattr(trainer.strategy, "deepspeed_engine"):
            raise MisconfigurationException(
                f"FullBatch does not support {type(trainer.strategy).__name__}, which weighs gradients itself: use "
                "strategy='ddp'"
            )
        if skipped := methods_in_the_way(trainer):
            raise MisconfigurationException(
                f"FullBatch calls precision_plugin.backward() for each micro-batch, and so not {', '.join(skipped)}: "
                "override backward() of the module or of the precision plugin instead"
            )
        some = trainer.overfit_batches or trainer.limit_train_batches != 1.0  # type: ignore[attr-defined]
        if self.take_over and some and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "FullBatch(take_over=True) takes all batches in one step, but overfit_batches or limit_train_batches "
                "ask for some of them: leave these out, or give the Trainer a DataLoader of fewer samples"
            )
        check_agreement(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(is_called(callback, "FullBatch") for callback in callbacks) > 1:
            raise MisconfigurationException("FullBatch is among the callbacks more than once: leave one")
        # a new list, because Lightning is iterating over the old one; first, so that the others see a complete step
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]
        if self.take_over:
            self._put_back.callback(wrap_train_dataloader(trainer, _taken_over))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse ranks whose hyperparameters differ."""
        check_agreement(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Serve the loader, and replace the closure that Lightning makes."""
        loader = _find_loader(trainer)
        self._put_back.callback(loader.release)
        self._share(trainer, loader)
        evaluation = Evaluation(trainer, pl_module, loader, self.reduction, self.weight)
        self._put_back.callback(evaluation.close)
        if evaluation.engine is not None and (clip := evaluation.engine.gradient_clipping()):
            raise MisconfigurationException(
                "DeepSpeed clips gradients before FullBatch has made them those of the mean loss, but "
                f"gradient_clip_val is {clip}: leave it None; Rprop looks at signs, which stay the same"
            )
        self._fit = _Fit(evaluation, self.log_as)
        self._put_back.callback(self._fit.close)
        self._fit.follow()
        self._put_back.callback(evaluate_by(trainer, self._fit.evaluate))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take care of the loader that ``reload_dataloaders_every_n_epochs`` made."""
        if self._fit is None:
            return
        self._fit.buffers.look()
        self._fit.evaluation.look_for_hooks()
        if trainer.train_dataloader is not self._fit.evaluation.loader:
            self._fit.evaluation.loader.release()
            loader = _find_loader(trainer)
            self._share(trainer, loader)
            self._fit.evaluation.attach(loader)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step."""
        if self._fit is not None:
            self._fit.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step, and log its loss."""
        if self._fit is None:
            return
        loss = self._fit.end()
        if outputs is not None:
            outputs["loss"] = loss  # the dict that the other callbacks and the module get
        if self.log_as is not None:
            pl_module.log(self.log_as, loss, on_step=True, on_epoch=False, prog_bar=self.prog_bar, batch_size=1)
        self._fit.interrupts.release()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a step that the module's ``on_train_batch_start`` has called off."""
        if self._fit is not None:
            self._fit.step = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the checkpoint be continued with any training data loader: each step of ours is the same pass."""
        forget_loader_state(checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo what was made of a step, before another callback saves it; Lightning calls no ``teardown`` then."""
        try:
            if self._fit is not None:
                self._fit.undo()
        finally:
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave optimizer and loader as they were, and hold nothing of the module."""
        self._close()
        self.__dict__ = self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which takes no part in a fit that runs."""
        # Lightning sets these two on every callback, bound to the module
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return kept | {"_fit": None, "_put_back": ExitStack()}

    def _share(self, trainer: pl.Trainer, loader: FullBatchLoader) -> None:
        """Take this rank's share of the data, which must be the same on all ranks."""
        if trainer.world_size > 1:
            mine = {
                "FullBatch's reduction": self.reduction,
                "whether FullBatch has a weight": str(self.weight is not None),
                **loader.fingerprint(),
            }
            compare(
                trainer,
                mine,
                "the ranks have different data: {}. Give every rank the whole set, in the same order (seed a random "
                "split), which FullBatchLoader shares out",
            )
        share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        loader.share(**share, device=trainer.strategy.root_device, convert=trainer.precision_plugin.convert_input)

    def _close(self) -> None:
        self._fit = None
        self._put_back.close()


class _Fit:
    """What FullBatch has while a Trainer fits."""

    def __init__(self, evaluation: Evaluation, log_as: str | None) -> None:
        self.evaluation = evaluation
        self.trainer = evaluation.trainer
        self.log_as = log_as
        self.interrupts = Interrupts()
        self.buffers = Buffers(evaluation.pl_module)
        self.snapshot = Snapshot()
        self.scale: dict[str, Any] | None = None  # of a GradScaler
        self.optimizer: Any = None
        self.inside: Any = None  # which makes the moves of the optimizer
        self.loss: Tensor | None = None  # that the step began with
        self.step: int | None = None  # Lightning's count before the step that has begun
        self.has_stepped = False
        self.looks_for_noise = True
        self.take_loss: list[Any] = []
        self.unserve: list[Callable[[], None]] = []

    def follow(self) -> bool:
        """Take care of the Trainer's optimizer; return whether it is another one than before."""
        if [*map(id, self.trainer.optimizers)] == [id(self.optimizer)]:
            return False
        self.serve()
        return True

    def serve(self) -> None:
        if len(self.trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"FullBatch needs one optimizer, but the Trainer has {len(self.trainer.optimizers)}: give the "
                "parameters to one, in groups with options of their own"
            )
        if has_no_optimizer(self.trainer):
            raise MisconfigurationException(
                "FullBatch needs an optimizer, but configure_optimizers returned None: return one, such as "
                "lightning_rprop.Rprop(self.parameters())"
            )
        optimizer = self.trainer.optimizers[0]
        inside = innermost(optimizer)
        if not isinstance(inside, Optimizer):
            raise MisconfigurationException(f"FullBatch needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.leave()
        self.optimizer, self.inside = optimizer, inside
        # the one inside takes a loss where one that wraps it does not; DeepSpeed's has no hooks either
        hooked = [each for each in {optimizer, inside} if isinstance(each, Optimizer)]
        self.take_loss = [each for each in hooked if "loss" in inspect.signature(type(each).step).parameters]
        for each in hooked:
            self.unserve.append(each.register_step_pre_hook(self.before_step).remove)
        if hasattr(inside, "shared_loss"):
            shared = inside.shared_loss
            self.unserve.append(lambda: setattr(inside, "shared_loss", shared))
            inside.shared_loss = True

    def leave(self) -> None:
        while self.unserve:
            self.unserve.pop()()

    def begin(self) -> None:
        self.loss = None
        self.step = None
        self.follow()
        # a lazy module's first evaluation draws its parameters
        if self.looks_for_noise and not any(map(is_lazy, self.evaluation.pl_module.parameters())):
            self.looks_for_noise = False
            self.evaluation.checks_randomness = not warn_of_dropout(self.evaluation.pl_module)
        self.evaluation.begin()
        self.take_copies()
        self.step = self.trainer.global_step

    def take_copies(self) -> None:
        self.buffers.take()
        self.scale = None if self.evaluation.scaler is None else self.evaluation.scaler.state_dict()
        if self.evaluation.engine is None:  # DeepSpeed keeps what moves to itself
            self.snapshot.take(self.optimizer, self.inside)

    def evaluate(self, arguments: tuple[Any, ...], batch_idx: int, backward: bool) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the whole set, for whoever calls Lightning's closure."""
        self.interrupts.release()
        if self.follow() and self.loss is None:
            self.take_copies()
        loss, extra = self.evaluation.run(arguments, batch_idx, backward)
        if self.log_as is not None and is_logged(self.trainer, self.log_as):
            raise MisconfigurationException(
                f"FullBatch(log_as={self.log_as!r}) logs the loss of all samples by a name that the module logs too: "
                "one would hide the other. Choose another name, or leave out one of the two"
            )
        if not self.has_stepped:
            self.has_stepped = True
            if not self.evaluation.alone:
                warn_of_micro_batches(self.evaluation.pl_module)
        if self.loss is None:
            self.loss = loss
        self.interrupts.hold()
        return loss, extra

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass the loss to a step without a closure (as under a GradScaler) that takes one."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if optimizer in self.take_loss and "loss" not in kwargs and self.evaluation.loss is not None:
                kwargs = {**kwargs, "loss": self.evaluation.loss}
            if self.evaluation.engine is not None:
                self.evaluation.bring_to_mean(optimizer)
        return args, kwargs

    def end(self) -> Tensor:
        """End a step, and return the loss that it began with."""
        assert self.loss is not None  # Lightning refuses an optimizer_step that does not call its closure
        self.step = None
        return self.loss

    def undo(self) -> None:
        if self.step is not None and self.trainer.global_step == self.step:  # else the step is made, and counted
            self.snapshot.restore()
            self.buffers.restore()
            if self.evaluation.scaler is not None and self.scale:
                self.evaluation.scaler.load_state_dict(self.scale)
        self.step = None

    def close(self) -> None:
        self.leave()
        self.evaluation.loader.release()
        self.interrupts.release(deliver=False)


def _taken_over(loader: Any) -> Any:
    """Wrap a DataLoader that the Trainer would train with."""
    if isinstance(loader, FullBatchLoader):
        return loader
    if isinstance(loader, DataLoader):
        ordered = in_order(loader)
        if ordered is not loader:
            rank_zero_warn(
                "FullBatch(take_over=True) reads the training DataLoader in order, where it would shuffle: a step over "
                "all samples is the same in any order, but for its rounding"
            )
        return FullBatchLoader(ordered)
    raise MisconfigurationException(
        f"FullBatch(take_over=True) takes over one DataLoader, got {type(loader).__name__}: give the Trainer one "
        "DataLoader, or a FullBatchLoader"
    )


def _find_loader(trainer: pl.Trainer) -> FullBatchLoader:
    """Return the Trainer's training data loader, if it is the right one."""
    loader = trainer.train_dataloader
    if not isinstance(loader, FullBatchLoader):
        raise MisconfigurationException(
            f"FullBatch needs a FullBatchLoader as the training data loader, got {type(loader).__name__}: wrap the "
            "data, as in FullBatchLoader(TensorDataset(x, y)) or FullBatchLoader(DataLoader(...)); where another "
            "package makes the DataLoader use FullBatch(take_over=True)"
        )
    others = trainer.val_dataloaders
    if any(other is loader for other in (others if isinstance(others, list | tuple) else [others])):
        raise MisconfigurationException(
            "the training data loader is a validation data loader too: make another FullBatchLoader for the validation"
        )
    return loader
