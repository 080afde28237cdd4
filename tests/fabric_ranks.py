"""What one rank does in test_examples.py: it trains with the loop of examples/fabric.py, and saves what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from whole_set import make_data

from lightning_rprop import FullBatchLoader, Rprop

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from fabric import fit

STEPS = 60
SIZE = 8


def dyadic():
    """Samples in float64, of which all sums are exact: as many as a power of two, by which the mean divides them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-4, 5, (64, 5), generator=generator).double()
    return x, torch.randint(-40, 41, (64, 1), generator=generator).double()


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    seen = {}
    for name, steps, resume in (("half", STEPS // 2, None), ("resumed", STEPS, "fabric.ckpt"), ("whole", STEPS, None)):
        net = network()
        fit(fabric, net, optimizer(net.parameters()), FullBatchLoader(dyadic(), SIZE), steps, resume)
        seen[name] = [p.detach() for p in net.parameters()]
    net = network()
    fit(fabric, net, optimizer(net.parameters()), FullBatchLoader(ragged(), SIZE), 0)
    seen["gradient"] = [p.grad for p in net.parameters()]  # of the loss that it tells at the end
    torch.save(seen, f"{fabric.world_size}-{fabric.global_rank}.pt")
