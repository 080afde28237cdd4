"""Fit with KeepBest on one, two and three ranks, resume elsewhere, and save the results for test_keep_best_ranks.py."""

from __future__ import annotations

import sys

import deepspeed_ranks
import forks
import torch
from best_walks import move
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import WEIGHTS_ONLY
from on_cpu import DeepSpeedOnCPU
from strategy_ranks import SAMPLES, Begin, Fit, loader, make, make_trainer, parameters, run, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from whole_set import whole_numbers

from lightning_rprop import BestWeights, FullBatchLoader, KeepBest
from lightning_rprop.best import weights

STRATEGIES = ("ddp", "zero", "fsdp2")
STAGES = (1, 2, 3)  # of DeepSpeed ZeRO
WORLDS = (2, 3)
MEMBERS = (2, 5)  # fewer than ranks, and more
STEPS, EVERY = 20, 9  # saves before and after the best step
RESUMED = {1: (3, EVERY), 2: (3, 2 * EVERY), 3: (2, EVERY)}  # ranks that resume: the ranks that saved, and the step


class Validated(Fit):
    """Evaluates after each epoch, which leaves the root module of FSDP2 with whole parameters."""

    def validation_step(self, batch, batch_idx):
        self.net(*batch)


def fit(name, world, ckpt_path=None, callbacks=()):
    """Train to the end and return what KeepBest found, the parameters, and their loss."""
    strategy, module, size = make(name, world)
    module.__class__ = Validated
    keep = KeepBest()
    trainer = make_trainer(strategy, STEPS, [keep, *callbacks], enable_checkpointing=bool(callbacks))
    data = whole_numbers(SAMPLES)
    validation = FullBatchLoader(data)
    trainer.fit(module, loader(size), validation, ckpt_path=ckpt_path, **WEIGHTS_ONLY)
    return {
        "found": (keep.best_loss, keep.best_step),
        "loss": whole(module.net(*data)).item() / SAMPLES,
        "params": parameters(trainer.strategy, module),
    }


def fit_and_save(name, world):
    saves = ModelCheckpoint(".", f"{name}-{world}-{{step}}", every_n_train_steps=EVERY, save_top_k=-1)
    return fit(name, world, callbacks=[saves])


def resume(name, world):
    """Resume what ``"ddp-2-13"`` names: a strategy, the number of ranks that saved it, and the step."""
    begin = Begin()
    strategy, saved_on, step = name.split("-")
    seen = fit(strategy, world, f"{strategy}-{saved_on}-step={step}.ckpt", [begin])
    return seen | {"from": begin.step}


def plain(rank, world):
    """Use BestWeights on shards in a plain loop, as with losses on the host and on an accelerator."""
    torch.distributed.init_process_group("gloo")
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    seen = []
    for on_host in (True, False):
        weights.is_on_host = lambda tensor, on_host=on_host: on_host
        best = BestWeights(net)  # the second one finds the whole parameters that an evaluation has left
        for value, loss in ((1.0, 3.0), (2.0, 1.0), (3.0, 2.0)):
            with torch.no_grad():
                for param in net.parameters():
                    param.fill_(value)
            best.update(torch.tensor(loss))
        with torch.no_grad():
            net(torch.ones(2, 3))
        best.restore()
        with torch.no_grad():
            seen.append((net(torch.ones(1, 3)), best.state_dict()["tensors"]))
    torch.save(seen, f"plain-{rank}.pt")
    torch.distributed.destroy_process_group()


def members(rank, world):
    """Keep the best of members that are spread over the ranks, resume on others, and restore."""
    torch.distributed.init_process_group("gloo")
    mesh, seen = init_device_mesh("cpu", (world,)), {}

    def spread(params):
        return [torch.nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])) for param in params]

    for n in MEMBERS:
        for place, on_host in (("host", True), ("device", False)):
            weights.is_on_host = lambda tensor, on_host=on_host: on_host
            params, others = spread(member_params(n)), member_params(n)
            best, apart, again = BestWeights(params), BestWeights(others), BestWeights(spread(member_params(n)))
            for losses in member_losses(n):
                best.update(losses if on_host else distribute_tensor(losses, mesh, [Shard(0)]))
                move(params)
            apart.load_state_dict(best.state_dict())  # as a checkpoint of another number of ranks
            again.load_state_dict(apart.state_dict())
            best.restore()
            apart.restore()
            seen[n, place] = {
                "found": (best.loss, best.step),
                "params": [param.detach().full_tensor() for param in params],
                "apart": others,
                "again": again.state_dict()["tensors"],
            }
    torch.save(seen, f"members-{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


def member_params(n):
    return [torch.arange(n * 6.0).reshape(n, 3, 2), torch.zeros(n)]


def member_losses(n):
    """Return losses of each update; the last member never has a finite one."""
    losses = torch.randn(6, n, generator=torch.Generator().manual_seed(n))
    losses[:, -1] = torch.nan
    return losses


def deepspeed(rank, world):
    """Train and resume in each ZeRO stage."""
    seen = {}
    for stage in STAGES:
        for path in (None, f"{stage}.ckpt"):
            keep = KeepBest()
            saves = [ModelCheckpoint(".", f"{stage}", every_n_train_steps=45)] if path is None else []  # after the best
            callbacks = [keep, *saves]
            params = deepspeed_ranks.fit(stage, path, callbacks=callbacks, enable_checkpointing=bool(saves))
            seen[stage, path] = {"found": (keep.best_loss, keep.best_step), "params": params}
    torch.save(seen, f"deepspeed-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["deepspeed"]:
        DeepSpeedOnCPU(0)  # imports DeepSpeed, once for all ranks
        forks.run(2, deepspeed)
        sys.exit()
    for world in WORLDS:
        run("fit", world, fit_and_save, STRATEGIES)
    for world, (saved_on, step) in RESUMED.items():
        run("resume", world, resume, [f"{name}-{saved_on}-{step}" for name in STRATEGIES])
    forks.run(2, plain)
    for world in WORLDS:
        forks.run(world, members)
