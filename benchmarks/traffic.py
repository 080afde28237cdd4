"""The bytes that ranks send to each other in a step: measured on one to three ranks, computed for more.

Every rank has the same number of samples in 8 micro-batches (weak scaling). Two things are measured: the bytes passed
to each kind of collective, and on Linux the bytes on the loopback interface for all ranks together. The latter is a
median over several fits, because other programs use the interface too. The peer is Lightning's
``accumulate_grad_batches`` on the same micro-batches.

Predicted before the first run, with B bytes of gradients and N ranks:

- FullBatch: one all-reduce of B, in DDP's buckets, and an all-gather of 16 bytes per rank for the loss and the
  number of samples.
- Lightning's accumulation: also one all-reduce of B, and a broadcast of 8 bytes for each micro-batch.
- A ring sends 2 (N - 1) / N B per rank, hence 2 (N - 1) B over the loopback, plus less than 1 % for headers.
- FSDP2: two all-gathers of the parameters and one reduce-scatter of the gradients for each micro-batch. Each of these
  sends (N - 1) / N B per rank, so 8 micro-batches need 12 times the bytes of DDP. (The loopback carries a third more,
  because gloo implements reduce-scatter by an all-reduce.)

    python -m benchmarks.traffic
    python -m benchmarks.traffic --json traffic.json
    python -m benchmarks.traffic --steps 4 --fits 1 --worlds 2
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.full_batch import Fit, data, fit, milliseconds
from benchmarks.problems import mlp
from benchmarks.ranks import answer, on_ranks
from benchmarks.report import machine, write_json
from benchmarks.step import CASES, OURS, bytes_moved, optimizer_program
from lightning_rprop import FullBatch, FullBatchLoader, Rprop

INTERFACES = Path("/proc/net/dev")  # Linux's
CUTS, SIZE = 8, 8  # micro-batches per rank, and samples per micro-batch
NETS = {"small": (20, 64, 64, 1), "large": (20, 1000, 960, 1)}
PEER, FSDP2 = "accumulate_grad_batches", "FullBatch, FSDP2"
PROGRAMS = ("FullBatch", PEER, FSDP2)
LINKS = {"10 Gbit/s": 1.25e9, "100 Gbit/s": 1.25e10}  # bytes per second
LOSS = 2 * 8  # FullBatch gathers the sum of the losses and the number of samples, in float64
FLAG = 8  # Lightning broadcasts with each of its batches whether to stop


class Collectives(TorchDispatchMode):
    """Counts this rank's collectives by kind, and their bytes; a sharded tensor counts as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_")
            self.calls[name] += 1
            if name != "barrier":  # its tensor is a dummy
                self.bytes[name] += max(sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args)
        return func(*args, **(kwargs or {}))


class Marks(pl.Callback):
    """Records the counts after each step."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.calls: list[Counter[str]] = []
        self.bytes: list[Counter[str]] = []
        self.loopback: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Record the counts if the optimizer made a step."""
        if trainer.global_step > len(self.calls):
            self.calls.append(Counter(self.collectives.calls))
            self.bytes.append(Counter(self.collectives.bytes))
            self.loopback.append(loopback())

    def per_step(self, found: list[Any]) -> Any:
        """Return the average increase per step, without the first two, in which DDP rebuilds its buckets."""
        first, last, steps = found[1], found[-1], len(found) - 2
        if isinstance(last, Counter):
            return {name: count / steps for name, count in (last - first).items()}
        return (last - first) / steps


def loopback() -> int:
    """Return the bytes that the loopback interface has carried; 0 if unknown."""
    lines = INTERFACES.read_text().splitlines() if INTERFACES.exists() else []
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


class Sharded(Fit):
    """The model with its layers sharded by FSDP2."""

    def configure_model(self) -> None:
        """Shard the layers."""
        mesh = self.device_mesh["data_parallel"]
        for layer in [*(layer for layer in self.net if isinstance(layer, nn.Linear)), self.net]:
            fully_shard(layer, mesh=mesh)


def train(net: str, program: str, world: int, steps: int, folder: str, *callbacks: pl.Callback) -> list[float]:
    """Fit with one of the programs; return when each training_step began."""
    module = (Sharded if program == FSDP2 else Fit)(Rprop)
    torch.manual_seed(0)
    module.net = mlp(*NETS[net])
    samples = data(world * CUTS * SIZE)
    options = {"devices": world, "strategy": DDPStrategy()}
    if program == FSDP2:
        options["strategy"] = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    if program == PEER:
        loader = DataLoader(TensorDataset(*samples), batch_size=SIZE)
        options |= {"callbacks": [*callbacks], "max_epochs": steps, "accumulate_grad_batches": CUTS}
    else:
        loader = FullBatchLoader(samples, SIZE, steps_per_epoch=steps)
        options |= {"callbacks": [FullBatch(), *callbacks], "max_epochs": 1}
    return fit(module, loader, folder, **options)


def as_rank(world: int, steps: int, fits: int, folder: str) -> list[dict[str, Any]]:
    """Run all programs as one of the ranks; return the counts of each."""
    rows = []
    for net in NETS:
        found: dict[str, list[Marks]] = {program: [] for program in PROGRAMS if program != FSDP2 or world > 1}
        for _ in range(fits):
            for program, seen in found.items():
                with Collectives() as collectives:
                    seen.append(Marks(collectives))
                    train(net, program, world, steps, folder, seen[-1])
        for program, seen in found.items():
            counts = {"calls": seen[0].per_step(seen[0].calls), "bytes": seen[0].per_step(seen[0].bytes)}
            carried = (
                statistics.median(marks.per_step(marks.loopback) for marks in seen) if INTERFACES.exists() else None
            )
            rows.append({"net": net, "program": program, "world": world, **counts, "loopback": carried})
    return rows


def weights(net: str, ranks: int = 1) -> int:
    """Return the bytes of a network's parameters; FSDP2 pads the rows of each to a multiple of the ranks."""
    shapes = [p.shape for p in mlp(*NETS[net]).parameters()]
    return sum(4 * ranks * math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)


def predicted(net: str, program: str, world: int) -> dict[str, int]:
    """Return the predicted bytes of each kind of collective in a step."""
    if world == 1:
        return {"allreduce": weights(net)}  # DDP reduces on one rank too
    if program == PEER:
        return {"allreduce": weights(net), "broadcast": FLAG * CUTS}
    loss = {"allgather": LOSS * world, "broadcast": FLAG}
    if program == FSDP2:
        whole = CUTS * weights(net, world)
        return {**loss, "allgather_base": 2 * whole, "reduce_scatter_base": whole}
    return {"allreduce": weights(net), **loss}


def sent(collective: str, size: float, world: int) -> float:
    """Return the average bytes that each rank of a ring sends for a collective of this size."""
    return {"allreduce": 2, "barrier": 0}.get(collective, 1) * (world - 1) / world * size


class Load(NamedTuple):
    """A step as input of the prediction: bytes of gradients, and seconds of computation on a rank."""

    about: str
    size: int
    seconds: float


def loads(folder: str) -> list[Load]:
    """Measure the computation on a rank: a whole step of the large network, and only the optimizer for ResNet-50."""
    torch.manual_seed(0)
    case = CASES["resnet50"]
    step = optimizer_program(OURS, case, [[torch.randn(shape) for shape in case.shapes] for _ in range(2)])
    times = []
    for i in range(12):
        step.prepare(i % 2)
        start = time.perf_counter()
        step.run()
        times.append(time.perf_counter() - start)
    whole = statistics.median(milliseconds(train("large", "FullBatch", 1, 30, folder), CUTS) for _ in range(3)) / 1e3
    dist.destroy_process_group()  # otherwise torch may abort the process on exit (torch issue 190489)
    return [
        Load(f"{weights('large') // 4:,} parameters, {CUTS} x {SIZE} samples", weights("large"), whole),
        Load("ResNet-50's, optimizer time only", bytes_moved(case) // 7, statistics.median(times[2:])),
    ]


def print_counts(rows: list[dict[str, Any]]) -> None:
    """Print the measured and predicted bytes."""
    print("| network | ranks | program | collectives per step | bytes | predicted | loopback, all ranks | predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        net, program, world = row["net"], row["program"], row["world"]
        calls = ", ".join(f"{count:g} {name}" for name, count in sorted(row["calls"].items()))
        paper = predicted(net, program, world)
        ring = sum(world * sent(name, size, world) for name, size in paper.items())
        carried = "" if row["loopback"] is None else f"{row['loopback']:,.0f}"
        print(
            f"| {net}, {weights(net):,} B | {world} | {program} | {calls} | {sum(row['bytes'].values()):,.0f} "
            f"| {sum(paper.values()):,} | {carried} | {ring:,.0f} |"
        )


def print_paper(found: list[Load]) -> None:
    """Print the extrapolation: bytes, milliseconds, and the maximum steps per second without overlap."""
    head = ["gradients of", "computing, ms", "ranks", "MB sent per rank", f"with FSDP2 and {CUTS} micro-batches"]
    head += [f"{what} at {name}" for name in LINKS for what in ("ms", "most steps/s")]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for load in found:
        for world in (4, 8, 64, 512):
            size, sharded = sent("allreduce", load.size, world), sent("allgather_base", 3 * CUTS * load.size, world)
            cells = [f"{1e3 * size / rate:.3g} | {1 / (load.seconds + size / rate):.3g}" for rate in LINKS.values()]
            cells = [f"{size / 1e6:.4g}", f"{sharded / 1e6:.4g}", *cells]
            print(f"| {load.about} | {1e3 * load.seconds:.3g} | {world} | {' | '.join(cells)} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks to measure (default: 1 2 3)"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps per fit, at least 3 (default: 10)")
    parser.add_argument("--fits", type=int, default=3, help="fits per program (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error(f"--steps: must be at least 3, got {arguments.steps}")

    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks too, to which Lightning would give more
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for package in ("fabric", "pytorch"):
        logging.getLogger(f"lightning.{package}").setLevel(logging.ERROR)
    if arguments.as_rank:
        answer(as_rank(arguments.worlds[0], arguments.steps, arguments.fits, arguments.as_rank))

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.worlds:
            options = ("--as-rank", folder, "--worlds", world, "--steps", arguments.steps, "--fits", arguments.fits)
            rows += on_ranks(world, "benchmarks.traffic", *options)
        found = loads(folder)
    print_counts(rows)
    print_paper(found)
    about = {**machine([]), "lightning": lightning.__version__}
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    if arguments.json:
        figures = {"machine": about, "rows": rows, "loads": [load._asdict() for load in found]}
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
