"""Fit models that differ between three ranks and save the errors for test_agreement.py."""

from __future__ import annotations

from unittest import mock

import forks
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lit import trainer
from torch import nn
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor

WORLD = 3


class Layers(Regression):
    def __init__(self, make, width=8, bias=True):
        super().__init__(make, net=nn.Sequential(nn.Linear(5, width, bias=bias), nn.Linear(width, 1, bias=bias)))


def two_groups(params, **options):
    first, *others = params
    return Rprop([{"params": [first]}, {"params": others, **options}], lr=0.1)


CASES = {
    "same": lambda rank: Layers(Rprop),
    "lr": lambda rank: Layers(lambda params: Rprop(params, lr=(1 + rank) / 10)),
    "variant": lambda rank: Layers(lambda params: Rprop(params, variant="irprop+" if rank == 2 else "irprop-")),
    "group": lambda rank: Layers(lambda params: two_groups(params, etas=(0.5, 1.2 if rank == 0 else 1.5))),
    "width": lambda rank: Layers(Rprop, width=8 + rank),
    "bias": lambda rank: Layers(Rprop, bias=rank != 1),
    "path": lambda rank: Layers(lambda params: Rprop(params, fused=rank == 1, lr=torch.tensor(0.1))),
    "adam": lambda rank: Layers(lambda params: torch.optim.Adam(params, lr=(1 + rank) / 10)),
    "parameters": lambda rank: Layers(lambda params: Rprop([*params][rank == 1 :])),
}


def fit(name, rank, callbacks):
    """Return the error and the number of elements in each all-reduce."""
    calls = []
    original = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        fitter = trainer(".", callbacks, strategy=DDPStrategy(), devices=WORLD, max_steps=2)
        try:
            fitter.fit(CASES[name](rank), FullBatchLoader(make_data(30)))
        except ValueError as error:
            return {"error": str(error), "collectives": calls}
    return {"error": None, "collectives": calls}


def fits(rank, world):
    """Fit all cases and save the results."""
    both = [FullBatch(), StepSizeMonitor()]
    seen = {name: fit(name, rank, both if name == "same" else [FullBatch()]) for name in CASES}
    seen["monitor only"] = fit("lr", rank, [StepSizeMonitor()])
    torch.save(seen, f"seen-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks.run(WORLD, fits)
