"""The Lightning callback that stops a fit at convergence."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_rprop._lightning import attributes_of, callbacks_called, has_no_optimizer, innermost
from lightning_rprop.convergence.criteria import Convergence, is_rprop
from lightning_rprop.optim._checks import check_count
from lightning_rprop.optim._sharding import whole


class Converged(Callback):
    """Stops the Trainer when the run has converged, by the criteria of ``Convergence``.

    The run has converged when, for ``patience`` optimizer steps in a row, at least one of these criteria holds: the
    loss changed by at most ``tolerance_change`` of itself; no absolute gradient entry is larger than
    ``tolerance_grad``; no step size of Rprop is larger than ``tolerance_step``. Loss and gradient must be those of the
    whole data set: use ``FullBatch``, or a loop whose batch is the whole set. Without FullBatch,
    the losses of the ranks are averaged.

    If ``training_step`` returns losses of the members of a ``Stacked`` as ``member_losses``, each
    member is judged by its own loss, gradients and step sizes. A member that has converged counts as converged from
    then on. A member whose loss is NaN or infinite for ``patience`` steps in a row does not count.

    All ranks stop at the same step, also with sharded parameters. The reason is printed. ``min_steps`` and
    ``min_epochs`` of the Trainer are respected. A step that a GradScaler skips does not count.

    While the fit runs, the ``max_iter`` loop of ``Rprop`` ends early where that of
    ``torch.optim.LBFGS`` would: when the gradient is small, or the loss changed little between two evaluations.
    LBFGS itself has its own tolerances. With members and FullBatch, it ends when all of them have reached that, or when
    the best one has.

    Args:
        tolerance_change: Largest change of the loss, relative to the loss; ``None`` disables the criterion.
        tolerance_grad: Largest absolute gradient entry, in the unit of the loss per unit of the weights; ``None``
            disables the criterion.
        tolerance_step: Largest step size of Rprop, in the unit of the weights; ``None`` disables the criterion.
        patience: Number of optimizer steps in a row in which a criterion must hold, not always the same one.
        every_n_steps: On an accelerator, how often the result is copied to the host, which waits for the device. The
            run stops at the next such step. On the CPU every step is checked.
        members: Which members must have converged if there is a loss for each: ``"all"``, or ``"best"``, the one with
            the lowest loss at this step (the highest with ``maximize=True`` of the optimizer).

    Raises:
        ValueError: If a tolerance is negative or not finite, if all are ``None``, if ``patience`` or ``every_n_steps``
            is below 1, or if ``members`` is unknown.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: At the start of ``fit``, if the module optimizes manually or has no optimizer or
            several; if the Trainer accumulates gradients; if ``tolerance_step`` is set and the optimizer is no Rprop;
            or if DeepSpeed hides the gradients or step sizes.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_rprop import FullBatch
        >>> trainer = Trainer(callbacks=[FullBatch(), Converged(tolerance_change=1e-6)], logger=False)
    """

    def __init__(
        self,
        tolerance_change: float | None = 1e-9,
        tolerance_grad: float | None = 1e-7,
        tolerance_step: float | None = None,
        patience: int = 10,
        every_n_steps: int = 10,
        members: Literal["all", "best"] = "all",
    ) -> None:
        super().__init__()
        self._criteria = Convergence(tolerance_change, tolerance_grad, tolerance_step, patience, members)
        has_inside = tolerance_change is not None or tolerance_grad is not None
        # of max_iter
        self._inside = Convergence(tolerance_change, tolerance_grad, members=members) if has_inside else None
        self.every_n_steps = check_count("every_n_steps", every_n_steps)
        self._is_fit = False
        self._release()

    def _release(self) -> None:
        """Drop the references to a fit."""
        self._optimizer: Any = None
        self._detach = ExitStack()  # from the optimizer
        self._is_shared = False  # whether all ranks have the same loss
        self._has_stepped = False  # in this batch
        self._evaluations = 0  # those of this step that were compared
        self._is_done: int | Tensor = 0  # whether max_iter ends, with the evaluations not yet copied to the host

    @property
    def reason(self) -> str | None:
        """The criteria that held, and the optimizer step of convergence; ``None`` before."""
        return self._criteria.reason

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the configuration and start counting from 0."""
        self._is_fit = stage == "fit"
        if not self._is_fit:
            return
        self._close()  # in case an earlier fit ended without teardown
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "Converged needs automatic optimization, but the module has automatic_optimization=False. Use "
                "lightning_rprop.Convergence in training_step, and set self.trainer.should_stop"
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "Converged compares losses of the whole data set, but accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}. Leave it at 1, and use FullBatch with "
                "FullBatchLoader(micro_batch_size=...)"
            )
        self._criteria._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer; stop if the checkpoint is of a run that had converged."""
        self._is_shared = trainer.world_size == 1 or bool(callbacks_called(trainer, "FullBatch"))
        criteria = self._criteria
        is_hidden = hasattr(trainer.strategy, "deepspeed_engine")
        if is_hidden and (criteria.tolerance_grad is not None or criteria.tolerance_step is not None):
            raise MisconfigurationException(
                f"DeepSpeed hides gradients and step sizes, but Converged has tolerance_grad={criteria.tolerance_grad} "
                f"and tolerance_step={criteria.tolerance_step}. Set both to None"
            )
        self._follow_optimizer(trainer)
        if criteria.tolerance_step is not None and not is_rprop(trainer.optimizers[0]):
            raise MisconfigurationException(
                f"tolerance_step={criteria.tolerance_step} needs the step sizes of Rprop, but the optimizer is "
                f"{type(innermost(trainer.optimizers[0])).__name__}. Set it to None"
            )
        self._stop_if_converged(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow an optimizer that was replaced."""
        self._follow_optimizer(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, and stop the Trainer if the run has converged."""
        has_stepped, self._has_stepped = self._has_stepped, False
        if not has_stepped:
            return
        step, loss = trainer.global_step, outputs.get("member_losses", outputs["loss"])
        self._criteria._observe(self._shared(trainer, loss), trainer.optimizers[0], step)
        if not isinstance(self._criteria._end, Tensor) or step % self.every_n_steps == 0:
            self._stop_if_converged(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach from the optimizer. Lightning calls no ``teardown`` in this case."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach from the optimizer, and drop all references to the module."""
        self._close()
        self.__dict__ = self.__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, from which a resumed run stops at the same step."""
        return self._criteria.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state in a fit; ``test`` with a checkpoint must not overwrite the result of the fit."""
        if self._is_fit:
            self._criteria.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which takes no part in a running fit."""
        copied = Converged.__new__(Converged)
        copied._release()
        return attributes_of(self) | vars(copied)

    def _close(self) -> None:
        self._detach.close()
        self._release()

    def _follow_optimizer(self, trainer: pl.Trainer) -> None:
        """Attach to the Trainer's optimizer, if it is a new one."""
        optimizers = trainer.optimizers
        if [*map(id, optimizers)] == [id(self._optimizer)]:
            return
        count = 0 if has_no_optimizer(trainer) else len(optimizers)
        if count != 1:
            raise MisconfigurationException(
                f"Converged needs one optimizer, but the Trainer has {count}. Return one from configure_optimizers, "
                "with a parameter group for each set of options"
            )
        inner = innermost(optimizers[0])
        if not isinstance(inner, Optimizer):
            raise MisconfigurationException(f"Converged needs a torch.optim.Optimizer, got {type(inner).__name__}")
        self._detach.close()
        self._optimizer = optimizers[0]
        self._detach.callback(inner.register_step_post_hook(self._note_step).remove)
        if self._inside is not None and hasattr(inner, "_is_done"):
            inner._is_done = partial(self._ends_max_iter, trainer)
            self._detach.callback(vars(inner).pop, "_is_done", None)

    def _note_step(self, *_: Any) -> None:
        self._has_stepped, self._evaluations, self._is_done = True, 0, 0

    def _ends_max_iter(self, trainer: pl.Trainer, before: Tensor, loss: Tensor) -> bool:
        """Return whether Rprop's ``max_iter`` ends before the move by the gradient of this loss."""
        assert self._inside is not None
        before, loss = self._shared(trainer, before), self._shared(trainer, loss)
        now, which = self._inside._compare(before, loss, trainer.optimizers[0])
        self._is_done = self._is_done | which
        self._evaluations += 1
        ended, _ = self._inside._decide(now, self._is_done, math.inf, trainer.optimizers[0])
        return (not isinstance(ended, Tensor) or self._evaluations % self.every_n_steps == 0) and bool(ended)

    def _shared(self, trainer: pl.Trainer, loss: Tensor) -> Tensor:
        """Return the mean of the ranks' losses, which is the same number on all of them."""
        if self._is_shared:
            return loss
        mean: Tensor = trainer.strategy.reduce(whole(loss.detach()).clone(), reduce_op="mean")  # reduces in place
        return mean

    def _stop_if_converged(self, trainer: pl.Trainer) -> None:
        if bool(self._criteria._end):
            if not trainer.should_stop:
                rank_zero_info(f"Converged: {self.reason}.")
            trainer.should_stop = True
