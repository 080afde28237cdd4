"""Fit under several strategies on one, two and three ranks, and save the records for test_monitor_ranks.py."""

from __future__ import annotations

import os
from contextlib import contextmanager
from unittest import mock

import forks
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from on_cpu import FSDPOnCPU
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_rprop import Rprop, StepSizeMonitor

WORLDS = (1, 2, 3)
STEPS = 6
WIDTHS = (3, 7, 1)  # uneven shards on two and three ranks
ALL = ("mean", "min", "max", "median", "q10", "std_log10", "at_lower_bound", "at_upper_bound", "lower_bound")
ALL += ("upper_bound", "sign_changed", "zero_gradient", "nonfinite_gradient")


class Wide(Net):
    """A network that ``shard`` distributes. Float64, where supported, keeps rounding from flipping gradient signs."""

    def __init__(self, make, shard=None, dtype=torch.float64):
        super().__init__(make)
        layers = torch.nn.Linear(WIDTHS[0], WIDTHS[1]), torch.nn.Tanh(), torch.nn.Linear(WIDTHS[1], WIDTHS[2])
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*layers).double()
        for layer in layers[::2]:
            torch.nn.init.normal_(layer.weight)
        self.net.to(dtype)
        self.shard = shard
        self.inputs = dtype

    def training_step(self, batch, batch_idx):
        batch = batch.to(self.inputs)
        return (self.net(batch) - batch.sum(dim=1, keepdim=True)).square().mean()

    def configure_model(self):
        if self.shard is not None:
            self.shard(self.net, self.device_mesh)


def shard_fully(net, mesh):
    fully_shard(net[0], mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def shard_columns(net, mesh):
    """Shard the first layer by its outputs; every rank holds the second one as plain tensors."""
    parallelize_module(net[0], mesh["tensor_parallel"], ColwiseParallel(output_layouts=Replicate()))


def shard_columns_and_rows(net, mesh):
    """Shard the second layer too, by its inputs; every rank holds its bias as a DTensor."""
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    parallelize_module(net, mesh["tensor_parallel"], plan)


@contextmanager
def record_gathers(calls):
    """Append the number of elements of each all_gather to ``calls``."""
    original = dist.all_gather

    def gather(*args, **kwargs):
        calls.append(args[1].numel())
        return original(*args, **kwargs)

    with mock.patch.object(dist, "all_gather", gather):
        yield


def make_plain(params):
    return Rprop(params, lr=0.1, step_sizes=(1e-3, 0.15), foreach=False, fused=False)


def make_zero(params):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # imported here, because the import warns

    return ZeroRedundancyOptimizer(
        params, optimizer_class=Rprop, lr=0.1, etas=(0.5, 1.2), step_sizes=(1e-3, 0.15), foreach=False, fused=False
    )


def fit(strategy, make=make_plain, shard=None, dtype=torch.float64):
    log, calls = Recorder(), []
    monitor = StepSizeMonitor(statistics=ALL, per_parameter=True, every_n_steps=2, histogram=True)
    devices = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(
        ".", [monitor], logger=log, devices=devices, strategy=strategy, max_steps=STEPS, max_epochs=-1
    )
    module = Wide(lambda m: make(m.parameters()), shard, dtype)
    with record_gathers(calls):
        trainer.fit(module, Batches(STEPS))
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("step_size")}
    return {"records": log.records(), "metrics": metrics, "gathered": calls, "plot": monitor._history.series()}


def fits(rank, world):
    """Fit under every strategy that supports this number of ranks."""
    seen = {"ddp": fit(DDPStrategy())}
    if world == 1:
        seen["fsdp"] = fit(DDPStrategy(), dtype=torch.float32)  # the reference for FSDP
    else:
        seen["zero"] = fit(DDPStrategy(), make_zero)
        seen["fsdp"] = fit(FSDPOnCPU(), dtype=torch.float32)
        seen["fsdp2"] = fit(ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), shard=shard_fully)
        for way, shard in (("columns", shard_columns), ("columns and rows", shard_columns_and_rows)):
            strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world)
            seen[way] = fit(strategy, shard=shard)
    torch.save(seen, f"{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, fits)
