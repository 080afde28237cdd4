"""What StepSizeMonitor costs: the default record at the default interval of 50 steps, as a share of a training step.

"digits" and "pinn" train the networks of examples/train.py and examples/pinn.py, in short runs that alternate. The time
in the monitor's hooks, loggers included, is compared with that of all steps of the same run. The figures are medians
over intervals of 50 steps with one record each. The first interval of each run is left out.

"resnet50" measures records of ResNet-50's 25.6 million weights. The step to compare with is the gradient of 1,000
samples in fully connected layers of as many weights, which is less work than in ResNet-50's convolutions. The programs
alternate, and the figures are medians.

    python -m benchmarks.monitor
    python -m benchmarks.monitor --json monitor.json
    python -m benchmarks.monitor --seconds 0.1 --only digits
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from benchmarks.report import machine, write_json
from benchmarks.step import resnet50
from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor
from lightning_rprop.monitor._names import DEFAULT
from lightning_rprop.monitor._record import Plan, measure, summarize_gradients
from lightning_rprop.monitor._rows import Row, list_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pinn import Poisson, grid
from tabular.data import TabularData
from tabular.model import MLP

INTERVAL = 50  # steps, Lightning's default
ROUNDS = 4


class Line(NamedTuple):
    """Milliseconds of a record, of the monitor per step and of a whole step, and the limit of the share."""

    about: str
    record: float
    monitor: float
    step: float
    limit: float | None


class Timed(StepSizeMonitor):
    """A monitor that measures its own time, and ends the run after some seconds.

    Args:
        seconds: How long to train.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(silence=["lower_bound"])
        self.seconds = seconds
        self.intervals: list[tuple[float, float, float]] = []  # seconds of the record, in all hooks, of all steps
        self.record = self.inside = 0.0

    def on_train_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_start(*args)
        self.started = self.interval_started = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Complete an interval."""
        if trainer.global_step and trainer.global_step % INTERVAL == 0:
            now = time.perf_counter()
            if trainer.global_step > INTERVAL:
                self.intervals.append((self.record, self.inside, now - self.interval_started))
                trainer.should_stop = now - self.started > self.seconds
            self.interval_started, self.inside = now, 0.0
        self.record = 0.0
        self.timed(super().on_train_batch_start, trainer, *args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Measure the hook."""
        self.timed(super().on_before_optimizer_step, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        """Measure the hook."""
        self.timed(super().on_train_batch_end, *args)

    def timed(self, hook: Callable[..., None], *args: Any) -> None:
        """Run a hook and add its time."""
        start = time.perf_counter()
        hook(*args)
        seconds = time.perf_counter() - start
        self.record += seconds
        self.inside += seconds


def fit(model: pl.LightningModule, data: Any, monitor: Timed, folder: str) -> None:
    """Train with the monitor as the examples do, without validation, checkpoints and console output."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[FullBatch(log_as="loss"), monitor],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        trainer.fit(model, data)


def digits(monitor: Timed, folder: str) -> None:
    """Train as examples/train.py does."""
    data = TabularData("digits", 0.15, 0.2, 0, steps_per_epoch=10)
    optimizer = partial(Rprop, lr=1e-3, weight_decay=1e-4)
    fit(MLP(data.in_features, data.out_features, data.task, optimizer, [64]), data, monitor, folder)


def pinn(monitor: Timed, folder: str) -> None:
    """Train as examples/pinn.py does."""
    optimizer = partial(Rprop, lr=1e-3, max_iter=10)
    fit(Poisson(optimizer), FullBatchLoader(grid(32), steps_per_epoch=100), monitor, folder)


EXAMPLES: dict[str, tuple[Callable[[Timed, str], None], float]] = {"digits": (digits, 0.02), "pinn": (pinn, 0.01)}


def example_lines(names: list[str], seconds: float) -> list[Line]:
    """Measure the monitor in the examples."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            monitor = Timed(seconds / ROUNDS)
            with tempfile.TemporaryDirectory() as folder:
                EXAMPLES[name][0](monitor, folder)
            found[name] += monitor.intervals
    lines = []
    for name, intervals in found.items():
        record, inside, steps = (1e3 * statistics.median(column) for column in zip(*intervals, strict=True))
        lines.append(Line(name, record, inside / INTERVAL, steps / INTERVAL, EXAMPLES[name][1]))
    return lines


def large_optimizer() -> Rprop:
    """Return an optimizer of ResNet-50's parameters, with gradients, that has made some steps."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape)) for shape in resnet50()]
    optimizer = Rprop(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def record(rows: list[Row], statistics: tuple[str, ...]) -> None:
    """Make a record as the callback does."""
    gradients = summarize_gradients(rows)
    measure(rows, [gradients] if gradients else [], Plan(statistics, False, frozenset(), False))


def large_lines(seconds: float) -> list[Line]:
    """Measure records of ResNet-50's parameters next to the gradient of a network of as many weights."""
    optimizer = large_optimizer()
    rows = list_rows([optimizer], {}, 0)
    network = nn.Sequential(*[nn.Linear(1012, 1012) for _ in range(25)])
    samples = torch.randn(1000, 1012)
    programs: list[Callable[[], object]] = [
        partial(record, rows, DEFAULT),
        partial(record, rows, (*DEFAULT, "median", "q10", "q90")),
        lambda: network(samples).square().mean().backward(),
    ]
    times: list[list[float]] = [[] for _ in programs]
    start = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for program, found in zip(programs, times, strict=True):
            optimizer.step()
            program_start = time.perf_counter()
            program()
            found.append(1e3 * (time.perf_counter() - program_start))
    default, quantiles, step = (statistics.median(found[1:]) for found in times)  # the first allocates memory
    return [
        Line("resnet50", default, default / INTERVAL, step, None),
        Line("resnet50, with median, q10, q90", quantiles, quantiles / INTERVAL, step, None),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="approximate time for each part (default: 20)")
    parser.add_argument("--only", choices=[*EXAMPLES, "resnet50"], help="run one part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    about = {**machine([]), "lightning": lightning.__version__}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        "\n| training | a record, ms | monitor per step, ms | a step, ms | share | at most |\n|---|---|---|---|---|---|"
    )
    lines = example_lines([name for name in EXAMPLES if arguments.only in (None, name)], arguments.seconds)
    if arguments.only in (None, "resnet50"):
        lines += large_lines(arguments.seconds)
    for line in lines:
        share, limit = line.monitor / line.step, "" if line.limit is None else f"{line.limit:.0%}"
        print(f"| {line.about} | {line.record:.3g} | {line.monitor:.3g} | {line.step:.3g} | {share:.2%} | {limit} |")
    if arguments.json:
        write_json(arguments.json, {"machine": about, "lines": [line._asdict() for line in lines]})


if __name__ == "__main__":
    main()
