"""Loss and gradient of the whole data set, made from micro-batches inside one Lightning batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rprop._lightning import (
    StepLogs,
    before_batch_transfer,
    is_lightnings,
    overridden_hooks,
    run_hook,
    run_module_hook,
    run_training_step,
    weigh_logs,
)
from lightning_rprop.full_batch._sources import renewed
from lightning_rprop.full_batch._warnings import RandomnessCheck
from lightning_rprop.full_batch.loader import FullBatchLoader, MicroBatch
from lightning_rprop.optim._sharding import is_sharded, is_slice, local, whole

# What self.log weighs a micro-batch by that does not count: nothing, but not a division by 0.
_NOTHING = 1e-20

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_CLOSURE_HOOKS = ("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "on_after_backward")


class Evaluation:
    """The mean loss over all samples of all ranks, and its gradient, however the samples are cut.

    Let micro-batch i have the loss l_i, a mean over its n_i samples. Its backward pass is weighted by ``n_i R unit``,
    with R ranks, over whose gradients the strategy takes the mean, and ``unit`` a power of two near 1/N; so the weights
    round nothing, and the sum over micro-batches and ranks is brought to the mean over N by one multiplication. A
    micro-batch that weighs 0 runs, but is in neither sum: 0 times a loss of NaN would be NaN.

    There is one way to evaluate, :meth:`run`, which whoever calls Lightning's closure gets, however often.

    Args:
        trainer: The Trainer that fits.
        pl_module: Its module.
        loader: The data, shared among the ranks already.
        reduction: What training_step returns of its samples, ``"mean"`` or ``"sum"``.
        weight: Gives what a micro-batch counts; ``None`` counts samples.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: FullBatchLoader,
        reduction: str,
        weight: Callable[[Any], float | Tensor] | None,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.reduction = reduction
        self.weight = weight
        self.loss: Tensor | None = None
        self.checks_randomness = False  # at the next call of training_step
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
        self.hooks: set[str] = set()  # of the closure, that somebody overrides
        self._callbacks: list[int] = []
        self.attach(loader)

    def attach(self, loader: FullBatchLoader) -> None:
        """Take the data from this loader from now on."""
        self.loader = loader
        owners = [self.pl_module, *([self.trainer.datamodule] if self.trainer.datamodule is not None else [])]  # type: ignore[attr-defined]
        self.in_place = loader.lies_on(self.trainer.strategy.root_device) and not any(
            not is_lightnings(getattr(owner, hook)) for owner in owners for hook in _TRANSFER_HOOKS
        )
        known = None if self.weight is not None else loader.num_samples
        self.total: float | None = None if known is None else float(known)
        self.unit: float | None = None if self.total is None else _power_of_two_near(1 / self.total)

    def begin(self) -> None:
        """Start a step, whose first micro-batch the loader has given to Lightning."""
        self.loader.check_begun()
        self.loss = None
        if [*map(id, self.trainer.callbacks)] != self._callbacks:  # type: ignore[attr-defined]
            self.look_for_hooks()

    def look_for_hooks(self) -> None:
        """Find out who overrides hooks of the closure; once per epoch, because it takes as long as a small layer."""
        self._callbacks = [*map(id, self.trainer.callbacks)]  # type: ignore[attr-defined]
        self.hooks = overridden_hooks(self.trainer, _CLOSURE_HOOKS)

    def run(self, arguments: tuple[Any, ...], batch_idx: int, backward: bool) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the whole set, in the place of a batch that the closure of Lightning would evaluate.

        Args:
            arguments: What Lightning would call training_step with: its batch, and the index if that is taken.
            batch_idx: The index of the batch.
            backward: Whether to compute the gradients.

        Returns:
            The mean loss over all samples, and what else training_step returned for the first micro-batch.
        """
        self.logs.cancel()
        self.loss = None
        self._values, self._weights, self._log_weights = list[Tensor](), list[float](), 0.0
        self._factor: float | Tensor = 1.0  # by which the sum of the gradients is the mean's
        self._earlier: list[tuple[Tensor, Tensor]] | None = None  # gradients that were there before the first backward
        optimizer = self.trainer.optimizers[0]
        batch, *index = arguments
        extra: dict[str, Any] | None = None
        micro_batches, is_current = self.loader.next_pass()
        with closing(micro_batches):
            for micro_batch in micro_batches:
                is_first = extra is None
                if is_first:
                    self.alone = micro_batch.is_last and self.trainer.world_size == 1
                    if not self.alone:
                        self.logs.begin()
                # Lightning has brought its batch to the device, and hooks may have changed it
                data = renewed(batch) if is_first and is_current else self._transferred(micro_batch.data)
                weight = self._weigh(micro_batch)
                with nullcontext() if micro_batch.is_last else self.blocked():
                    loss, more = self._forward(data, index)
                    if is_first:
                        extra = more
                        if backward:
                            self._zero_grad(optimizer, batch_idx)
                    factor = self._take(loss, weight)
                    if backward:
                        self._backward(loss, factor, optimizer)
                if not self.alone:
                    self.logs.take(weight or _NOTHING)
        self._complete(backward)
        if backward and "on_after_backward" in self.hooks:
            run_hook(self.trainer, "on_after_backward")
        assert self.loss is not None
        assert extra is not None
        return self.loss, extra

    def close(self) -> None:
        """Leave the logs as they were."""
        self.logs.close()

    def _transferred(self, data: Any) -> Any:
        if self.in_place:
            return data
        batch = before_batch_transfer(self.pl_module, self.trainer.precision_plugin.convert_input(data))
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _weigh(self, micro_batch: MicroBatch) -> float:
        """Return what a micro-batch counts, and let ``self.log`` weigh it by that."""
        if micro_batch.size == 0:  # a sample that only keeps the rank in step
            weight = 0.0
        elif self.weight is not None:
            weight = _number(self.weight(micro_batch.data))
        elif micro_batch.size < 0 and not self.alone:
            raise ValueError(
                "the samples of a batch cannot be counted: its tensors have different lengths, or another one than its "
                "DataLoader's batch_size, or it has none. Say what it counts: FullBatch(weight=lambda batch: ...)"
            )
        else:
            weight = float(abs(micro_batch.size))
        if weight == 0 and not self.alone:
            self.logs.put_aside()
        self._log_weights += weight
        weigh_logs(self.trainer, weight or _NOTHING)
        return weight

    def _forward(self, data: Any, index: list[Any]) -> tuple[Tensor, dict[str, Any]]:
        check, self.checks_randomness = self.checks_randomness, False
        randomness = RandomnessCheck(self.trainer.strategy.root_device) if check else None
        output = run_training_step(self.trainer, data, *index)
        if randomness is not None:
            randomness.finish()
        return _loss_of(output)

    def _zero_grad(self, optimizer: Optimizer, batch_idx: int) -> None:
        if "on_before_zero_grad" in self.hooks:
            run_hook(self.trainer, "on_before_zero_grad", optimizer)
        if "optimizer_zero_grad" in self.hooks or type(optimizer).zero_grad is not Optimizer.zero_grad:
            run_module_hook(self.trainer, "optimizer_zero_grad", self.trainer.current_epoch, batch_idx, optimizer)
        else:  # what that does, in a tenth of the time
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    def _take(self, loss: Tensor, weight: float) -> float:
        """Add a loss to the sum, and return the factor of its gradient."""
        if weight == 0:
            return 0.0
        value = whole(loss.detach()).reshape(())
        if self.alone and self.reduction == "mean":
            self.loss = value
            return 1.0
        self._values.append(value)
        self._weights.append(weight)
        factor: float = (weight if self.reduction == "mean" else 1.0) * self.replicas * (self.unit or 1.0)
        return factor

    def _backward(self, loss: Tensor, factor: float, optimizer: Optimizer) -> None:
        if factor == 0 and self.trainer.world_size == 1:
            return
        if factor == 0 and not loss.requires_grad:  # other ranks wait all the same
            loss = sum((param.sum() for param in self.pl_module.parameters() if param.requires_grad), loss)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self._earlier is None:
            if "on_before_backward" in self.hooks:
                run_hook(self.trainer, "on_before_backward", loss)
            self._earlier = []
            if not self.alone and self.engine is None:
                params = [param for group in optimizer.param_groups for param in group["params"]]
                self._earlier = [(param, param.grad) for param in params if param.grad is not None]
                for param, _ in self._earlier:
                    param.grad = None
        if factor != 1:
            loss = loss * factor
        with self._without_gradient(loss) if factor == 0 else nullcontext():
            self.trainer.precision_plugin.backward(loss, self.pl_module, optimizer)

    @contextmanager
    def _without_gradient(self, loss: Tensor) -> Iterator[None]:
        """Add exactly 0 in a backward pass, in which other ranks wait for this one."""
        params = [param for param in self.pl_module.parameters() if param.requires_grad]
        if self.engine is not None or any(is_sharded(param) or is_slice(param) for param in params):
            # whose gradients belong to tensors that are not to be had
            if not bool(whole(loss.detach()).isfinite()):
                raise RuntimeError(
                    f"a micro-batch that weighs 0 has a loss that is not finite on rank {self.trainer.global_rank}, "
                    f"and 0 times that is NaN in {type(self.trainer.strategy).__name__}. Return a finite loss for it, "
                    "such as a sum over no samples, or use strategy='ddp'"
                )
            yield
            return
        hooks = [param.register_hook(torch.zeros_like) for param in params]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _complete(self, backward: bool) -> None:
        """Bring the sums to the mean over all samples of all ranks."""
        if self.loss is None:
            self._average(backward)
        if not self.alone:
            self.logs.end()
            weigh_logs(self.trainer, self._log_weights or _NOTHING)

    @torch.no_grad()
    def _average(self, backward: bool) -> None:
        device = self.trainer.strategy.root_device
        precise = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(2, dtype=precise, device=device)
        if self._values:
            values = torch.stack(self._values).to(device, precise)
            weights = torch.tensor(self._weights, dtype=precise, device=device)  # one copy to the device
            sums[0] = (values * weights).sum() if self.reduction == "mean" else values.sum()
            sums[1] = weights.sum()
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        if self.weight is not None and not sums[1]:
            raise ValueError("weight returned 0 for every micro-batch: at least one must count. Check the function")
        self.loss = sums[0] / sums[1]
        # a strategy with more processes than replicas has summed each replica's share several times
        total = sums[1] * self.replicas / self.trainer.world_size if self.total is None else self.total
        self._factor = 1 / ((self.unit or 1.0) * total)
        if self.engine is None and backward:
            self.bring_to_mean(self.trainer.optimizers[0])
            for param, grad in self._earlier or ():
                param.grad = grad if param.grad is None else param.grad.add_(grad)
        if self.unit is None:
            self.unit = _power_of_two_near(1 / float(total))  # for the steps to come

    @torch.no_grad()
    def bring_to_mean(self, optimizer: Optimizer) -> None:
        """Make the sums that are the gradients of an optimizer's parameters those of the mean; once per evaluation."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        if grads and (isinstance(self._factor, Tensor) or self._factor != 1):
            torch._foreach_mul_(grads, self._factor)


@contextmanager
def _not_last(engine: Any) -> Iterator[None]:
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)


def _loss_of(output: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss in what training_step returned, and the rest of it."""
    extra = {}
    if isinstance(output, Mapping):
        extra = {name: value for name, value in output.items() if name != "loss"}
        output = output.get("loss")
    if output is None:
        raise RuntimeError(
            "training_step returned no loss, but every micro-batch is part of the full batch. Return a loss (0 * loss "
            "for samples that should not count), or leave the samples out of the data"
        )
    if not isinstance(output, Tensor):
        raise TypeError(f"training_step must return the loss as a tensor, got {output!r} ({type(output).__name__})")
    if output.numel() != 1:
        raise ValueError(
            f"training_step must return one number, got a loss of shape {tuple(output.shape)}. Reduce it: loss.mean(), "
            "or loss.sum() with FullBatch(reduction='sum')"
        )
    return output, extra


def _number(weight: Any) -> float:
    """Return a weight as a number, if it is one that a micro-batch can have."""
    if isinstance(weight, Tensor) and weight.numel() != 1:
        raise ValueError(f"weight must return one number for each micro-batch, got shape {tuple(weight.shape)}")
    try:
        number = math.nan if isinstance(weight, str) else float(weight)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"weight must return a finite number >= 0 for each micro-batch, got {weight!r}. Check the function that "
            "FullBatch(weight=...) was given"
        )
    return number


def _power_of_two_near(x: float) -> float:
    return 2.0 ** round(math.log2(x)) if 0 < x < math.inf else 1.0
