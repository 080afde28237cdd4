"""Time of a training step per member: Stacked compared with separate modules, on small networks and data sets.

A step is the forward and backward pass over all samples and the step of Rprop. The peers are n separate modules, with
an optimizer for each or with one optimizer for all of them. The programs take turns, and the times are medians.

Predicted before the first run, from a fixed cost of 0.3 ms for a separate step and twice that for a stacked one: with n
members of w weights on 200 samples on one CPU thread, stacking takes 1.5 to 2 times as long for n = 1, breaks even at n
= 2, and is 8 to 12 times as fast for n = 64 and w = 61. The arithmetic is the same, so the advantage shrinks as w
grows, and is gone at w = 10,000 (0.8 to 1.5 times as fast), in float32 a little later than in float64.

    python -m benchmarks.stacked
    python -m benchmarks.stacked --samples 2000 --json stacked.json
    python -m benchmarks.stacked --seconds 0.5 --widths 1-20-1 --members 1,64
    python -m benchmarks.stacked --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.problems import mlp
from benchmarks.report import machine, write_json
from lightning_rprop import Rprop, Stacked

WIDTHS = ((1, 20, 1), (8, 20, 20, 1), (16, 48, 40, 1), (20, 90, 90, 1))
MEMBERS = (1, 4, 16, 64, 256)
Nets = list[nn.Module]
STACKED, SEPARATE, SHARED = "stacked", "separate", "separate, one optimizer"


class Case(NamedTuple):
    """Members of a network whose layers have the sizes ``widths``, and their data."""

    widths: tuple[int, ...]
    members: int
    dtype: torch.dtype
    device: str = "cpu"
    samples: int = 200
    chunk_size: int | None = None


class Row(NamedTuple):
    """A line of the table: microseconds of a step per member."""

    dtype: str
    network: str
    weights: int
    members: int
    stacked: float
    separate: float
    shared: float

    def text(self) -> str:
        """Return the line in Markdown."""
        times = " | ".join(f"{time:.4g}" for time in (self.stacked, self.separate, self.shared))
        return (
            f"| {self.dtype} | {self.network} | {self.weights:,} | {self.members} | {times} "
            f"| {self.separate / self.stacked:.2f} |"
        )


def programs(case: Case) -> tuple[dict[str, Callable[[], None]], tuple[Stacked, Nets, Nets]]:
    """Return functions that make one training step of all members, and the models that they train."""
    like = {"dtype": case.dtype, "device": case.device}
    x = torch.randn(case.samples, case.widths[0], **like)
    y = x.sum(dim=1, keepdim=True).sin()

    def make() -> nn.Module:
        return mlp(*case.widths).to(**like)

    def loss_of(net: nn.Module) -> Tensor:
        return (net(x) - y).square().mean(dim=(-2, -1))

    model = Stacked(make, case.members, chunk_size=case.chunk_size)
    optimizer = Rprop(model.parameters())

    def stacked() -> None:
        optimizer.zero_grad()
        losses = loss_of(model)
        losses.sum().backward()
        optimizer.step(loss=losses)

    nets = [model.member(i) for i in range(case.members)]
    optimizers = [Rprop(net.parameters()) for net in nets]

    def separate() -> None:
        for net, own in zip(nets, optimizers, strict=True):
            own.zero_grad()
            loss = loss_of(net)
            loss.backward()
            own.step(loss=loss)

    others = [model.member(i) for i in range(case.members)]
    common = Rprop([param for net in others for param in net.parameters()])

    def shared() -> None:
        common.zero_grad()
        for net in others:
            loss_of(net).backward()
        common.step()

    return {STACKED: stacked, SEPARATE: separate, SHARED: shared}, (model, nets, others)


def measure(case: Case, seconds: float) -> Row:
    """Time the programs by turns, and return their medians."""
    torch.manual_seed(0)
    steps, _ = programs(case)
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(times[SHARED]) < 5 or time.perf_counter() - begin < seconds:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if case.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - start) / case.members)
    medians = (statistics.median(values[2:]) for values in times.values())  # the first two are a warm-up
    weights = sum(param.numel() for param in mlp(*case.widths).parameters())
    return Row(str(case.dtype).removeprefix("torch."), dashed(case.widths), weights, case.members, *medians)


def dashed(widths: tuple[int, ...]) -> str:
    """Write the sizes of the layers as ``1-20-1``."""
    return "-".join(map(str, widths))


def numbers(text: str, separator: str = ",") -> tuple[int, ...]:
    """Parse positive integers."""
    values = tuple(map(int, text.split(separator)))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return values


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--samples", type=int, default=200, help="number of samples (default: 200)")
    parser.add_argument("--chunk-size", type=int, help="of Stacked (default: all members at once)")
    parser.add_argument("--seconds", type=float, default=3, help="approximate time for each line (default: 3)")
    parser.add_argument(
        "--widths",
        type=lambda text: [numbers(each, "-") for each in text.split(",")],
        default=WIDTHS,
        help=f"sizes of the networks' layers (default: {','.join(map(dashed, WIDTHS))})",
    )
    parser.add_argument(
        "--members",
        type=numbers,
        default=MEMBERS,
        help=f"numbers of members (default: {','.join(map(str, MEMBERS))})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    if arguments.threads < 1 or arguments.samples < 1:
        parser.error("--threads and --samples must be >= 1")

    torch.set_num_threads(arguments.threads)
    settings = {"samples": arguments.samples, "chunk_size": arguments.chunk_size}
    about = {**machine([arguments.device]), **settings}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"\n| dtype | network | weights | n | {STACKED}, µs per member | {SEPARATE} | {SHARED} | ratio |")
    print(f"|{'---|' * 8}")
    rows = []
    for dtype, widths, members in product((torch.float32, torch.float64), arguments.widths, arguments.members):
        rows.append(measure(Case(widths, members, dtype, arguments.device, **settings), arguments.seconds))
        print(rows[-1].text(), flush=True)
    if arguments.json:
        write_json(arguments.json, {"machine": about, "rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
