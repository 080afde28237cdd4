"""A physics-informed network: Rprop compared with LBFGS and Adam in equal time.

The network learns the solution of u_xx + u_yy = f on the unit square, with u = 0 on the border, from the equation only.
Its loss is the mean squared residual at 1,024 collocation points, all of them in every step. f is chosen so that the
solution is u = sin(pi x) sin(2 pi y).

    python examples/pinn.py
"""

import argparse
import time
from functools import partial
from math import pi

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd import grad

from lightning_rprop import FullBatch, FullBatchLoader, Rprop


def solution(points: Tensor) -> Tensor:
    """Return the exact u ``(n,)`` at points ``(n, 2)``."""
    return (pi * points[:, 0]).sin() * (2 * pi * points[:, 1]).sin()


def grid(points: int) -> Tensor:
    """Return the centers of ``points`` x ``points`` cells of the unit square, of shape ``(points^2, 2)``."""
    centers = (torch.arange(points) + 0.5) / points
    return torch.cartesian_prod(centers, centers)


class Poisson(pl.LightningModule):
    """A network for u that is 0 on the border by construction."""

    def __init__(self, make: partial[torch.optim.Optimizer]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.make = make

    def forward(self, points: Tensor) -> Tensor:
        """Return u ``(n,)`` at points ``(n, 2)``."""
        x, y = points.unbind(dim=1)
        return 16 * x * (1 - x) * y * (1 - y) * self.net(2 * points - 1).squeeze(1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Compute the mean square of u_xx + u_yy - f over the points of a micro-batch."""
        points = batch.requires_grad_()
        (slopes,) = grad(self(points).sum(), points, create_graph=True)
        laplacian = sum(grad(slopes[:, i].sum(), points, create_graph=True)[0][:, i] for i in range(2))
        return (laplacian + 5 * pi**2 * solution(points.detach())).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer to compare."""
        return self.make(self.parameters())


class History(pl.Callback):
    """Records the error of u relative to the solution's norm, prints some records, and stops when the time is over."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.clock, self.errors = name, seconds, [], []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.points, self.solution = grid(101), solution(grid(101))
        self.start = time.process_time()  # other programs do not count

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Record the error if it is due."""
        now = time.process_time() - self.start
        if now < self.seconds * len(self.clock) / 60:
            return
        self.clock.append(now)
        self.errors.append(float((pl_module(self.points) - self.solution).norm() / self.solution.norm()))
        trainer.should_stop = now >= self.seconds
        if trainer.should_stop or len(self.clock) % 12 == 0:
            print(f"{self.name:<6}{now:5.1f} s {trainer.global_step:5d} steps  error {self.errors[-1]:.1e}", flush=True)


def main() -> None:
    """Train with each optimizer and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="time for each optimizer (default: 15)")
    parser.add_argument("--micro-batch-size", type=int, help="points on the device at once (default: all)")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error(f"--seconds must be > 0, got {arguments.seconds:g}")

    torch.set_num_threads(1)  # more do not speed up such a small network
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fig = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1.4, 1])
    optimizers = {
        "Rprop": partial(Rprop, lr=1e-3, max_iter=10),
        "LBFGS": partial(torch.optim.LBFGS, max_iter=10, history_size=50, line_search_fn="strong_wolfe"),
        "Adam": partial(torch.optim.Adam, lr=1e-2),
    }
    for name, make in optimizers.items():
        model, history = Poisson(make), History(name, arguments.seconds)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=-1, callbacks=[FullBatch(), history], **quiet)
        trainer.fit(model, FullBatchLoader(grid(32), arguments.micro_batch_size, steps_per_epoch=100))
        left.plot(history.clock, history.errors, label=name)
        if name == "Rprop":
            u = model(history.points).detach().view(101, 101).T
            right.imshow(u, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r")
    left.set(xlabel="seconds", yscale="log", title="relative error of u")
    left.legend()
    right.set(xlabel="x", ylabel="y", title="u, by Rprop")
    fig.savefig("pinn.png", dpi=110)
    print("plot saved to pinn.png")


if __name__ == "__main__":
    main()
