"""A physics-informed network: Rprop compared with LBFGS and Adam in equal time, with a plot.

The network learns the solution of a Poisson equation on the unit square,

    u_xx + u_yy = f,   u = 0 on the border,

from the equation only. Its loss is the mean squared residual on a grid of interior points, all of them in every step. f
is chosen so that the solution is known, u = sin(pi x) sin(2 pi y), which gives the error.

    python examples/pinn.py
    python examples/pinn.py --seconds 20 --points 100 --micro-batch-size 2000
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if importlib.util.find_spec("matplotlib") is None:
    sys.exit(f"{Path(__file__).name} needs matplotlib: pip install 'lightning-rprop[plot]'")

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

PI = torch.pi


def solution(points: Tensor) -> Tensor:
    """Return the exact u at points ``(n, 2)``, of shape ``(n, 1)``."""
    x, y = points.split(1, dim=1)
    return (PI * x).sin() * (2 * PI * y).sin()


def grid(points: int) -> Tensor:
    """Return the centers of ``points`` x ``points`` cells of the unit square, of shape ``(points^2, 2)``."""
    centers = (torch.arange(points) + 0.5) / points
    return torch.cartesian_prod(centers, centers)


class Poisson(pl.LightningModule):
    """A network for u that is 0 on the border by construction."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.make = make

    def forward(self, points: Tensor) -> Tensor:
        """Return u at points ``(n, 2)``, of shape ``(n, 1)``."""
        x, y = points.split(1, dim=1)
        return 16 * x * (1 - x) * y * (1 - y) * self.net(2 * points - 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Compute the mean square of u_xx + u_yy - f over the points of a micro-batch."""
        points = batch.requires_grad_()
        (slopes,) = torch.autograd.grad(self(points).sum(), points, create_graph=True)
        laplacian = sum(
            torch.autograd.grad(slopes[:, i].sum(), points, create_graph=True)[0][:, i : i + 1] for i in range(2)
        )
        f = -5 * PI**2 * solution(points.detach())
        return (laplacian - f).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer to compare."""
        return self.make(self.parameters())


class History(pl.Callback):
    """Stops after a given time, and records the error at intervals without counting the time for this.

    Args:
        seconds: The training time.
        records: The approximate number of records.
    """

    def __init__(self, seconds: float, records: int = 60) -> None:
        self.seconds = seconds
        self.interval = seconds / records
        self.test_points = grid(101)
        self.clock: list[float] = []
        self.errors: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()
        self.record(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the error if it is due, and stop if the time is over."""
        now = time.perf_counter() - self.start
        over = now >= self.seconds
        if over or now >= self.clock[-1] + self.interval:
            self.record(pl_module)
        trainer.should_stop = over

    @torch.no_grad()
    def record(self, pl_module: pl.LightningModule) -> None:
        """Record the error of u relative to the norm of the exact solution."""
        stopped = time.perf_counter()
        self.clock.append(stopped - self.start)
        exact = solution(self.test_points)
        self.errors.append(float((pl_module(self.test_points) - exact).norm() / exact.norm()))
        self.start += time.perf_counter() - stopped


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Rprop, max_iter 10": lambda params: Rprop(params, lr=1e-3, max_iter=10),
    "LBFGS, max_iter 10": lambda params: torch.optim.LBFGS(
        params, max_iter=10, history_size=50, line_search_fn="strong_wolfe"
    ),
    "Adam, lr 1e-2": lambda params: torch.optim.Adam(params, lr=1e-2),
    "Adam, lr 1e-3": lambda params: torch.optim.Adam(params, lr=1e-3),
}


def plot(histories: dict[str, History], model: Poisson, path: Path) -> None:
    """Plot the errors over time, and the solution and error of the network trained with Rprop."""
    fig = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = fig.subplots(1, 3, width_ratios=[1.5, 1, 1])
    for name, history in histories.items():
        left.plot(history.clock, history.errors, label=name)
    left.set(xlabel="seconds", ylabel="relative error of u", yscale="log", title="Poisson equation, equal time")
    left.legend()
    points = grid(101)
    with torch.no_grad():
        u = model(points)
    for axes, values, title in ((middle, u, "u, by Rprop"), (right, u - solution(points), "its error")):
        image = axes.imshow(values.reshape(101, 101).T, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r")
        axes.set(xlabel="x", ylabel="y", title=title)
        fig.colorbar(image, ax=axes, shrink=0.75)
    fig.savefig(path, dpi=120)


def main() -> None:
    """Train with each optimizer, print a table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="time for each optimizer (default: 15)")
    parser.add_argument("--points", type=int, default=32, help="collocation points on each side (default: 32)")
    parser.add_argument("--micro-batch-size", type=int, help="points on the device at once (default: all)")
    parser.add_argument("--output", type=Path, default=Path("pinn.png"), help="file of the plot (default: pinn.png)")
    arguments = parser.parse_args()
    if arguments.seconds <= 0 or arguments.points < 1:
        parser.error("--seconds must be > 0 and --points >= 1")

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "GPU available but not used")
    histories: dict[str, History] = {}
    models: dict[str, Poisson] = {}
    print(f"{arguments.points**2} points, {arguments.seconds:g} s each")
    print(f"{'optimizer':<21}{'steps':>7}{'loss':>11}{'error':>10}")
    for name, make in OPTIMIZERS.items():
        models[name], histories[name] = Poisson(make), History(arguments.seconds)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FullBatch(log_as="loss"), histories[name]],
        )
        trainer.fit(
            models[name], FullBatchLoader(grid(arguments.points), arguments.micro_batch_size, steps_per_epoch=100)
        )
        loss = float(trainer.callback_metrics["loss"])
        print(f"{name:<21}{trainer.global_step:>7}{loss:>11.2e}{histories[name].errors[-1]:>10.1e}", flush=True)
    plot(histories, models["Rprop, max_iter 10"], arguments.output)
    print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
