"""The cost of full-batch training in Lightning, compared with hand-written loops and with plain Lightning.

A 20-64-64-1 MLP with tanh learns a regression on the CPU. The two programs of a row alternate, so that other load on
the machine affects both. The table shows the median milliseconds of one optimizer step (an evaluation and an update),
measured between calls of training_step.

    python -m benchmarks.full_batch
    python -m benchmarks.full_batch --json full_batch.json
    python -m benchmarks.full_batch --seconds 0.1 --only single,memory
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ranks import answer, on_ranks
from benchmarks.report import processor, write_json
from lightning_rprop import FullBatch, FullBatchLoader, Rprop

OURS = "FullBatch"
LARGE, SMALL = 2000, 32
MICRO_BATCHES = 16


def network() -> nn.Sequential:
    """Return the network, with the same parameters in each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def data(n: int) -> tuple[Tensor, Tensor]:
    """Return ``n`` samples: inputs ``(n, 20)`` and targets ``(n, 1)``."""
    x = torch.randn(n, 20, generator=torch.Generator().manual_seed(0))
    return x, x[:, :2].sin().sum(dim=1, keepdim=True)


class Fit(pl.LightningModule):
    """A user's model that records when each training_step begins."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], log: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.make = make
        self.logs = log
        self.starts: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the mean squared error."""
        self.starts.append(time.perf_counter())
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        if self.logs:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self.make(self.parameters())


def milliseconds(starts: list[float], calls_per_step: int) -> float:
    """Return the time of a step in milliseconds, without the first tenth of the run."""
    begin = len(starts) // 10 // calls_per_step * calls_per_step
    return 1e3 * (starts[-1] - starts[begin]) / (len(starts) - 1 - begin) * calls_per_step


def fit(module: Fit, loader: Any, folder: str, **options: Any) -> list[float]:
    """Train without output, and return when each training_step began."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **{**quiet, "devices": 1, **options}
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        trainer.fit(module, loader)
    return module.starts


def ours(n: int, folder: str, steps: int, max_iter: int = 1, cuts: int = 1, log: bool = False, **options: Any) -> float:
    """Train with FullBatch and ``cuts`` micro-batches per rank."""
    module = Fit(lambda params: Rprop(params, max_iter=max_iter), log)
    batches = max(2, steps // max_iter)
    loader = FullBatchLoader(data(n), math.ceil(n / cuts / options.get("devices", 1)), steps_per_epoch=batches)
    starts = fit(module, loader, folder, callbacks=[FullBatch()], max_epochs=1, **options)
    return milliseconds(starts, cuts)


def by_hand(n: int, folder: str, steps: int, cuts: int = 1) -> float:
    """Train with torch's Rprop in a loop without Lightning."""
    net, (x, y) = network(), data(n)
    optimizer = torch.optim.Rprop(net.parameters())
    size = math.ceil(n / cuts)
    starts = []
    for _ in range(steps):
        starts.append(time.perf_counter())
        optimizer.zero_grad()
        for i in range(0, n, size):
            inputs, targets = x[i : i + size], y[i : i + size]
            loss = (net(inputs) - targets).square().mean()
            if cuts > 1:
                loss = loss * (len(inputs) / n)
            loss.backward()
        optimizer.step()
    return milliseconds(starts, 1)


def as_users_do(n: int, folder: str, steps: int) -> float:
    """Train in plain Lightning with a DataLoader of one batch."""
    module = Fit(torch.optim.Rprop)
    loader = DataLoader(TensorDataset(*data(n)), batch_size=n)
    return milliseconds(fit(module, loader, folder, max_epochs=steps), 1)


def accumulating(n: int, folder: str, steps: int, cuts: int, **options: Any) -> float:
    """Train in plain Lightning with gradients accumulated over the epoch."""
    module = Fit(torch.optim.Rprop)
    ranks = options.get("devices", 1)
    loader = DataLoader(TensorDataset(*data(n)), batch_size=math.ceil(n / cuts / ranks))
    starts = fit(module, loader, folder, accumulate_grad_batches=cuts, max_epochs=steps, **options)
    return milliseconds(starts, cuts)


class Row(NamedTuple):
    """A program, its peer, and the highest allowed ratio of their times."""

    about: str
    ours: Callable[[str, int], float]
    peer_name: str
    peer: Callable[[str, int], float]
    allowed: float


def _row(about: str, n: int, peer_name: str, peer: Callable[..., float], allowed: float, **how: Any) -> Row:
    cuts = {"cuts": how["cuts"]} if "cuts" in how else {}
    return Row(
        f"{about}, N = {n:,}",
        lambda folder, steps: ours(n, folder, steps, **how),
        peer_name,
        lambda folder, steps: peer(n, folder, steps, **cuts),
        allowed,
    )


def _bare(n: int, folder: str, steps: int) -> float:
    return ours(n, folder, steps, log=True)


def rows(folder: str) -> dict[str, Row]:
    """Return the rows of the table by name."""
    hand, users = "hand-written loop, torch.optim.Rprop", "Lightning, DataLoader(batch_size=N)"
    observed = {"logger": CSVLogger(folder), "enable_progress_bar": True, "log": True}
    return {
        "often-large": _row("max_iter=20", LARGE, hand, by_hand, 1.0, max_iter=20),
        "often-small": _row("max_iter=20", SMALL, hand, by_hand, 1.0, max_iter=20),
        "single-large": _row("max_iter=1", LARGE, hand, by_hand, 1.25),
        "single-small": _row("max_iter=1", SMALL, hand, by_hand, 1.75),
        "users": _row("max_iter=1", LARGE, users, as_users_do, 0.25),
        "micro": _row(
            f"{MICRO_BATCHES} micro-batches", LARGE, f"{hand}, accumulating", by_hand, 1.4, cuts=MICRO_BATCHES
        ),
        "observed": _row("progress bar and CSVLogger", LARGE, "the same without them", _bare, 1.15, **observed),
    }


def medians(row: Row, folder: str, seconds: float) -> tuple[float, float]:
    """Alternate both programs, for about ``seconds`` each; return the medians of their milliseconds per step."""
    programs = (row.ours, row.peer)
    steps = [max(40, int(1e3 * seconds / 8 / program(folder, 40))) for program in programs]
    times: list[list[float]] = [[], []]
    for _ in range(8):
        for program, n, found in zip(programs, steps, times, strict=True):
            found.append(program(folder, n))
    return statistics.median(times[0]), statistics.median(times[1])


def on_two_ranks(folder: str, seconds: float) -> tuple[float, float]:
    """Run both programs of the two-rank row."""
    mine, theirs = on_ranks(2, "benchmarks.full_batch", "--as-rank", folder, "--seconds", seconds)
    return mine, theirs


def as_rank(folder: str, seconds: float) -> list[float]:
    """Run both programs as one of the two ranks; return the medians."""
    times: list[list[float]] = [[], []]
    steps = max(20, int(20 * seconds))
    both = {"devices": 2, "strategy": "ddp"}
    for _ in range(5):
        times[0].append(ours(LARGE, folder, steps, cuts=MICRO_BATCHES, **both))
        times[1].append(accumulating(LARGE, folder, steps, cuts=MICRO_BATCHES, **both))
    return [statistics.median(found) for found in times]


class Saved:
    """Counts the bytes that autograd saves for backward, without parameters, and their maximum."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        """Count a tensor until it is freed."""
        if isinstance(tensor, nn.Parameter) or (tensor.ndim == 2 and isinstance(tensor._base, nn.Parameter)):
            return tensor
        return _Kept(self, tensor)

    def unpack(self, kept: Any) -> Tensor:
        """Return the tensor."""
        return kept.tensor if isinstance(kept, _Kept) else kept


class _Kept:
    def __init__(self, owner: Saved, tensor: Tensor) -> None:
        self.owner, self.tensor, self.size = owner, tensor, tensor.nbytes
        owner.now += self.size
        owner.most = max(owner.most, owner.now)

    def __del__(self) -> None:
        self.owner.now -= self.size


class Counted(Fit):
    """The same model, with its saved tensors counted."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss."""
        with torch.autograd.graph.saved_tensors_hooks(self.saved.pack, self.saved.unpack):
            return super().training_step(batch, batch_idx)


def activations(folder: str) -> dict[str, int]:
    """Measure the peak bytes of activations, with and without micro-batches."""
    found = {}
    for name, size in (("one batch", None), (f"{MICRO_BATCHES} micro-batches", LARGE // MICRO_BATCHES)):
        module = Counted(Rprop)
        module.saved = Saved()
        fit(module, FullBatchLoader(data(LARGE), size), folder, callbacks=[FullBatch()], max_epochs=3)
        found[name] = module.saved.most
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="approximate time for each program of a row")
    parser.add_argument(
        "--only", help="comma-separated prefixes of rows: often, single, users, micro, observed, ranks, memory"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.as_rank:
        answer(as_rank(arguments.as_rank, arguments.seconds))

    found: dict[str, Any] = {}
    print("| row | ms | peer | ms | ratio | allowed |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        table = rows(folder)
        names = [*table, "ranks", "memory"]
        wanted = tuple(arguments.only.split(",")) if arguments.only else ("",)
        chosen = [name for name in names if name.startswith(wanted)]
        if unknown := [prefix for prefix in wanted if not any(name.startswith(prefix) for name in names)]:
            parser.error(f"--only: no row {', '.join(unknown)}. Choose from {', '.join(names)}")
        for name in chosen:
            if name == "memory":
                continue
            if name == "ranks":
                about, peer, allowed = (
                    f"2 gloo ranks, {MICRO_BATCHES} micro-batches each",
                    "Lightning's accumulation",
                    1 / 1.8,
                )
                mine, theirs = on_two_ranks(folder, arguments.seconds)
            else:
                about, peer, allowed = table[name].about, table[name].peer_name, table[name].allowed
                mine, theirs = medians(table[name], folder, arguments.seconds)
            found[name] = {"ms": mine, "peer_ms": theirs}
            ratio = mine / theirs
            print(f"| {about} | {mine:.3f} | {peer} | {theirs:.3f} | {ratio:.2f} | {allowed:.2f} |", flush=True)
        if "memory" in chosen:
            found["memory"] = activations(folder)
            (_, whole), (cut, part) = found["memory"].items()
            print(f"| activations, {cut} | {part:,} B | one batch | {whole:,} B | 1/{whole / part:.1f} | 1/12 |")
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "Lightning": lightning.__version__}
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"\n{about}; {processor()}, 1 thread")
    if arguments.json:
        write_json(arguments.json, {"versions": versions, **found})


if __name__ == "__main__":
    main()
