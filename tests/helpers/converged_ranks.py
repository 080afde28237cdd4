"""Fit until convergence under several strategies on two and three ranks, and save the results for a test."""

from __future__ import annotations

from unittest import mock

import forks
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lit import trainer
from strategy_ranks import loader, make, make_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from whole_set import make_data

from lightning_rprop import Converged, Convergence, Rprop
from lightning_rprop.convergence import _small, criteria

WORLDS = (2, 3)
STRATEGIES = ("ddp", "zero", "fsdp", "fsdp2", "columns and rows")
SAMPLES = 60
# Options and the step of convergence. Losses, gradients and step sizes are exact in every strategy. In the last case,
# the step sizes of some parameters would be small enough at step 4.
CRITERIA = {
    "change": ({"tolerance_change": 1e-2, "tolerance_grad": None, "patience": 5}, 35),
    "grad": ({"tolerance_change": None, "tolerance_grad": 0.92, "patience": 1}, 23),
    "step": ({"tolerance_change": None, "tolerance_grad": None, "tolerance_step": 2.0, "patience": 6}, 6),
    "smaller step": ({"tolerance_change": None, "tolerance_grad": None, "tolerance_step": 1.0, "patience": 4}, None),
}


class Counting(Converged):
    """Counts its own all-reduces."""

    count = 0

    def on_train_batch_end(self, *args):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            super().on_train_batch_end(*args)
        self.count += all_reduce.call_count


def fit(name, world, options, steps):
    strategy, module, size = make(name, world)
    converged = Counting(**options)
    fitter = make_trainer(strategy, steps, callbacks=[converged])
    fitter.fit(module, loader(size))
    return {"steps": fitter.global_step, "reason": converged.reason, "reductions": converged.count}


class Linear(pl.LightningModule):
    """A linear regression that counts its evaluations."""

    def __init__(self, max_iter):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(5, 1).double()
        self.max_iter, self.evaluations = max_iter, 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 1
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        return Rprop(self.parameters(), max_iter=self.max_iter)


class Repeated:
    """An iterable that yields the same batch ten times."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        return iter([self.batch] * 10)


def fit_own(rank, world, max_iter, folder="."):
    """Fit without FullBatch; each rank has other samples."""
    share = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    batch = [part.double()[share] for part in make_data(SAMPLES)]
    converged, module = Converged(1e-3, None, patience=3), Linear(max_iter)
    strategy = DDPStrategy() if world > 1 else "auto"
    fitter = trainer(folder, [converged], strategy=strategy, devices=world, max_steps=300, max_epochs=-1)
    fitter.fit(module, Repeated(batch))
    return {"steps": fitter.global_step, "reason": converged.reason, "evaluations": module.evaluations}


def converge(world):
    """Return the step of convergence in a plain loop over a DTensor, for each place of the largest gradient entry."""
    mesh, found = init_device_mesh("cpu", (world,)), {}
    for kind, placement in (("shard", Shard(0)), ("replica", Replicate()), ("partial", Shard(0))):
        for place in range(5):
            param = torch.nn.Parameter(distribute_tensor(torch.zeros(5, 2), mesh, [placement]))
            convergence = Convergence(None, 0.25, patience=2)
            for step in range(1, 9):
                grad = torch.zeros(5, 2)
                grad[place, 1] = -(2.0**-step)
                if kind == "partial":  # a sum over the ranks, as tensor parallelism leaves it
                    grad = DTensor.from_local(grad * (3, -2, 0)[dist.get_rank()], mesh, [Partial()])
                else:
                    grad = distribute_tensor(grad, mesh, [placement])
                param.grad = None  # whose placement may differ from that of the next one
                param.grad = grad
                if convergence.update(1.0, [param]):
                    break
            found[kind, place] = step
    return found


def converge_members(world):
    """Return the steps and reasons of convergence of whole members and of those spread over ranks, in both places."""
    mesh, found = init_device_mesh("cpu", (world,)), []
    for n in (2, 5):  # fewer than ranks, and more
        for arguments in ((1e-1, None, None, 2), (None, 0.25, None, 2), (None, None, 0.02, 2)):
            for members in ("all", "best"):
                whole = torch.linspace(-1.9, 1, 2 * n, dtype=torch.float64).reshape(n, 2)
                spread = distribute_tensor(whole, mesh, [Shard(0)])
                found.append([play_members(param, arguments, members) for param in (whole, spread)])
                with (
                    mock.patch.object(criteria, "is_on_host", return_value=False),
                    mock.patch.object(_small, "is_on_host", return_value=False),
                ):
                    found[-1].append(play_members(spread, arguments, members))
    return found


def play_members(param, arguments, members):
    """Return the step and the reason of convergence of a plain loop over the members, one of which has a NaN loss."""
    param = torch.nn.Parameter(param.clone())
    optimizer, convergence = Rprop([param], lr=0.5), Convergence(*arguments, members)
    for step in range(100):
        losses = (param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()).square().sum(1) + 1
        losses[0] = torch.nan
        param.grad = 2 * param.detach()
        optimizer.step()
        if convergence.update(losses, optimizer):
            return step, convergence.reason
    return None


def fits(rank, world):
    """Run all cases; those of strategies only on two ranks."""
    cases = [
        (name, key)
        for name in (STRATEGIES if world == 2 else ())
        for key in (CRITERIA if name == "ddp" else ("grad", "step", "smaller step"))
    ]
    seen = {
        "fits": {
            (name, key): fit(name, world, CRITERIA[key][0], 50 if CRITERIA[key][1] else 10) for name, key in cases
        },
        "own": {max_iter: fit_own(rank, world, max_iter) for max_iter in (1, 8)},
        "plain": converge(world),
        "members": converge_members(world),
    }
    torch.save(seen, f"{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, fits)
