"""Fits under several strategies on one, two and three ranks, which save what they saw; for test_monitor_ranks.py."""

from __future__ import annotations

import os
from contextlib import contextmanager
from unittest import mock

import forks
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lit import Batches, Net, Recorder, trainer
from on_cpu import FSDPOnCPU
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_rprop import Rprop, StepSizeMonitor

WORLDS = (1, 2, 3)
STEPS = 6
WIDTHS = (3, 7, 1)  # of which no rank has as much as another
ALL = ("mean", "min", "max", "median", "q10", "std_log10", "at_lower_bound", "at_upper_bound", "lower_bound")
ALL += ("upper_bound", "sign_changed", "zero_gradient", "nonfinite_gradient")


class Wide(Net):
    """A network, spread as its strategy says; in float64, where that has it, whose rounding leaves no sign in doubt."""

    def __init__(self, make, spread=None, dtype=torch.float64):
        super().__init__(make)
        layers = torch.nn.Linear(WIDTHS[0], WIDTHS[1]), torch.nn.Tanh(), torch.nn.Linear(WIDTHS[1], WIDTHS[2])
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*layers).double()
        for layer in layers[::2]:
            torch.nn.init.normal_(layer.weight)
        self.net.to(dtype)
        self.spread = spread
        self.inputs = dtype

    def training_step(self, batch, batch_idx):
        batch = batch.to(self.inputs)
        return (self.net(batch) - batch.sum(dim=1, keepdim=True)).square().mean()

    def configure_model(self):
        if self.spread is not None:
            self.spread(self.net, self.device_mesh)


def fully(net, mesh):
    fully_shard(net[0], mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def columns(net, mesh):
    """Share out the first layer by its outputs; the second one is on every rank, as plain tensors."""
    parallelize_module(net[0], mesh["tensor_parallel"], ColwiseParallel(output_layouts=Replicate()))


def columns_and_rows(net, mesh):
    """Share out the second layer too, by its inputs; its bias is on every rank, as a DTensor."""
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    parallelize_module(net, mesh["tensor_parallel"], plan)


@contextmanager
def counted(calls):
    """Count the gatherings."""
    original = dist.all_gather

    def gather(*args, **kwargs):
        calls.append(args[1].numel())
        return original(*args, **kwargs)

    with mock.patch.object(dist, "all_gather", gather):
        yield


def plain(params):
    return Rprop(params, lr=0.1, step_sizes=(1e-3, 0.15), foreach=False, fused=False)


def zero(params):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here, as it warns where it is imported

    return ZeroRedundancyOptimizer(
        params, optimizer_class=Rprop, lr=0.1, etas=(0.5, 1.2), step_sizes=(1e-3, 0.15), foreach=False, fused=False
    )


def fit(strategy, make=plain, spread=None, dtype=torch.float64):
    log, calls = Recorder(), []
    monitor = StepSizeMonitor(statistics=ALL, per_parameter=True, every_n_steps=2, histogram=True)
    devices = int(os.environ["WORLD_SIZE"])
    fitter = trainer(".", [monitor], logger=log, devices=devices, strategy=strategy, max_steps=STEPS, max_epochs=-1)
    module = Wide(lambda m: make(m.parameters()), spread, dtype)
    with counted(calls):
        fitter.fit(module, Batches(STEPS))
    metrics = {k: v.item() for k, v in fitter.callback_metrics.items() if k.startswith("step_size")}
    return {"records": log.records(), "metrics": metrics, "gathered": calls, "plot": monitor._history.series()}


def fits(rank, world):
    """Fit under all strategies that the number of ranks has."""
    seen = {"ddp": fit(DDPStrategy())}
    if world == 1:
        seen["fsdp"] = fit(DDPStrategy(), dtype=torch.float32)  # what there is to compare with
    else:
        seen["zero"] = fit(DDPStrategy(), zero)
        seen["fsdp"] = fit(FSDPOnCPU(), dtype=torch.float32)
        seen["fsdp2"] = fit(ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), spread=fully)
        for way, spread in (("columns", columns), ("columns and rows", columns_and_rows)):
            strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world)
            seen[way] = fit(strategy, spread=spread)
    torch.save(seen, f"{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, fits)
