"""Fit all cases on one, two and three ranks and save the results for test_full_batch_ranks.py."""

from __future__ import annotations

import os

import forks
import lightning.pytorch as pl
import torch
from fitting import Doubling, Losses, Reiterable
from lightning.pytorch.strategies import DDPStrategy
from lit import trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, make_data, whole_numbers

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

WORLDS = (1, 2, 3)
SAMPLES = 96  # in the cases of whole numbers


class CountReductions(pl.Callback):
    """Counts the gradient all-reduces."""

    def __init__(self):
        self.count = 0

    def on_train_start(self, trainer, pl_module):
        def hook(state, bucket):
            self.count += 1
            return allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)


class Shared(Regression):
    """Logs its rank at the end of a step, which is weighted by the rank's samples."""

    def training_step(self, batch, batch_idx):
        if self.log_options:
            self.log("own", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.log_options:
            self.log("rank", float(self.global_rank), on_step=False, on_epoch=True, sync_dist=True)


def fit(loader, steps, make, reduction="mean", weight=None, **log):
    module = Shared(make, reduction, **log)
    count, losses = CountReductions(), Losses()
    fitter = trainer(
        ".",
        [count, losses, FullBatch(reduction, weight)],
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=DDPStrategy(),
        max_steps=steps,
        max_epochs=-1,
    )
    fitter.fit(module, loader)
    return {
        "gradient": module.gradients[0],
        "parameters": [p.detach() for p in module.parameters()],
        "losses": losses.losses,
        "reductions": count.count,
        "targets": module.targets,
        "metrics": dict(fitter.callback_metrics),
    }


def cases(world):
    """Yield name and results of each case, most with few steps."""
    plus = lambda params: Rprop(params, variant="irprop+")  # noqa: E731
    for n, sizes in ((103, (None, 1, 8, 50, 102, 103)), (2, (None, 1)), (129, (64,))):
        for size in sizes:
            for reduction in ("mean", "sum"):
                if size == 1 and n > 100 and reduction == "sum":
                    continue
                loader = FullBatchLoader(make_data(n), size, steps_per_epoch=2)
                yield (n, size, reduction), fit(loader, 3, plus, reduction)
    x, y = make_data(103)
    stream = DataLoader(TensorDataset(x, y), batch_size=10)
    yield "DataLoader", fit(FullBatchLoader(stream), 3, plus)
    yield "weight", fit(FullBatchLoader(stream), 3, plus, weight=lambda batch: torch.tensor(float(len(batch[0]))))
    short = DataLoader(TensorDataset(*make_data(2)), batch_size=1)
    yield "short DataLoader", fit(FullBatchLoader(short), 3, plus)
    rank = int(os.environ["RANK"])
    own = [(x[i : i + 9], y[i : i + 9]) for i in range(9 * rank, 103, 9 * world)]  # the numbers of batches differ
    yield "own batches", fit(FullBatchLoader(Reiterable(*own)), 3, plus)
    loader = FullBatchLoader((x, y), 8, steps_per_epoch=2)
    yield "log", fit(loader, 2, plus, on_step=True, on_epoch=True, sync_dist=True)
    few = FullBatchLoader(make_data(2), steps_per_epoch=2)
    yield "log of few", fit(few, 2, plus, on_step=True, on_epoch=True, sync_dist=True)
    yield "max_iter", fit(loader, 3, lambda params: Rprop(params, max_iter=4))
    yield "LBFGS", fit(loader, 2, lambda params: torch.optim.LBFGS(params, max_iter=3))
    yield "whole numbers", fit_whole_numbers()
    yield from weights_of_zero(world)
    module = NoGraph()
    exact = FullBatch(weight=count)
    fitter = trainer(".", [exact], devices=world, strategy=DDPStrategy(), max_steps=1, max_epochs=-1)
    fitter.fit(module, FullBatchLoader(masked(96, range(8)), 8))
    yield "no graph", [p.detach() for p in module.parameters()]
    yield "sum of the first step", fitter.callback_metrics["sum"].item()
    doubled = Doubling(TensorDataset(x / 2, y), batch_size=10)
    yield "DataLoader with its own __iter__", fit(FullBatchLoader(doubled), 3, plus)
    for name, loader, options in different(rank):
        try:
            fit(loader, 1, plus, **options)
        except ValueError as error:
            yield name, str(error)


class NoGraph(Regression):
    """Returns a loss without a graph where no sample counts, and logs the number of micro-batches on all ranks."""

    def training_step(self, batch, batch_idx):
        self.log("sum", torch.ones(()), on_step=True, reduce_fx="sum", sync_dist=True)
        return super().training_step(batch, batch_idx) if batch[1].isfinite().all() else torch.zeros(())


class Masked(Regression):
    """Trains on the mean over samples with a target; without any, loss and gradient are NaN."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        counts = y.isfinite()
        squares = (self.net(x) - y.nan_to_num()).square()
        loss = (squares * counts).sum() / counts.sum()
        self.log("logged", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


def count(batch):
    return batch[1].isfinite().sum()


def masked(n, counted):
    """Return samples of which only the counted ones have a target."""
    x, y = make_data(n)
    return x, torch.where(torch.tensor([i in counted for i in range(n)]).unsqueeze(1), y, torch.nan)


def weights_of_zero(world):
    """Yield cases with zero-weight micro-batches: some, all of a rank, and a filler."""
    for name, n, counted, size in (
        ("some", 96, [*range(8), *range(20, 40)], 8),
        ("first rank only", 96, [*range(10)], 8),
        ("last rank only", 96, [*range(90, 96)], 8),
        ("filler", 2, [1], None),
    ):
        data = masked(n, counted)
        streamed = DataLoader(TensorDataset(*data), batch_size=size or 1)
        for kind, loader in (("held", FullBatchLoader(data, size)), ("streamed", FullBatchLoader(streamed))):
            module, losses = Masked(Rprop), Losses()
            fitter = trainer(
                ".",
                [losses, FullBatch(weight=count)],
                devices=world,
                strategy=DDPStrategy(),
                max_steps=3,
                max_epochs=-1,
            )
            fitter.fit(module, loader)
            metrics = {name: value.item() for name, value in fitter.callback_metrics.items()}
            found = {"gradient": module.gradients[0], "losses": losses.losses, "metrics": metrics, "counted": counted}
            yield ("zero", name, kind), {**found, "n": n, "parameters": [p.detach() for p in module.parameters()]}


def different(rank):
    """Yield loaders and options that differ between the ranks."""
    x, y = make_data(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(rank))
    yield "different data", FullBatchLoader(make_data(10 + rank)), {}
    yield "different order", FullBatchLoader((x[order], y[order])), {}
    yield "different order streamed", FullBatchLoader(DataLoader(TensorDataset(x[order], y[order]), batch_size=4)), {}
    data = TensorDataset(x, y)
    yield "different batch sizes", FullBatchLoader(DataLoader(data, batch_size=3 + rank)), {}
    yield "different samplers", FullBatchLoader(DataLoader(data, batch_size=4, sampler=order.tolist())), {}
    yield "different steps", FullBatchLoader((x, y), steps_per_epoch=1 + rank), {}
    yield "different sizes", FullBatchLoader((x, y), 4 + rank), {}
    yield "different reductions", FullBatchLoader((x, y)), {"reduction": ("mean", "sum")[rank % 2]}
    yield "different weights", FullBatchLoader((x, y)), {"weight": None if rank else lambda batch: len(batch[0])}
    held, streamed = FullBatchLoader((x, y)), FullBatchLoader(DataLoader(TensorDataset(x, y), batch_size=4))
    yield "held and streamed", held if rank else streamed, {}


class Absolute(Regression):
    """A linear model with the absolute error, so that gradients are sums of inputs."""

    def __init__(self, make):
        torch.manual_seed(0)
        super().__init__(make, net=torch.nn.Linear(5, 1).double())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).abs().mean()

    def on_before_optimizer_step(self, optimizer):
        pass


def halving(params):
    """Return an optimizer whose step sizes stay powers of two."""
    return Rprop(params, lr=0.25, etas=(0.5, 2.0), step_sizes=(2**-20, 4.0))


def fit_whole_numbers(size=7):
    module = Absolute(halving)
    fitter = trainer(
        ".", [FullBatch()], devices=int(os.environ["WORLD_SIZE"]), strategy=DDPStrategy(), max_steps=500, max_epochs=-1
    )
    fitter.fit(module, FullBatchLoader(whole_numbers(SAMPLES), size, steps_per_epoch=100))
    return {"parameters": [p.detach() for p in module.parameters()]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, lambda rank, world: torch.save(dict(cases(world)), f"{world}-{rank}.pt"))
