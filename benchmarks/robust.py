"""What robust fits cost: KeepBest and Converged in a step of examples/train.py, and retreat in an optimizer step.

"digits" runs the training of examples/train.py with and without the callbacks, alternating. The figures are medians
over all steps. The loss falls in most of them, so KeepBest copies the weights.

The other lines compare ``Rprop.step(loss=loss)`` with ``retreat=True`` and ``False``, on a small network and on
ResNet-50's 25.6 million weights; the calls alternate, and the figures are medians.

    python -m benchmarks.robust
    python -m benchmarks.robust --json robust.json
    python -m benchmarks.robust --seconds 0.5 --only digits
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from benchmarks.report import machine, write_json
from benchmarks.step import resnet50
from lightning_rprop import Rprop

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # for the configs

CONF = Path(__file__).parents[1] / "conf"
OURS = ("keep_best", "converged")
SMALL = [(64, 64), (64,), (10, 64), (10,)]  # the parameters of "digits"
LIMITS = {"digits": 1.05}


class Line(NamedTuple):
    """Milliseconds of a step with and without a feature."""

    about: str
    with_it: float
    without: float


class Clock(pl.Callback):
    """Measures the time from step to step within each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        """Begin an epoch."""
        self.epochs.append([])

    def on_train_batch_start(self, *args: Any) -> None:
        """Take the time."""
        self.epochs[-1].append(time.perf_counter())

    def steps(self) -> list[float]:
        """Return the milliseconds of each step but those of the first epoch, which warms up."""
        return [1e3 * (end - start) for starts in self.epochs[1:] for start, end in pairwise(starts)]


def train_digits(overrides: list[str]) -> list[float]:
    """Train as examples/train.py does, and return the milliseconds of each step."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"output_dir={folder}", *overrides])
        data = instantiate(cfg.data)
        of_data = {name: getattr(data, name) for name in ("in_features", "out_features", "task")}
        model = instantiate(cfg.model, **of_data, optimizer=instantiate(cfg.optimizer))
        callbacks = [clock, *map(instantiate, cfg.callbacks.values())]
        logger = [instantiate(each) for each in cfg.logger.values()]
        instantiate(cfg.trainer, callbacks=callbacks, logger=logger).fit(model, datamodule=data)
    return clock.steps()


def callbacks_line(seconds: float) -> Line:
    """Measure KeepBest and Converged in the example."""
    found: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while not found[1] or time.perf_counter() - start < seconds:
        for times, removed in zip(found, ([], [f"~callbacks.{name}" for name in OURS]), strict=True):
            times += train_digits(removed)
    return Line("digits", *map(statistics.median, found))


def retreat_line(about: str, shapes: list[tuple[int, ...]], seconds: float) -> Line:
    """Measure an optimizer step with and without retreat."""
    torch.manual_seed(0)
    optimizers = []
    for retreat in (True, False):
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers.append(Rprop(params, fused=True, retreat=retreat))
    found: tuple[list[float], list[float]] = ([], [])
    loss, start = torch.tensor(1.0), time.perf_counter()
    while len(found[1]) < 20 or time.perf_counter() - start < seconds:
        for times, optimizer in zip(found, optimizers, strict=True):
            begin = time.perf_counter()
            optimizer.step(loss=loss)
            times.append(1e3 * (time.perf_counter() - begin))
    return Line(about, *(statistics.median(times[10:]) for times in found))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="approximate time for each line (default: 30)")
    parser.add_argument("--only", choices=["digits", "retreat"], help="run one part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    about = {**machine([]), "lightning": lightning.__version__}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n| a step of | with, ms | without, ms | ratio | at most |\n|---|---|---|---|---|")
    lines = []
    if arguments.only != "retreat":
        lines.append(callbacks_line(arguments.seconds))
    if arguments.only != "digits":
        lines.append(retreat_line("Rprop, 4,810 weights", SMALL, arguments.seconds))
        lines.append(retreat_line("Rprop, 25.6 million weights", resnet50(), arguments.seconds))
    for line in lines:
        limit = f"{LIMITS[line.about]:.2f}" if line.about in LIMITS else ""
        print(
            f"| {line.about} | {line.with_it:.4g} | {line.without:.4g} | {line.with_it / line.without:.3f} | {limit} |"
        )
    if arguments.json:
        write_json(arguments.json, {"machine": about, "lines": [line._asdict() for line in lines]})


if __name__ == "__main__":
    main()
