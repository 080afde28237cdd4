"""Time and memory of a step, compared with torch's optimizers and with a copy of the same number of bytes.

In each case the programs take turns many times, so that other load on the machine affects all of them. The table shows
medians. The gradients alternate between two random sets, so that half of the signs flip at each step.

    python -m benchmarks.step
    python -m benchmarks.step --json step.json
    python -m benchmarks.step --only small,many --seconds 5
    python -m benchmarks.step --before HEAD~1
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.report import machine, write_json
from lightning_rprop import Rprop

Shapes = list[tuple[int, ...]]

OURS, BEFORE = "lightning_rprop", "lightning_rprop before"
COPY = "copy of as many bytes"


def resnet50() -> Shapes:
    """Return the parameter shapes of ResNet-50: 25.6 million in 161 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for o, i, kernel in ((width, inputs, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(o, i, kernel, kernel), (o,), (o,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """Return the parameter shapes of GPT-2: 124 million in 148 tensors."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


SMALL: Shapes = [(32, 8), (32,), (32, 32), (32,), (1, 32), (1,)]  # a network 8-32-32-1


class Case(NamedTuple):
    """Shapes, and the minimum speedup over each program they are compared with."""

    about: str
    shapes: Shapes
    asked: dict[str, float]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


FOR_LOOP, FOREACH, ADAM = "torch Rprop for-loop", "torch Rprop foreach", "torch Adam fused"
CASES = {
    "resnet50": Case("ResNet-50's shapes", resnet50(), {FOR_LOOP: 15, FOREACH: 15, ADAM: 0.97, COPY: 0.75}),
    "gpt2": Case("GPT-2's shapes", gpt2(), {FOR_LOOP: 15, FOREACH: 15, ADAM: 0.97, COPY: 0.75}),
    "small": Case("6 tensors, 1,377 parameters", SMALL, {FOR_LOOP: 6, FOREACH: 6, "torch SGD fused": 0.5}),
    "many": Case("1,000 tensors of 100", [(100,)] * 1000, {FOR_LOOP: 10, FOREACH: 10}),
    "bfloat16": Case("ResNet-50's shapes", resnet50(), {FOR_LOOP: 0, FOREACH: 0, COPY: 0}, torch.bfloat16),
    "float16": Case("ResNet-50's shapes", resnet50(), {FOR_LOOP: 0, FOREACH: 0, COPY: 0.6}, torch.float16),
}
CAPTURABLE, COMPILED = "torch Rprop capturable", "torch Rprop compiled"
GRAPH, OURS_IN_GRAPH = "torch Rprop in a graph", "lightning_rprop in a graph"
CUDA_CASES = {
    "cuda-resnet50": CASES["resnet50"]._replace(
        device="cuda", asked={FOREACH: 20, CAPTURABLE: 20, COMPILED: 20, COPY: 0}
    ),
    "cuda-gpt2": CASES["gpt2"]._replace(device="cuda", asked={FOREACH: 8, CAPTURABLE: 8, COMPILED: 8, COPY: 0.8}),
    "cuda-small": CASES["small"]._replace(device="cuda", asked={FOREACH: 4, CAPTURABLE: 4, COMPILED: 4, GRAPH: 4}),
}


_BEFORE = "lightning_rprop_before"


def import_before(revision: str, folder: Path) -> None:
    """Import the package of an earlier revision under another name, so that one process can time both."""
    archive = folder / "before.zip"
    root = Path(__file__).parents[1]
    command = ["git", "archive", "--format=zip", f"--output={archive}", revision, "lightning_rprop"]
    subprocess.run(command, check=True, cwd=root)
    shutil.unpack_archive(archive, folder)
    package = (folder / "lightning_rprop").rename(folder / _BEFORE)
    for file in package.rglob("*.py"):
        file.write_text(file.read_text().replace("lightning_rprop", _BEFORE))
    sys.path.append(str(folder))
    importlib.import_module(_BEFORE)


class Program(NamedTuple):
    """A function to time, and a function that sets one of two sets of gradients before each call."""

    run: Callable[[], object]
    prepare: Callable[[int], None]


def optimizer_program(name: str, case: Case, gradients: list[list[Tensor]]) -> Program:
    """Create an optimizer with its own parameters."""
    params = [torch.zeros(shape, dtype=case.dtype, device=case.device).requires_grad_() for shape in case.shapes]
    optimizer: torch.optim.Optimizer = {
        OURS: lambda: Rprop(params),
        BEFORE: lambda: sys.modules[_BEFORE].Rprop(params),
        OURS_IN_GRAPH: lambda: Rprop(params, capturable=True),
        FOR_LOOP: lambda: torch.optim.Rprop(params, foreach=False),
        FOREACH: lambda: torch.optim.Rprop(params, foreach=True),
        CAPTURABLE: lambda: torch.optim.Rprop(params, foreach=True, capturable=True),
        COMPILED: lambda: torch.optim.Rprop(params),
        GRAPH: lambda: torch.optim.Rprop(params, foreach=True, capturable=True),
        ADAM: lambda: torch.optim.Adam(params, fused=True),
        "torch SGD fused": lambda: torch.optim.SGD(params, lr=1e-3, fused=True),
    }[name]()

    def assign(which: int) -> None:
        for param, gradient in zip(params, gradients[which], strict=True):
            param.grad = gradient

    if name == COMPILED:
        return Program(torch.compile(optimizer.step), assign)
    if name not in (GRAPH, OURS_IN_GRAPH):
        return Program(optimizer.step, assign)

    for param in params:
        param.grad = torch.zeros_like(param)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()  # creates the state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def copy(which: int) -> None:
        torch._foreach_copy_([param.grad for param in params], gradients[which])

    return Program(graph.replay, copy)


def copy_program(case: Case) -> Program:
    """Copy half of the bytes that a step reads and writes, because a copy reads and writes each byte."""
    source, target = torch.zeros(2, bytes_moved(case) // 2, dtype=torch.uint8, device=case.device)
    return Program(lambda: target.copy_(source), lambda which: None)


def bytes_moved(case: Case) -> int:
    """Count the bytes of a step: parameter, gradient, prev and step size are read, all but the gradient are written."""
    return 7 * case.dtype.itemsize * sum(map(math.prod, case.shapes))


def seconds_of(case: Case, seconds: float) -> dict[str, float]:
    """Time the programs by turns, and return the median of each."""
    torch.manual_seed(0)
    gradients = [[torch.randn(s, dtype=case.dtype, device=case.device) for s in case.shapes] for _ in range(2)]
    ours = [OURS] + [OURS_IN_GRAPH] * (GRAPH in case.asked)
    programs = {
        name: copy_program(case) if name == COPY else optimizer_program(name, case, gradients)
        for name in [*ours, *case.asked]
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    burst = 1 if bytes_moved(case) > 1e8 else 20  # small programs find their data in the cache, as in training
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < seconds:
        for name, program in programs.items():
            for i in range(burst):
                program.prepare((count * burst + i) % 2)
                wait_for(case)
                start = time.perf_counter()
                program.run()
                wait_for(case)
                times[name].append(time.perf_counter() - start)
        count += 1
    return {name: statistics.median(values[2:]) for name, values in times.items()}  # the first two are a warm-up


def wait_for(case: Case) -> None:
    """Wait until the device has finished."""
    if case.device == "cuda":
        torch.cuda.synchronize()


# One step in a separate process, because the peak is Linux's high-water mark of a process's resident memory.
MEMORY_PROBE = """
import sys, torch
from benchmarks.step import CASES, FOREACH, FOR_LOOP, OURS, optimizer_program
case = CASES["resnet50"]
program = optimizer_program(sys.argv[1], case, [[torch.randn(shape) for shape in case.shapes]])
program.prepare(0)
program.run()
def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
program.run()
print(1024 * (kilobytes("VmHWM") - before))
"""

# The first step of a process that has already imported torch and the package.
FIRST_STEP_PROBE = """
import time, torch
from lightning_rprop import Rprop
param = torch.nn.Parameter(torch.zeros(10))
param.grad = torch.ones(10)
optimizer = Rprop([param])
start = time.perf_counter()
optimizer.step()
print(time.perf_counter() - start)
"""


def probe(program: str, *arguments: str, **environment: str) -> float:
    """Run a program in a separate process, and return the number that it prints."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )
    return float(done.stdout)


def first_steps() -> tuple[float, float]:
    """Return the seconds of a first step that compiles the kernel, and the median of those that find it on disk."""
    with tempfile.TemporaryDirectory() as folder:
        compiles, *cached = (probe(FIRST_STEP_PROBE, NUMBA_CACHE_DIR=folder, XDG_CACHE_HOME=folder) for _ in range(6))
    return compiles, statistics.median(cached)


class Row(NamedTuple):
    """A line of the table, which compares ours with one peer."""

    case: str
    peer: str
    ours: float
    theirs: float
    unit: str
    asked: str

    def text(self) -> str:
        """Return the line in Markdown."""
        ratio = f"{self.theirs / self.ours:.3g}x" if self.ours else "-"
        return (
            f"| {self.case} | {self.peer} | {self.ours:.4g} {self.unit} | {self.theirs:.4g} {self.unit} | {ratio} "
            f"| {self.asked} |"
        )


def time_rows(case: Case, seconds: float) -> tuple[list[Row], str]:
    """Time a case, and return its rows and a text about its memory traffic."""
    medians = seconds_of(case, seconds)
    kind = f"{case.device}, {str(case.dtype).removeprefix('torch.')}, {case.about}"
    rows = []
    for peer, factor in case.asked.items():
        ours = medians[OURS_IN_GRAPH if peer == GRAPH else OURS]
        if peer == COPY:
            asked = f"{factor:.0%} of its bytes per second" if factor else ""
        else:
            asked = f"{factor:g}x" if factor else ""
        rows.append(Row(kind, peer, 1e3 * ours, 1e3 * medians[peer], "ms", asked))
    if COPY not in case.asked:
        return rows, ""
    moved = bytes_moved(case)
    step, copy = (moved / medians[name] / 1e9 for name in (OURS, COPY))
    return (
        rows,
        f"{kind}: {moved / 1e6:.0f} MB per step; copy {copy:.0f} GB/s, step {step:.0f} GB/s: {step / copy:.0%}",
    )


def memory_rows() -> list[Row]:
    """Measure the peak of a step's extra memory, in bytes per parameter."""
    per_parameter = {
        name: probe(MEMORY_PROBE, name) / sum(map(math.prod, resnet50())) for name in (OURS, FOR_LOOP, FOREACH)
    }
    case = "cpu, float32, ResNet-50's shapes: peak extra memory"
    return [
        Row(case, peer, round(per_parameter[OURS], 3), per_parameter[peer], "bytes per parameter", "0 bytes")
        for peer in (FOR_LOOP, FOREACH)
    ]


def main() -> None:
    """Print the table."""
    cases = CASES | (CUDA_CASES if torch.cuda.is_available() else {})
    others = ("memory", "first-step")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of the cases, separated by commas: {', '.join([*cases, *others])}")
    parser.add_argument("--seconds", type=float, default=20, help="time for each case (default: 20)")
    parser.add_argument("--before", metavar="REVISION", help="also time the package of this git revision")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else [*cases, *others]
    if unknown := set(chosen) - {*cases, *others}:
        parser.error(f"--only: no case {', '.join(sorted(unknown))}; there are {', '.join([*cases, *others])}")

    if arguments.before:
        folder = tempfile.TemporaryDirectory()
        try:
            import_before(arguments.before, Path(folder.name))
        except subprocess.CalledProcessError:
            parser.error(f"--before: git has no package at revision {arguments.before}")
        for name, case in cases.items():
            cases[name] = case._replace(asked=case.asked | {BEFORE: 1})

    about = machine({cases[name].device for name in chosen if name in cases})
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"\n| case | peer | {OURS} | peer | ratio | asked |\n|---|---|---|---|---|---|")
    rows: list[Row] = []
    rooflines: list[str] = []
    for name in chosen:
        if name == "memory":
            new = memory_rows()
        elif name == "first-step":
            compiles, cached = first_steps()
            new = [Row("cpu, first step of a process", "with compilation", cached, compiles, "s", "0.3 s")]
        else:
            new, roofline = time_rows(cases[name], arguments.seconds)
            rooflines += [roofline] * bool(roofline)
        print("\n".join(row.text() for row in new), flush=True)
        rows += new
    print("\n" + "\n".join(rooflines))
    if arguments.json:
        figures = {"machine": about, "rows": [row._asdict() for row in rows], "rooflines": rooflines}
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
