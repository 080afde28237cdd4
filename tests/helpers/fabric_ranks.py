"""Train with the loop of examples/fabric.py on one and two ranks and save the results for test_examples.py."""

from __future__ import annotations

import sys
from pathlib import Path

import forks
import torch
from lightning.fabric import Fabric
from whole_set import make_data, whole_numbers

from lightning_rprop import FullBatchLoader, Rprop

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from fabric import fit

WORLDS = (1, 2)
STEPS = 60
SIZE = 8
SAMPLES = 64  # a power of two, so that the mean is exact


def ragged():
    """Return samples that neither micro-batches nor ranks divide evenly."""
    return tuple(t.double() for t in make_data(103))


def network():
    """Return a linear model whose parameters are 0."""
    net = torch.nn.Linear(5, 1, dtype=torch.float64)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    return net


def optimizer(params):
    """Return an optimizer whose step sizes, and so the parameters, stay multiples of 2^-10."""
    return Rprop(params, lr=0.25, etas=(0.5, 2.0), step_sizes=(2**-10, 4.0), variant="irprop+")


def fits(rank, world):
    """Train the first half of a run, the resumed run and the whole run, and save the results."""
    fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    fabric.launch()
    seen = {}
    for name, steps, resume in (("half", STEPS // 2, None), ("resumed", STEPS, "fabric.ckpt"), ("whole", STEPS, None)):
        net = network()
        fit(fabric, net, optimizer(net.parameters()), FullBatchLoader(whole_numbers(SAMPLES), SIZE), steps, resume)
        seen[name] = [p.detach() for p in net.parameters()]
    net = network()
    fit(fabric, net, optimizer(net.parameters()), FullBatchLoader(ragged(), SIZE), 0)
    seen["gradient"] = [p.grad for p in net.parameters()]  # of the loss reported at the end
    torch.save(seen, f"{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, fits)
