"""The state of ``FullBatch`` during one fit: its optimizer, its evaluation, and the copies that undo a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_rprop._lightning import has_no_optimizer, innermost
from lightning_rprop._lightning_logs import is_logged
from lightning_rprop.full_batch._atomic_step import Buffers, Interrupts, Snapshot
from lightning_rprop.full_batch._bad_losses import BadLosses
from lightning_rprop.full_batch._evaluation import Evaluation
from lightning_rprop.full_batch._warnings import warn_of_dropout, warn_of_micro_batches


class Fit:
    """One fit: makes each step atomic, and follows the Trainer's optimizer.

    Args:
        evaluation: Evaluates the whole data set.
        log_as: The name by which the callback logs the loss, or ``None``.
    """

    def __init__(self, evaluation: Evaluation, log_as: str | None) -> None:
        self.evaluation = evaluation
        self.bad_losses = BadLosses(evaluation)
        self.interrupts = Interrupts()
        self.listeners: list[Callable[[Tensor, int], None]] = []  # see FullBatch._listen
        self._trainer = evaluation.trainer
        self._log_as = log_as
        self._buffers = Buffers(evaluation.pl_module)
        self._snapshot = Snapshot()
        self._scale: dict[str, Any] | None = None  # of a GradScaler
        self._optimizer: Any = None
        self._inner: Any = None  # the optimizer that updates the parameters, if the Trainer's wraps it
        self._takes_loss: list[Any] = []  # the optimizers whose step() has an argument loss
        self._detach = ExitStack()  # from the optimizers
        self._loss: Tensor | None = None  # of the first evaluation in the step
        self._step: int | None = None  # the Trainer's count before the step, while it runs
        self._has_evaluated = False
        self._checks_noise = True

    def start_epoch(self) -> None:
        """Find new submodules and overridden hooks."""
        self._buffers.find()
        self.evaluation.find_hooks()

    def begin(self) -> None:
        """Begin a step."""
        self._loss = None
        self._step = None
        self.follow_optimizer()
        # a lazy module's first evaluation draws its parameters
        if self._checks_noise and not any(map(is_lazy, self.evaluation.pl_module.parameters())):
            self._checks_noise = False
            self.evaluation.checks_randomness = not warn_of_dropout(self.evaluation.pl_module)
        self.evaluation.begin()
        self.bad_losses.has_state = bool(self._inner.state)  # some optimizers create it before they call the closure
        self._take_copies()
        self._step = self._trainer.global_step

    def evaluate(self, arguments: tuple[Any, ...], batch_idx: int, backward: bool) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the whole data set when Lightning's closure is called."""
        self.interrupts.release()
        if self.follow_optimizer() and self._loss is None:
            self._take_copies()
        loss, extra = self.evaluation.run(arguments, batch_idx, backward)
        if self._log_as is not None and is_logged(self._trainer, self._log_as):
            raise MisconfigurationException(
                f"FullBatch(log_as={self._log_as!r}) logs the loss of all samples by a name that the module logs too. "
                "Choose another name, or remove one of the two"
            )
        if not self._has_evaluated:
            self._has_evaluated = True
            if not self.evaluation.is_single:
                warn_of_micro_batches(self.evaluation.pl_module)
        assert self._step is not None
        self.bad_losses.check(loss, self._step, self._optimizer.param_groups)
        self.interrupts.hold()
        for listener in self.listeners:
            listener(loss, self._step)
        if self._loss is None:
            self._loss = loss
        return loss, extra

    def end(self) -> Tensor:
        """End a step, and return the loss of its first evaluation."""
        assert self._loss is not None  # Lightning refuses an optimizer_step that does not call its closure
        self._step = None
        return self._loss

    def skip(self) -> None:
        """End a step that was skipped because the module's ``on_train_batch_start`` returned -1."""
        self._step = None

    def undo(self) -> None:
        """Undo a step that has begun and is not complete."""
        if self._step is not None and self._trainer.global_step == self._step:
            self._snapshot.restore()
            self._buffers.restore()
            if self.evaluation.scaler is not None and self._scale:
                self.evaluation.scaler.load_state_dict(self._scale)
        self._step = None

    def close(self) -> None:
        """Leave the optimizer and the loader as they were before the fit."""
        self._detach.close()
        self.evaluation.loader._release()
        self.interrupts.release(deliver=False)

    def follow_optimizer(self) -> bool:
        """Attach to the Trainer's optimizer; return whether it has changed."""
        if [*map(id, self._trainer.optimizers)] == [id(self._optimizer)]:
            return False
        if len(self._trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"FullBatch needs one optimizer, but the Trainer has {len(self._trainer.optimizers)}. Use one "
                "optimizer with a parameter group for each set of options"
            )
        if has_no_optimizer(self._trainer):
            raise MisconfigurationException(
                "FullBatch needs an optimizer, but configure_optimizers returned None: return one, such as "
                "lightning_rprop.Rprop(self.parameters())"
            )
        optimizer = self._trainer.optimizers[0]
        inner = innermost(optimizer)
        if not isinstance(inner, Optimizer):
            raise MisconfigurationException(f"FullBatch needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._detach.close()
        self._optimizer, self._inner = optimizer, inner
        # the inner one may take a loss when its wrapper does not; DeepSpeed's wrapper has no hooks either
        hooked = [each for each in {optimizer, inner} if isinstance(each, Optimizer)]
        self._takes_loss = [each for each in hooked if "loss" in inspect.signature(type(each).step).parameters]
        for each in hooked:
            self._detach.callback(each.register_step_pre_hook(self._before_step).remove)
        if hasattr(inner, "shared_loss"):
            self._detach.callback(setattr, inner, "shared_loss", inner.shared_loss)
            inner.shared_loss = True
        return True

    def _take_copies(self) -> None:
        self._buffers.take()
        self._scale = None if self.evaluation.scaler is None else self.evaluation.scaler.state_dict()
        if self.evaluation.engine is None:  # DeepSpeed hides its parameters and optimizer state
            self._snapshot.take(self._optimizer, self._inner)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass the loss to a step that takes one but gets no closure, as under a GradScaler."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if optimizer in self._takes_loss and "loss" not in kwargs and self.evaluation.loss is not None:
                kwargs = {**kwargs, "loss": self.evaluation.loss}
            if self.evaluation.engine is not None:
                self.evaluation.bring_to_mean(optimizer)
        return args, kwargs
