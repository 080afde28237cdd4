"""Loss and gradient of the whole data set, computed from micro-batches within one Lightning batch."""

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
    before_batch_transfer,
    is_from_lightning,
    overridden_hooks,
    run_hook,
    run_module_hook,
    run_training_step,
)
from lightning_rprop._lightning_logs import StepLogs
from lightning_rprop._ranks import compare
from lightning_rprop.full_batch._batches import copied_containers
from lightning_rprop.full_batch._member_losses import NAME, length_of
from lightning_rprop.full_batch._warnings import RandomnessCheck
from lightning_rprop.full_batch.loader import FullBatchLoader, MicroBatch
from lightning_rprop.optim._members import along, fits
from lightning_rprop.optim._sharding import is_sharded, is_slice, local, rows, whole

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_CLOSURE_HOOKS = ("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "on_after_backward")


class Evaluation:
    """Computes the mean loss over all samples of all ranks and its gradient; every closure call goes to ``run()``.

    Let micro-batch i have the mean loss l_i over n_i samples. Its backward pass runs on ``n_i R unit l_i``. R is the
    number of ranks, because the strategy averages their gradients. ``unit`` is a power of two near 1/N, so the factor
    is exact. One multiplication then turns the sum over micro-batches and ranks into the mean over all N
    samples. A micro-batch of weight 0 runs but is in neither sum, because 0 times a NaN loss would be NaN. The losses
    of members are averaged like the loss.

    Args:
        trainer: The Trainer, during a fit.
        pl_module: Its module.
        loader: The data, already shared among the ranks.
        reduction: How training_step reduces the loss of a micro-batch, ``"mean"`` or ``"sum"``.
        weight: Returns the weight of a micro-batch; ``None`` counts its samples.
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
        self.member_losses: Tensor | None = None
        self.checks_randomness = False  # in the next training_step
        self._members: int | None = None  # how many losses each training_step returns; None before the first
        self._agrees = trainer.world_size == 1  # whether that number is the same on all ranks
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        # DeepSpeed's engine reduces the gradients itself and hides them until its step
        self.engine = getattr(trainer.strategy, "deepspeed_engine", None)
        self._logs = StepLogs(trainer)
        self._replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        self._without_sync: Callable[[], AbstractContextManager[Any]] = (
            getattr(trainer.strategy, "block_backward_sync", nullcontext)
            if self.engine is None
            else partial(_accumulating, self.engine)
        )
        self._hooks: set[str] = set()  # the closure hooks that are overridden
        self._callbacks: list[int] = []
        self.attach(loader)

    def attach(self, loader: FullBatchLoader) -> None:
        """Take the data from this loader from now on."""
        self.loader = loader
        owners = [self.pl_module, *([self.trainer.datamodule] if self.trainer.datamodule is not None else [])]  # type: ignore[attr-defined]
        self._needs_transfer = not loader._is_on(self.trainer.strategy.root_device) or any(
            not is_from_lightning(getattr(owner, hook)) for owner in owners for hook in _TRANSFER_HOOKS
        )
        known = None if self.weight is not None else loader.num_samples
        self._total: float | None = None if known is None else float(known)
        self._unit: float | None = None if self._total is None else _power_of_two_near(1 / self._total)

    @property
    def judged(self) -> Tensor | None:
        """The losses by which an evaluation is judged: those of the members, or the loss."""
        return self.loss if self.member_losses is None else self.member_losses.squeeze()  # one is an ordinary loss

    def begin(self) -> None:
        """Begin a step. The loader has already yielded its first micro-batch to Lightning."""
        self.loader._check_batch()
        self.loss = self.member_losses = None
        if [*map(id, self.trainer.callbacks)] != self._callbacks:  # type: ignore[attr-defined]
            self.find_hooks()

    def find_hooks(self) -> None:
        """Find the overridden hooks of the closure; once per epoch, because it takes as long as a small layer."""
        self._callbacks = [*map(id, self.trainer.callbacks)]  # type: ignore[attr-defined]
        self._hooks = overridden_hooks(self.trainer, _CLOSURE_HOOKS)

    def run(self, arguments: tuple[Any, ...], batch_idx: int, backward: bool) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the whole data set in place of the batch that Lightning's closure would evaluate.

        Args:
            arguments: Lightning's arguments of training_step: its batch, and the batch index if that is taken.
            batch_idx: The batch index.
            backward: Whether to compute the gradients.

        Returns:
            The mean loss over all samples, and the other outputs of training_step for the first micro-batch, among
            them the mean losses of the members.
        """
        self._logs.cancel()
        self.loss = self.member_losses = None
        self._losses, self._weights = list[Tensor](), list[float]()
        self._losses_of_members = list[Tensor]()
        self._factor: float | Tensor = 1.0  # turns the summed gradients into those of the mean
        self._earlier: list[tuple[Tensor, Tensor]] | None = None  # gradients from before the first backward
        optimizer = self.trainer.optimizers[0]
        batch, *index = arguments
        extra: dict[str, Any] | None = None
        micro_batches, is_current = self.loader._next_pass()
        with closing(micro_batches):
            for micro_batch in micro_batches:
                is_first = extra is None
                if is_first:
                    self.is_single = micro_batch.is_last and self.trainer.world_size == 1
                    if not self.is_single:
                        self._logs.begin()
                # Lightning has moved its batch to the device, and hooks may have changed it
                data = copied_containers(batch) if is_first and is_current else self._transferred(micro_batch.data)
                weight = self._weigh(micro_batch)
                self._is_repeated = micro_batch.size == 0
                self._logs.before(weight)
                with nullcontext() if micro_batch.is_last else self._without_sync():
                    loss, more = self._forward(data, index)
                    if is_first:
                        extra = more
                        if backward:
                            self._zero_grad(optimizer, batch_idx)
                    factor = self._add(loss, self._take_members(more), weight)
                    if backward:
                        self._backward(loss, factor, optimizer)
                self._logs.after(weight)
        if self.loss is None:
            self._average(backward)
        self._logs.end(sum(self._weights))
        if backward and "on_after_backward" in self._hooks:
            run_hook(self.trainer, "on_after_backward")
        assert self.loss is not None
        assert extra is not None
        if self.member_losses is not None:
            extra[NAME] = self.member_losses
        return self.loss, extra

    def inputs(self) -> Iterator[tuple[int, Any]]:
        """Iterate over this rank's micro-batches that count, as training_step gets them, with their indices."""
        with closing(self.loader.micro_batches()) as micro_batches:
            for i, micro_batch in enumerate(micro_batches):
                if self._weigh(micro_batch) > 0:
                    yield i, self._transferred(micro_batch.data)

    @torch.no_grad()
    def zero_gradients(self, members: Tensor | None = None) -> None:
        """Set the gradients of the last evaluation to 0.

        Args:
            members: A bool for each member, whether to set its gradients to 0; by default all are.
        """
        for group in self.trainer.optimizers[0].param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if members is None:
                    grad.zero_()
                elif fits(members, grad):
                    own = local(grad)
                    own.masked_fill_(along(rows(members, grad), own), 0)

    def close(self) -> None:
        """Leave the logs as they were."""
        self._logs.close()

    @torch.no_grad()
    def bring_to_mean(self, optimizer: Optimizer) -> None:
        """Scale the summed gradients of the optimizer's parameters to those of the mean; once per evaluation."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        if grads and (isinstance(self._factor, Tensor) or self._factor != 1):
            torch._foreach_mul_(grads, self._factor)

    def _transferred(self, data: Any) -> Any:
        if not self._needs_transfer:
            return data
        batch = before_batch_transfer(self.pl_module, self.trainer.precision_plugin.convert_input(data))
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _weigh(self, micro_batch: MicroBatch) -> float:
        """Return the weight of a micro-batch: the number of its samples, or the user's ``weight``."""
        if micro_batch.size == 0:  # a sample that only keeps the rank in step
            return 0.0
        if self.weight is not None:
            return _as_weight(self.weight(micro_batch.data))
        if micro_batch.size < 0 and not self.is_single:
            raise ValueError(
                "the samples of a batch cannot be counted: its tensors have different lengths, or a length other than "
                "its DataLoader's batch_size, or it has none. Give its weight: FullBatch(weight=lambda batch: ...)"
            )
        return float(abs(micro_batch.size))

    def _forward(self, data: Any, index: list[Any]) -> tuple[Tensor, dict[str, Any]]:
        check, self.checks_randomness = self.checks_randomness, False
        randomness = RandomnessCheck(self.trainer.strategy.root_device) if check else None
        output = run_training_step(self.trainer, data, *index)
        if randomness is not None:
            randomness.finish()
        return _loss_of(output)

    def _zero_grad(self, optimizer: Optimizer, batch_idx: int) -> None:
        if "on_before_zero_grad" in self._hooks:
            run_hook(self.trainer, "on_before_zero_grad", optimizer)
        if "optimizer_zero_grad" in self._hooks or type(optimizer).zero_grad is not Optimizer.zero_grad:
            run_module_hook(self.trainer, "optimizer_zero_grad", self.trainer.current_epoch, batch_idx, optimizer)
        else:  # the same in a tenth of the time
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    def _take_members(self, extra: dict[str, Any]) -> Tensor | None:
        """Remove the losses of the members from the outputs of training_step, check and return them."""
        losses: Tensor | None = extra.pop(NAME, None)
        n = 0 if losses is None else length_of(losses)
        if self._members is None:
            self._members = n
        elif n != self._members:
            raise ValueError(
                f"training_step returned {n or 'no'} {NAME} after {self._members or 'none'} in an earlier micro-batch. "
                "Return one for each member with every micro-batch"
            )
        return losses

    def _add(self, loss: Tensor, of_members: Tensor | None, weight: float) -> float:
        """Add losses to the sums, and return the factor for the backward pass."""
        if weight == 0:
            return 0.0
        value = whole(loss.detach()).reshape(())
        each = None if of_members is None else whole(of_members.detach())
        if self.is_single and self.reduction == "mean":
            self.loss, self.member_losses = value, each
            return 1.0
        self._losses.append(value)
        if each is not None:
            self._losses_of_members.append(each)
        self._weights.append(weight)
        factor: float = (weight if self.reduction == "mean" else 1.0) * self._replicas * (self._unit or 1.0)
        return factor

    def _backward(self, loss: Tensor, factor: float, optimizer: Optimizer) -> None:
        if factor == 0 and self.trainer.world_size == 1:
            return
        if factor == 0 and not loss.requires_grad:  # the other ranks still wait for a backward pass
            loss = sum((param.sum() for param in self.pl_module.parameters() if param.requires_grad), loss)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self._earlier is None:
            if "on_before_backward" in self._hooks:
                run_hook(self.trainer, "on_before_backward", loss)
            self._earlier = []
            if not self.is_single and self.engine is None:
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
        """Make a backward pass, which the other ranks wait for, add exactly 0."""
        params = [param for param in self.pl_module.parameters() if param.requires_grad]
        if self.engine is not None or any(is_sharded(param) or is_slice(param) for param in params):
            # hooks on these parameters do not see the gradient; a member without a finite loss for a sample that counts
            # elsewhere has none anyway
            if not (self._members and self._is_repeated) and not bool(whole(loss.detach()).isfinite()):
                raise RuntimeError(
                    f"a micro-batch of weight 0 has a loss that is not finite on rank {self.trainer.global_rank}, "
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

    @torch.no_grad()
    def _average(self, backward: bool) -> None:
        """Turn the sums of losses and gradients into means over all samples of all ranks."""
        if not self._agrees:
            self._agrees = True
            compare(
                self.trainer,
                {f"the number of {NAME}": str(self._members)},
                "training_step returns different things: {}. Train the same members on every rank",
            )
        device = self.trainer.strategy.root_device
        precise = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(2 + (self._members or 0), dtype=precise, device=device)  # loss, members, weight
        if self._losses:
            losses = torch.stack(self._losses).to(device, precise).unsqueeze(0)
            if self._losses_of_members:
                losses = torch.cat([losses, torch.stack(self._losses_of_members, dim=1).to(device, precise)])
            weights = torch.tensor(self._weights, dtype=precise, device=device)  # one copy to the device
            sums = _row_sums([losses * weights if self.reduction == "mean" else losses, weights.unsqueeze(0)])
        if self.trainer.world_size > 1:
            # not an all-reduce, which may add up different elements in different orders
            gathered = sums.new_empty(self.trainer.world_size, len(sums))
            torch.distributed.all_gather([*gathered], sums)  # strategy.all_gather warns (Lightning 2.6.6, torch 2.13)
            sums = _row_sums([gathered.T])
        total_weight = sums[-1]
        if self.weight is not None and not total_weight:
            raise ValueError("weight returned 0 for every micro-batch: at least one must count. Check the function")
        self.loss, *_ = means = sums[:-1] / total_weight
        if self._members:
            self.member_losses = means[1:]
        # with more processes than replicas, each replica's share is in the sum several times
        total = total_weight * self._replicas / self.trainer.world_size if self._total is None else self._total
        self._factor = 1 / ((self._unit or 1.0) * total)
        if self.engine is None and backward:
            self.bring_to_mean(self.trainer.optimizers[0])
            for param, grad in self._earlier or ():
                param.grad = grad if param.grad is None else param.grad.add_(grad)
        if self._unit is None:
            self._unit = _power_of_two_near(1 / float(total))  # for the following steps


@contextmanager
def _accumulating(engine: Any) -> Iterator[None]:
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)


def _loss_of(output: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss and the other outputs of training_step."""
    extra = {}
    if isinstance(output, Mapping):
        extra = {name: value for name, value in output.items() if name != "loss"}
        output = output.get("loss")
    if output is None:
        raise RuntimeError(
            "training_step returned no loss, but every micro-batch is part of the full batch. Return a loss (return "
            "0 * loss for samples that should not count), or leave the samples out of the data"
        )
    if not isinstance(output, Tensor):
        raise TypeError(f"training_step must return the loss as a tensor, got {output!r} ({type(output).__name__})")
    if output.numel() != 1:
        raise ValueError(
            f"training_step must return one number, got a loss of shape {tuple(output.shape)}. Reduce it: loss.mean(), "
            f"or loss.sum() with FullBatch(reduction='sum'); for members, {{'loss': losses.sum(), '{NAME}': losses}}"
        )
    return output, extra


def _row_sums(rows: list[Tensor]) -> Tensor:
    """Add up each row of stacked matrices, in an order that does not depend on the number of rows."""
    return torch.cat(rows).contiguous().sum(dim=1)


def _as_weight(value: Any) -> float:
    """Return the result of the user's ``weight`` function as a number >= 0."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"weight must return one number for each micro-batch, got shape {tuple(value.shape)}")
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"weight must return a finite number >= 0 for each micro-batch, got {value!r}. Check the function passed "
            "to FullBatch(weight=...)"
        )
    return number


def _power_of_two_near(x: float) -> float:
    return 2.0 ** round(math.log2(x)) if 0 < x < math.inf else 1.0
