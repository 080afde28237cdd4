"""What a record of StepSizeMonitor costs, against an optimizer step, against torch's operations, and in a training.

The first rows are of ResNet-50's shapes: a record is a look at the gradients before a step and at the step sizes after
it, to the numbers that go to the loggers. The programs run in turn, many times over, so that whatever else the machine
does falls on all of them; printed are medians. The last rows are of the example app: the time spent in the monitor's
hooks, loggers included, as a share of the time of all steps, at Lightning's default of a record every 50 steps.

    python -m benchmarks.monitor
    python -m benchmarks.monitor --json monitor.json
    python -m benchmarks.monitor --seconds 0.1 --only digits
"""

from __future__ import annotations

import argparse
import contextlib
import json
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

from benchmarks.step import machine, resnet50
from lightning_rprop import FullBatch, Rprop, StepSizeMonitor
from lightning_rprop.monitor._names import DEFAULT
from lightning_rprop.monitor._record import Plan, look, measure
from lightning_rprop.monitor._rows import Row, list_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tabular.data import TabularData
from tabular.model import MLP

WARM_UP = 100  # steps


class Line(NamedTuple):
    """A record's milliseconds, a peer's, and what their ratio may be."""

    about: str
    ours: float
    peer: str
    theirs: float
    allowed: float | None


def large_optimizer() -> Rprop:
    """Make an optimizer of ResNet-50's parameters, with gradients, which has taken some steps."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in resnet50()]
    optimizer = Rprop(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def record(rows: list[Row], plan: Plan) -> None:
    """Make a record, as the callback does."""
    seen = look(rows)
    measure(rows, [seen] if seen else [], plan)


def tensor_by_tensor(optimizer: Rprop) -> None:
    """Compute the default statistics of all parameters as one would at first, each of each tensor."""
    low, high = optimizer.param_groups[0]["step_sizes"]
    for p in optimizer.param_groups[0]["params"]:
        size, prev, grad = optimizer.state[p]["step_size"], optimizer.state[p]["prev"], p.grad
        shares = [size <= low, size >= high, grad.sign() * prev.sign() < 0, grad == 0]
        for value in [size.mean(), size.min(), size.max(), *(share.float().mean() for share in shares)]:
            value.item()
        (~grad.isfinite()).sum().item()


def milliseconds(
    ours: Callable[[], object], peer: Callable[[], object], before: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """Run two programs in turn for so long, each after a step as in a training; give the median of each."""
    times: list[list[float]] = [[], []]
    begin = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - begin < seconds:
        for program, found in zip((ours, peer), times, strict=True):
            before()
            start = time.perf_counter()
            program()
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])  # the first compiles


class Timed(StepSizeMonitor):
    """A monitor that counts the seconds it takes, in its hooks and at the loggers, and ends the run after some time."""

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.seconds = seconds
        self.inside = self.begun = self.over = 0.0
        self.steps = 0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin."""
        super().on_train_start(trainer, *args)
        self.begun = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave the first steps out, which compile, and look at the clock."""
        now, self.steps = time.perf_counter(), trainer.global_step
        if self.steps == WARM_UP:
            self.begun, self.inside = now, 0.0
        self.over = now
        trainer.should_stop = self.steps >= 4 * WARM_UP and now - self.begun > self.seconds
        start = time.perf_counter()
        super().on_train_batch_start(trainer, *args)
        self.inside += time.perf_counter() - start

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Count."""
        start = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.inside += time.perf_counter() - start

    def on_train_batch_end(self, *args: Any) -> None:
        """Count."""
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        self.inside += time.perf_counter() - start


def digits(folder: str, seconds: float, **options: Any) -> tuple[float, float]:
    """Train the example app's network on its digits; give the milliseconds a step takes, and the monitor in it."""
    data = TabularData("digits", 0.15, 0.2, 0, steps_per_epoch=10)
    model = MLP(data.in_features, data.out_features, data.task, partial(Rprop, lr=1e-3, weight_decay=1e-4), [64])
    monitor = Timed(seconds, silence=["lower_bound"], **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[FullBatch(), monitor],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        trainer.fit(model, datamodule=data)
    steps = monitor.steps - WARM_UP
    return 1e3 * (monitor.over - monitor.begun) / steps, 1e3 * monitor.inside / steps


def large_rows(seconds: float) -> list[Line]:
    """Time records of ResNet-50's parameters."""
    optimizer = large_optimizer()
    names = {id(p): str(i) for i, p in enumerate(optimizer.param_groups[0]["params"])}
    parameters = list_rows([optimizer], names, 0)
    with_quantiles = (*DEFAULT, "median", "q10", "q90")
    default = partial(record, parameters, Plan(DEFAULT, False, frozenset(), False))
    quantiles = partial(record, parameters, Plan(with_quantiles, False, frozenset(), False))
    each = partial(record, parameters, Plan(with_quantiles, False, frozenset(names.values()), False))
    by_tensor = partial(tensor_by_tensor, optimizer)
    step = "a fused step"
    pairs = [
        ("default statistics", default, step, optimizer.step, 1.0),
        ("default statistics", default, "the same, tensor by tensor", by_tensor, 0.1),
        ("and median, q10, q90", quantiles, step, optimizer.step, None),
        ("and all of these of each of 161 parameters", each, step, optimizer.step, None),
    ]
    lines = []
    for about, ours, peer, theirs, allowed in pairs:
        mine, other = milliseconds(ours, theirs, optimizer.step, seconds / len(pairs))
        lines.append(Line(about, mine, peer, other, allowed))
    return lines


def digits_rows(seconds: float) -> list[Line]:
    """Time the monitor in the example app."""
    with tempfile.TemporaryDirectory() as folder:
        step, inside = digits(folder, seconds)
        rows = [Line("digits: default, of a step", inside, "the whole step", step, 0.01)]
        every = {"per_parameter": True, "statistics": [*DEFAULT, "median", "q10", "q90"]}
        step, inside = digits(folder, seconds, **every)
        return [*rows, Line("digits: quantiles and each parameter too", inside, "the whole step", step, None)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each part, about (default: 20)")
    parser.add_argument("--only", choices=["resnet50", "digits"], help="one of the two parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    about = {**machine([]), "lightning": lightning.__version__}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n| record | ms | against | ms | ratio | allowed |\n|---|---|---|---|---|---|")
    rows: list[Line] = []
    for name, part in (("resnet50", large_rows), ("digits", digits_rows)):
        if arguments.only in (None, name):
            rows += part(arguments.seconds)
    for row in rows:
        allowed = "" if row.allowed is None else f"{row.allowed:g}"
        ratio = row.ours / row.theirs
        print(f"| {row.about} | {row.ours:.3g} | {row.peer} | {row.theirs:.3g} | {ratio:.3f} | {allowed} |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": about, "rows": [row._asdict() for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
