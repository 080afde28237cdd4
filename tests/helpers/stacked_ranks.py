"""Train stacked members with several strategies on one, two and three ranks, and save the results."""

from __future__ import annotations

import sys

import forks
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lit import WEIGHTS_ONLY
from strategy_ranks import OPTIONS, PATHS, SAMPLES, VARIANTS, Begin, loader, make_trainer, parameters, run, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from whole_set import whole_numbers

from lightning_rprop import FullBatchLoader, KeepBest, Rprop, Stacked

FEW = 5  # samples
MEMBERS, STEPS, SAVED_AT, BAD_AT, BAD = 5, 30, 21, 9, 3  # member BAD gets a loss of NaN at step BAD_AT
STRATEGIES = ("ddp", "fsdp2", "spread")
WORLDS = (1, 2, 3)
RESUMED = {1: 3, 3: 2}  # ranks that resume, and ranks that saved


def towers(seed=0):
    """Return a function that makes networks whose outputs, losses and gradients are exact."""
    generator = torch.Generator().manual_seed(seed)

    def make():
        tower = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)).double()
        for param in tower.parameters():
            param.data = torch.randint(-4, 5, param.shape, generator=generator).double() / 4
        return tower

    return make


def with_bad_loss(losses, step):
    bad = torch.arange(MEMBERS) == BAD
    return losses + torch.where(bad & (step == BAD_AT), torch.nan, 0.0)


class Fit(pl.LightningModule):
    """Trains one Stacked per variant, each with another implementation."""

    def __init__(self, spread=None):
        super().__init__()
        self.spread = spread
        self.stacks = nn.ModuleList(Stacked(towers(), MEMBERS) for _ in VARIANTS)

    def configure_model(self):
        if self.spread is not None:
            for stacked in self.stacks:
                self.spread(stacked, self.device_mesh)

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = sum((stacked(x) - y).abs().sum(dim=(1, 2)) for stacked in self.stacks)
        losses = with_bad_loss(losses, self.global_step)
        return {"loss": losses.sum(), "member_losses": losses}

    def configure_optimizers(self):
        groups = [
            {"params": stacked.parameters(), "variant": variant, **PATHS[i % len(PATHS)]}
            for i, (stacked, variant) in enumerate(zip(self.stacks, VARIANTS, strict=True))
        ]
        return Rprop(groups, **OPTIONS)


def shard_rows(name, module, mesh):
    for key, param in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])))


def spread(stacked, mesh):
    distribute_module(stacked, mesh["tensor_parallel"], shard_rows)


def fully(stacked, mesh):
    fully_shard(stacked, mesh=mesh["data_parallel"], reshard_after_forward=True)


def make(name, world):
    """Return a strategy and its module."""
    if name == "spread":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world), Fit(spread)
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), Fit(fully)
    return DDPStrategy(), Fit()


def fit(name, world, ckpt_path=None, data=None):
    """Train to the end and return the parameters, and what KeepBest has found."""
    strategy, module = make(name, world)
    data = data or loader(32 if name == "spread" else 8)
    keep, begin = KeepBest(restore=False), Begin()
    saved = ModelCheckpoint(".", f"{name}-{world}", every_n_train_steps=SAVED_AT)
    callbacks = [keep, begin, *([saved] if ckpt_path is None else [])]
    fitter = make_trainer(strategy, STEPS, callbacks, enable_checkpointing=ckpt_path is None)
    fitter.fit(module, data, ckpt_path=ckpt_path, **WEIGHTS_ONLY)
    return {
        "params": parameters(strategy, module),
        "best": (keep.best_loss, keep.best_step),
        "from": begin.step,
        "retreats": float(fitter.optimizers[0].retreats),
    }


def resume(name, world):
    return fit(name, world, f"{name}-{RESUMED[world]}.ckpt")


def fit_few(name, world):
    """Train on so few samples that a rank repeats one, to run as many micro-batches as the others."""
    return fit(name, world, data=FullBatchLoader(whole_numbers(FEW), 1, steps_per_epoch=10))


class Features(nn.Module):
    """Has a different buffer in each member."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 1).double()
        self.register_buffer("scale", torch.rand(5).double())

    def forward(self, x):
        return self.linear(torch.sin(x * self.scale))


def train(stacked, steps=30):
    """Train in a plain loop and return the last losses."""
    optimizer = Rprop(stacked.parameters(), variant="irprop+")
    optimizer.shared_loss = True
    x, y = whole_numbers(SAMPLES)
    for step in range(steps):
        losses = (stacked(x) - y).square().mean(dim=(1, 2))
        losses = losses + torch.where((torch.arange(len(stacked)) == 1) & (step == BAD_AT), torch.nan, 0.0)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step(loss=losses)
    return losses.detach()


def refused(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def plain(rank, world):
    """Train without a Trainer, and with fewer members than ranks."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))
    x, _ = whole_numbers(SAMPLES)
    seen = {}
    for n in (5, 2):
        for how in ("spread", "fsdp2"):
            torch.manual_seed(0)
            stacked = Stacked(Features, n, chunk_size=2)
            if how == "spread":
                distribute_module(stacked, mesh, shard_rows)
            else:
                fully_shard(stacked, mesh=mesh)
            losses = train(stacked)
            seen[how, n] = {
                "losses": losses,
                "params": [whole(param) for param in stacked.parameters()],
                "member": stacked.member(n - 1).state_dict(),
                "each": stacked.forward_each(x.expand(n, -1, -1)).detach() if how == "spread" else None,
                "derivative": refused(lambda s=stacked: s(x.clone().requires_grad_())),
            }
    stacked = Stacked(Features, 2)
    fully_shard(stacked.linear, mesh=mesh)
    seen["child"] = refused(lambda: stacked(x))
    stacked = Stacked(Features, 2)
    shard_rows("", stacked.linear, mesh)
    stacked.linear.bias = nn.Parameter(whole(stacked.linear.bias))
    seen["mixed"] = refused(lambda: stacked(x))
    torch.save(seen, f"plain-{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["plain"]:
        for world in WORLDS[1:]:
            forks.run(world, plain)
        sys.exit()
    for world in WORLDS:
        run("fit", world, fit, STRATEGIES)
    for world in RESUMED:
        run("resume", world, resume, STRATEGIES)
    run("few", 3, fit_few, ["fsdp2"])
