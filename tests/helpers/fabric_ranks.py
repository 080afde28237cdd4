"""Trains with the loop of examples/fabric.py on one and two ranks, which save what came out; for test_examples.py."""

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
SAMPLES = 64  # a power of two, by which the mean divides sums exactly


def ragged():
    """Samples that neither micro-batches nor ranks divide evenly."""
    return tuple(t.double() for t in make_data(103))


def network():
    net = torch.nn.Linear(5, 1, dtype=torch.float64)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    return net


def optimizer(params):
    """Step sizes, and so weights, stay multiples of 2^-10."""
    return Rprop(params, lr=0.25, etas=(0.5, 2.0), step_sizes=(2**-10, 4.0), variant="irprop+")


def fits(rank, world):
    """Train half-way, from there to the end, and as a whole."""
    fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    fabric.launch()
    seen = {}
    for name, steps, resume in (("half", STEPS // 2, None), ("resumed", STEPS, "fabric.ckpt"), ("whole", STEPS, None)):
        net = network()
        fit(fabric, net, optimizer(net.parameters()), FullBatchLoader(whole_numbers(SAMPLES), SIZE), steps, resume)
        seen[name] = [p.detach() for p in net.parameters()]
    net = network()
    fit(fabric, net, optimizer(net.parameters()), FullBatchLoader(ragged(), SIZE), 0)
    seen["gradient"] = [p.grad for p in net.parameters()]  # of the loss that it tells at the end
    torch.save(seen, f"{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, fits)
