"""What one rank does in test_agreement.py: it tries to fit what differs between the ranks, and prints the errors."""

from __future__ import annotations

import json
import os
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lit import trainer
from torch import nn
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor

RANK = int(os.environ.get("RANK", "0"))  # no rank where the tests are only collected


class Layers(Regression):
    def __init__(self, make, width=8, bias=True):
        super().__init__(make, net=nn.Sequential(nn.Linear(5, width, bias=bias), nn.Linear(width, 1, bias=bias)))


def two_groups(params, **options):
    first, *others = params
    return Rprop([{"params": [first]}, {"params": others, **options}], lr=0.1)


CASES = {
    "same": lambda: Layers(Rprop),
    "lr": lambda: Layers(lambda params: Rprop(params, lr=(1 + RANK) / 10)),
    "variant": lambda: Layers(lambda params: Rprop(params, variant="irprop+" if RANK == 2 else "irprop-")),
    "group": lambda: Layers(lambda params: two_groups(params, etas=(0.5, 1.2 if RANK == 0 else 1.5))),
    "width": lambda: Layers(Rprop, width=8 + RANK),
    "bias": lambda: Layers(Rprop, bias=RANK != 1),
    "path": lambda: Layers(lambda params: Rprop(params, fused=RANK == 1, lr=torch.tensor(0.1))),
    "adam": lambda: Layers(lambda params: torch.optim.Adam(params, lr=(1 + RANK) / 10)),
    "parameters": lambda: Layers(lambda params: Rprop([*params][RANK == 1 :])),
}


def fit(name, callbacks):
    """The error, and how many numbers the collectives took that were to find it."""
    calls = []
    original = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        fitter = trainer(".", callbacks, strategy=DDPStrategy(), devices=int(os.environ["WORLD_SIZE"]), max_steps=2)
        try:
            fitter.fit(CASES[name](), FullBatchLoader(make_data(30)))
        except ValueError as error:
            return {"error": str(error), "collectives": calls}
    return {"error": None, "collectives": calls}


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = {name: fit(name, [FullBatch(), StepSizeMonitor()] if name == "same" else [FullBatch()]) for name in CASES}
    seen["monitor alone"] = fit("lr", [StepSizeMonitor()])
    print("seen", json.dumps(seen))
