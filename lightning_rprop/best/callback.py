"""The Lightning callback that ends a fit with its best weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rprop._lightning import attributes_of, callbacks_called, innermost
from lightning_rprop._lightning_logs import replace_logged
from lightning_rprop.best.weights import BestWeights
from lightning_rprop.optim._sharding import is_slice


class KeepBest(Callback):
    """Keep the weights with the lowest loss of the fit, and restore them at its end.

    Needs ``FullBatch``, which computes the exact loss of the weights. Every evaluation of the
    whole data set counts, also those within a step of ``max_iter`` or ``torch.optim.LBFGS``. With ``maximize=True`` of
    the optimizer, the highest loss is the best. The loss is logged as ``best/loss`` in every step.

    If ``training_step`` returns losses of the members of a ``Stacked`` as ``member_losses``, each
    member ends with its own best weights. ``best/loss`` is then the best of all members.

    The weights are all parameters and buffers of the module. They are restored after the other callbacks have ended:
    after early stopping, ``max_time``, Ctrl-C and other exceptions too. ``last.ckpt`` and other checkpoints therefore
    hold the state from which a run resumes, not the best weights. They hold the best weights so far as well, in the
    state of this callback, and a resumed run ends as if it had not been interrupted, on any number of ranks (with
    DeepSpeed, on the same number). A fit that does not resume from a checkpoint starts without a best loss.

    Args:
        restore: Whether to restore the best weights; ``False`` only finds and logs the best loss.

    Attributes:
        best_loss: The best loss of the fit; ``inf`` before the first (``-inf`` with ``maximize=True``). With members, a
            float64 tensor of shape ``(n,)``.
        best_step: ``trainer.global_step`` when it was evaluated, the number of optimizer steps before; ``None`` before
            the first. With members, an int64 tensor of shape ``(n,)``, in which members without a finite loss have -1.

    Raises:
        ValueError: If ``restore`` is not a bool.
        MisconfigurationException: At the start of ``fit``, if there is no FullBatch or another KeepBest, if only some
            parameter groups have ``maximize=True``, or if the parameters are those of FullyShardedDataParallel
            (version 1).

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_rprop import FullBatch
        >>> trainer = Trainer(callbacks=[FullBatch(), KeepBest()], logger=False)

    ``ModelCheckpoint(monitor="loss")`` cannot do this, because it saves the weights after a step together with the loss
    before it.
    """

    def __init__(self, restore: bool = True) -> None:
        super().__init__()
        if not isinstance(restore, bool):
            raise ValueError(f"restore must be True or False, got {restore!r}")
        self.restore = restore
        self._reset()

    def _reset(self) -> None:
        self._best: BestWeights | None = None  # during a fit
        self._found: tuple[float | Tensor, int | Tensor | None] = math.inf, None  # after it
        self._sign = 1  # of the loss that is minimized
        self._replace: Callable[[Tensor], None] | None = None  # the logged value, once it was logged in this epoch
        self._restored: dict[str, Any] | None = None

    @property
    def best_loss(self) -> float | Tensor:
        """The best loss of the fit, or of each member; reading it during the fit waits for the accelerator."""
        return self._sign * (self._found[0] if self._best is None else self._best.loss)

    @property
    def best_step(self) -> int | Tensor | None:
        """The number of optimizer steps before the best loss, or before that of each member."""
        return self._found[1] if self._best is None else self._best.step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the callbacks, and move this one behind all others."""
        if stage != "fit":
            return
        self._reset()
        if not callbacks_called(trainer, "FullBatch"):
            raise MisconfigurationException(
                "KeepBest needs the exact loss of the weights, which FullBatch computes, but there is no FullBatch "
                "among the callbacks. Add FullBatch() and train with a FullBatchLoader; in other loops, use BestWeights"
            )
        if len(callbacks_called(trainer, "KeepBest")) > 1:
            raise MisconfigurationException("KeepBest is among the callbacks more than once: leave one")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        # a new list, because Lightning is iterating over the old one; last, so that the others save the resumable state
        trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to listen to the evaluations."""
        self._start(trainer, pl_module)
        (full_batch,) = callbacks_called(trainer, "FullBatch")
        full_batch._listen(self._update)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find parameters and submodules that have joined."""
        self._replace = None
        if self._best is not None:
            self._best._find()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the best loss once per epoch; ``_update()`` replaces the value.

        Not in on_train_batch_end, because that of this callback comes after that of ModelCheckpoint.
        """
        if self._best is not None and self._replace is None:
            loss = self._best._loss
            value = self._sign * (loss.min() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64))
            pl_module.log("best/loss", value, on_step=True, on_epoch=False, batch_size=1)
            self._replace = replace_logged(trainer, "on_before_optimizer_step", "best/loss")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the best weights."""
        self._finish()
        if self.restore and self.best_step is None:
            rank_zero_warn("KeepBest restores no weights, because no evaluation gave a finite loss")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the best weights. Lightning calls no ``teardown`` in this case."""
        try:
            self._finish()
        finally:
            self.teardown(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the best weights after a fit that resumed at its end and has trained nothing."""
        if self._restored is not None:
            self._start(trainer, pl_module)
            self._finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop all references to the module."""
        self.__dict__ = self.__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """Return the best weights so far, whole and on the CPU; every rank must call it."""
        return {} if self._best is None else self._best.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until a fit resumes from it, because ``test`` with a checkpoint must not change anything."""
        self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which takes no part in a running fit."""
        found = self._found if self._best is None else (self._best.loss, self._best.step)
        return attributes_of(self) | {"_best": None, "_found": found, "_replace": None, "_restored": None}

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with no best weights, or with those of the checkpoint."""
        groups = innermost(trainer.optimizers[0]).param_groups if trainer.optimizers else []
        directions = {bool(group.get("maximize")) for group in groups}
        if len(directions) > 1:
            raise MisconfigurationException(
                "KeepBest cannot tell which loss is the best, because only some parameter groups have maximize=True. "
                "Set it for all groups or for none"
            )
        if any(map(is_slice, pl_module.parameters())):
            raise MisconfigurationException(
                "KeepBest cannot copy the parameters of FullyShardedDataParallel (version 1), which have no whole "
                "shape. Use strategy='ddp' or ModelParallelStrategy"
            )
        self._sign = -1 if directions == {True} else 1
        self._best = BestWeights(pl_module)
        if self._restored is not None:
            self._best.load_state_dict(self._restored)
            self._restored = None

    def _update(self, loss: Tensor, step: int) -> None:
        """Take the loss of an evaluation."""
        assert self._best is not None
        before = self._best._loss
        self._best._update(loss if self._sign > 0 else -loss, step)
        now = self._best._loss
        if self._replace is not None and now is not before:
            self._replace(self._sign * now.min() if isinstance(now, Tensor) else loss)

    def _finish(self) -> None:
        """Restore the best weights, if any, and keep only their loss and step."""
        if self._best is not None:
            best, self._best = self._best, None
            self._found = best.loss, best.step
            if self.restore and best.step is not None:
                best.restore()
