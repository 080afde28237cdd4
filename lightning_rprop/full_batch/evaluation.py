"""Loss and gradient of the whole data set, made from micro-batches inside one Lightning batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_rprop.full_batch.loader import FullBatchLoader, MicroBatch
from lightning_rprop.lightning_private import (
    StepLogs,
    before_batch_transfer,
    run_module_hook,
    run_training_step,
    weigh_logs,
)
from lightning_rprop.optim.sharding import local, whole

# What self.log weighs the samples of a micro-batch by that only keeps a rank in step: nothing, but not a division by 0.
_NOTHING = 1e-20

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Evaluation:
    """The mean loss over all samples of all ranks, and its gradient, however the samples are cut.

    Let micro-batch i have the loss l_i, a mean over its n_i samples. Its backward pass is weighted by ``n_i R unit``,
    with R ranks, over whose gradients the strategy takes the mean, and ``unit`` a power of two near 1/N; so the weights
    round nothing, and the sum over micro-batches and ranks is brought to the mean over N by one multiplication.

    The first micro-batch of a step runs in Lightning's own closure, between :meth:`begin` and :meth:`finish`;
    :meth:`again` evaluates once more, without Lightning's hooks.

    Args:
        trainer: The Trainer that fits.
        pl_module: Its module.
        optimizer: Its only optimizer.
        loader: The data, shared among the ranks already.
        reduction: What training_step returns of its samples, ``"mean"`` or ``"sum"``.
        weight: Gives what a micro-batch counts; ``None`` counts samples.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        loader: FullBatchLoader,
        reduction: str,
        weight: Callable[[Any], float | Tensor] | None,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.optimizer = optimizer
        self.reduction = reduction
        self.weight = weight
        self.loss: Tensor | None = None
        self.logs = StepLogs(trainer)
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        # DeepSpeed's engine reduces gradients itself, and keeps them to itself until its step
        self.engine = getattr(trainer.strategy, "deepspeed_engine", None)
        self.blocked: Callable[[], AbstractContextManager[Any]] = (
            getattr(trainer.strategy, "block_backward_sync", nullcontext)
            if self.engine is None
            else partial(_not_last, self.engine)
        )
        self.takes_batch_idx = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        self.values: list[Tensor] = []
        self.weights: list[float | Tensor] = []
        self.block: AbstractContextManager[Any] | None = None
        self.batch_idx = 0
        self.attach(loader)

    def attach(self, loader: FullBatchLoader) -> None:
        """Take the data from this loader from now on."""
        self.loader = loader
        owners = [self.pl_module, *([self.trainer.datamodule] if self.trainer.datamodule is not None else [])]  # type: ignore[attr-defined]
        self.in_place = loader.lies_on(self.trainer.strategy.root_device) and not any(
            _is_the_users(getattr(owner, hook)) for owner in owners for hook in _TRANSFER_HOOKS
        )
        known = None if self.weight is not None else loader.num_samples
        self.total: float | None = None if known is None else float(known)
        self.unit: float | None = None if self.total is None else _power_of_two_near(1 / self.total)

    def begin(self, batch_idx: int) -> None:
        """Start a step, whose first micro-batch the loader has given to Lightning."""
        if self.loader.first is None:
            raise RuntimeError("FullBatch found that the Trainer's batch does not come from its FullBatchLoader")
        self._start()
        self.batch_idx = batch_idx
        self.current = self.loader.first
        self.alone = self.current.is_last and self.trainer.world_size == 1
        weigh_logs(self.trainer, self._log_weight(self.current))
        if not self.alone:
            self.logs.begin()
        if not self.current.is_last:
            self.block = self.blocked()
            self.block.__enter__()

    def weigh_first(self, loss: Tensor) -> None:
        """Take the loss of the first micro-batch, and weigh the gradient that is about to be made of it."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        factor = self._take(loss.detach() / scale if scale != 1 else loss.detach(), self.current)
        if factor is not None:
            loss.register_hook(lambda grad: grad * factor)  # type: ignore[no-untyped-call]  # others see it as it is

    def finish(self) -> None:
        """Run the other micro-batches, and make of all the exact gradient and loss."""
        self._allow_reduction()
        if not self.alone:
            self.logs.take(self._log_weight(self.current))
            self._run(self.loader.rest)
        self._complete()

    def again(self) -> None:
        """Evaluate anew, as a closure that is called more than once in a step asks for."""
        self._start()
        run_module_hook(self.trainer, "optimizer_zero_grad", self.trainer.current_epoch, self.batch_idx, self.optimizer)
        if not self.alone:
            self.logs.begin()
        self._run(self.loader.micro_batches())
        self._complete()
        clip = {
            "gradient_clip_val": self.trainer.gradient_clip_val,
            "gradient_clip_algorithm": self.trainer.gradient_clip_algorithm,
        }
        run_module_hook(self.trainer, "configure_gradient_clipping", self.optimizer, **clip)

    def abandon(self) -> None:
        """Leave a step that has begun."""
        self._allow_reduction()
        self.logs.cancel()

    def _allow_reduction(self) -> None:
        if self.block is not None:
            block, self.block = self.block, None
            block.__exit__(None, None, None)

    def _start(self) -> None:
        self.abandon()
        self.loss = None
        self.values, self.weights = [], []
        self.samples = 0
        self.factor: float | Tensor = 1.0  # by which the sum of the gradients is the mean's

    def _run(self, micro_batches: Iterator[MicroBatch]) -> None:
        """Make forward and backward passes, as Lightning's closure does but without its hooks."""
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        index = (self.batch_idx,) if self.takes_batch_idx else ()
        for micro_batch in micro_batches:
            batch = micro_batch.data
            if not self.in_place:
                batch = before_batch_transfer(self.pl_module, precision.convert_input(batch))
                batch = strategy.batch_to_device(batch, dataloader_idx=0)
            log_weight = self._log_weight(micro_batch)
            weigh_logs(self.trainer, log_weight)
            with nullcontext() if micro_batch.is_last else self.blocked():
                output = run_training_step(self.trainer, batch, *index)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is None:
                    raise RuntimeError(no_loss())
                factor = self._take(loss.detach(), micro_batch)
                if factor is not None:
                    loss = loss * factor
                if self.scaler is not None:
                    loss = self.scaler.scale(loss)
                precision.backward(loss, self.pl_module, self.optimizer)
            if not self.alone:
                self.logs.take(log_weight)

    def _take(self, value: Tensor, micro_batch: MicroBatch) -> float | Tensor | None:
        """Add a loss to the sum; return the factor of its gradient, ``None`` for 1."""
        if micro_batch.size == 0:
            return 0.0
        value = whole(value)
        self.samples += max(micro_batch.size, 0)
        if self.alone and self.reduction == "mean":
            self.loss = value
            return None
        weight: float | Tensor = micro_batch.size if self.weight is None else self.weight(micro_batch.data)
        if not isinstance(weight, Tensor) and not 0 <= weight < math.inf:
            raise ValueError(f"weight must give a finite number >= 0 for each micro-batch, got {weight!r}")
        if isinstance(weight, Tensor):
            if weight.numel() != 1:
                raise ValueError(f"weight must give one number for each micro-batch, got shape {tuple(weight.shape)}")
            weight = weight.detach().reshape(())
        self.values.append(value.reshape(()))
        self.weights.append(weight)
        if self.reduction == "sum":
            weight = 1
        factor: float | Tensor = weight * (self.replicas * (self.unit or 1.0))
        return factor

    def _complete(self) -> None:
        """Bring the sums to the mean over all samples of all ranks."""
        if self.loss is None:
            self._average()
        if not self.alone:
            self.logs.end()
        weigh_logs(self.trainer, self.samples or _NOTHING)
        self.values, self.weights = [], []

    @torch.no_grad()
    def _average(self) -> None:
        device = self.trainer.strategy.root_device
        precise = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(2, dtype=precise, device=device)
        if self.values:
            values = torch.stack(self.values).to(device, precise)
            if any(isinstance(weight, Tensor) for weight in self.weights):
                weights = torch.stack([torch.as_tensor(w, dtype=precise, device=device) for w in self.weights])
            else:
                weights = torch.tensor(self.weights, dtype=precise, device=device)  # one copy to the device
            sums[0] = (values * weights).sum() if self.reduction == "mean" else values.sum()
            sums[1] = weights.sum()
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.loss = sums[0] / sums[1]
        # a strategy with more processes than replicas has summed each replica's share several times
        total = sums[1] * self.replicas / self.trainer.world_size if self.total is None else self.total
        self.factor = 1 / ((self.unit or 1.0) * total)
        if self.engine is None:
            self.bring_to_mean(self.optimizer)
        if self.unit is None:
            self.unit = _power_of_two_near(1 / float(total))  # for the steps to come

    @torch.no_grad()
    def bring_to_mean(self, optimizer: Optimizer) -> None:
        """Make the sums that are the gradients of an optimizer's parameters those of the mean; once an evaluation."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        if grads and (isinstance(self.factor, Tensor) or self.factor != 1):
            torch._foreach_mul_(grads, self.factor)

    def _log_weight(self, micro_batch: MicroBatch) -> float:
        """Give what self.log weighs a micro-batch by; refuse one whose samples must be counted and cannot be."""
        if self.weight is None and micro_batch.size < 0:
            raise ValueError(
                "the samples of a batch cannot be counted: its tensors have different lengths, or it has none. Say "
                "what it counts: FullBatch(weight=lambda batch: ...)"
            )
        return abs(micro_batch.size) or _NOTHING


@contextmanager
def _not_last(engine: Any) -> Iterator[None]:
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)


def no_loss() -> str:
    """Say what to do about a training_step that returned None."""
    return (
        "training_step returned no loss, but every micro-batch is part of the full batch: return a loss (0 * another "
        "one, for samples that shall not count), or leave the samples out of the data"
    )


def _is_the_users(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook is other than Lightning's own, of either of its two packages."""
    return not getattr(hook, "__module__", "").startswith(("lightning.pytorch.", "pytorch_lightning."))


def _power_of_two_near(x: float) -> float:
    return 2.0 ** round(math.log2(x)) if 0 < x < math.inf else 1.0
