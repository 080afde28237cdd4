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
from lightning_rprop.full_batch._member_losses import NAME, SUMMARY, summarize
from lightning_rprop.full_batch._warnings import warn_of_dropout, warn_of_micro_batches
from lightning_rprop.optim._checks import is_judged
from lightning_rprop.optim._members import fits


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
        self._is_rprop = False  # whether that is a lightning_rprop.Rprop, which takes the losses of members
        self._takes_loss: list[Any] = []  # the optimizers whose step() has an argument loss
        self._detach = ExitStack()  # from the optimizers
        self._losses: dict[str, Tensor] | None = None  # of the first evaluation in the step: loss and member_losses
        self._step: int | None = None  # the Trainer's count before the step, while it runs
        self._has_evaluated = False
        self._checks_noise = True

    def start_epoch(self) -> None:
        """Find new submodules and overridden hooks."""
        self._buffers.find()
        self.evaluation.find_hooks()

    def begin(self) -> None:
        """Begin a step."""
        self._losses = None
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
        """Evaluate the whole data set when Lightning's closure is called; return what the closure returns."""
        self.interrupts.release()
        if self.follow_optimizer() and self._losses is None:
            self._take_copies()
        loss, extra = self.evaluation.run(arguments, batch_idx, backward)
        judged = self.evaluation.judged
        assert judged is not None
        losses = {"loss": loss} | {name: value for name, value in extra.items() if name == NAME}
        if any(is_logged(self._trainer, name) for name in self._names(losses)):
            raise MisconfigurationException(
                f"FullBatch(log_as={self._log_as!r}) logs the loss of all samples by a name that the module logs too. "
                "Choose another name, or remove one of the two"
            )
        if not self._has_evaluated:
            self._has_evaluated = True
            if not self.evaluation.is_single:
                warn_of_micro_batches(self.evaluation.pl_module)
            if judged.dim():
                self._check_members(judged)
        assert self._step is not None
        self.bad_losses.check(judged, self._step, self._optimizer.param_groups)
        self.interrupts.hold()
        for listener in self.listeners:
            listener(judged, self._step)
        if self._losses is None:
            self._losses = losses
        return judged if self._is_rprop else loss, extra

    def end(self) -> dict[str, Tensor]:
        """End a step, and return the losses of its first evaluation by their names in the outputs."""
        assert self._losses is not None  # Lightning refuses an optimizer_step that does not call its closure
        self._step = None
        return self._losses

    def values_to_log(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what to log of a step: the loss, or a summary of the members' losses."""
        if self._log_as is None:
            return {}
        maximize = all(group.get("maximize") for group in self._optimizer.param_groups)
        values = summarize(losses[NAME], maximize) if NAME in losses else [losses["loss"]]
        return dict(zip(self._names(losses), values, strict=True))

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
        self._is_rprop = hasattr(inner, "shared_loss")
        if hasattr(inner, "shared_loss"):
            self._detach.callback(setattr, inner, "shared_loss", inner.shared_loss)
            inner.shared_loss = True
        return True

    def _names(self, losses: dict[str, Tensor]) -> list[str]:
        """Return the names under which these losses are logged."""
        if self._log_as is None:
            return []
        return [f"{self._log_as}/{name}" for name in SUMMARY] if NAME in losses else [self._log_as]

    def _check_members(self, losses: Tensor) -> None:
        """Check that members do not depend on each other, and that Rprop can judge each by its own loss."""
        clip, algorithm = self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        if clip and algorithm != "value":  # None means "norm"
            raise MisconfigurationException(
                f"gradient_clip_val={clip} clips the norm of all members' gradients, so that one member can stop the "
                "others. Leave it None, or use gradient_clip_algorithm='value'"
            )
        names = {id(param): name for name, param in self.evaluation.pl_module.named_parameters()}
        for group in self._inner.param_groups if self._is_rprop else ():
            for param in group["params"] if is_judged(group, shared_loss=True) else ():
                if param.grad is not None and not fits(losses, param):
                    raise ValueError(
                        f"training_step returned {len(losses)} {NAME}, but the parameter {names.get(id(param))!r} has "
                        f"the shape {tuple(param.shape)}: its first dimension must be {len(losses)}. Return one loss "
                        "for each member of a lightning_rprop.Stacked, or return only the loss"
                    )

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
            loss = self.evaluation.judged if self._is_rprop else self.evaluation.loss
            if optimizer in self._takes_loss and "loss" not in kwargs and loss is not None:
                kwargs = {**kwargs, "loss": loss}
            if self.evaluation.engine is not None:
                self.evaluation.bring_to_mean(optimizer)
        return args, kwargs
