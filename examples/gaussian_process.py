"""The hyperparameters of an exact Gaussian process: Rprop compared with LBFGS and Adam, with a plot.

They are the relevance (inverse length scale) of each input, the signal variance and the noise variance. The loss is the
negative log marginal likelihood per sample. The data are scikit-learn's Friedman #1, where 5 of the 10 inputs matter.

Each start is fitted twice. On the plain hyperparameters, a step can make the noise variance negative, which makes the
loss NaN: Rprop takes that step back and converges, while Rprop without retreat, LBFGS and Adam with lr 0.1 mostly end
at NaN. On the logarithms Rprop has nothing to take back, and LBFGS needs half the evaluations but ends at a worse
optimum from half the starts. Use logarithms if the optimum may be at the border of the domain, such as a noise variance
of 0: retreat recovers from a step that is too long, but does not handle bounds.

    python examples/gaussian_process.py
    python examples/gaussian_process.py --starts 3 --evaluations 100
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

if missing := [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]:
    sys.exit(f"{Path(__file__).name} needs {' and '.join(missing)}: pip install 'lightning-rprop[examples]'")

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer

from lightning_rprop import BestWeights, Convergence, Rprop


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared differences of inputs ``(n, d)`` and ``(m, d)``, of shape ``(n, m, d)``."""
    return (a.unsqueeze(1) - b).square()


class GaussianProcess(nn.Module):
    """An exact GP with a squared exponential kernel.

    Args:
        x: Inputs ``(n, d)``.
        y: Targets ``(n,)``.
        start: Initial hyperparameters ``(d + 2,)``: relevances, signal variance, noise variance.
        log: Whether to train their logarithms.
    """

    def __init__(self, x: Tensor, y: Tensor, start: Tensor, log: bool) -> None:
        super().__init__()
        self.x, self.y, self.log = x, y.unsqueeze(1), log
        self.squares, self.eye = squares(x, x), torch.eye(len(x), dtype=x.dtype)
        self.raw = nn.Parameter(start.log() if log else start.clone())

    def hyperparameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relevances ``(d,)``, the signal variance and the noise variance."""
        values = self.raw.exp() if self.log else self.raw
        return values[:-2], values[-2], values[-1]

    def kernel(self, squares: Tensor) -> Tensor:
        """Return the covariances ``(n, m)`` of the noise-free function."""
        relevance, signal, _ = self.hyperparameters()
        return signal * torch.exp(-0.5 * (squares @ relevance.square()))

    def cholesky(self) -> Tensor:
        """Return the Cholesky factor ``(n, n)`` of the covariances with noise, or NaN outside the domain."""
        *_, noise = self.hyperparameters()
        factor, info = torch.linalg.cholesky_ex(self.kernel(self.squares) + noise * self.eye)
        return factor * torch.where((info == 0) & (noise > 0), 1.0, torch.nan)

    def forward(self) -> Tensor:
        """Return the negative log marginal likelihood per sample."""
        factor = self.cholesky()
        white = torch.linalg.solve_triangular(factor, self.y, upper=False)
        return 0.5 * white.square().mean() + factor.diagonal().log().mean() + 0.5 * math.log(2 * math.pi)

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Return the root mean squared error and the mean negative log density of other samples."""
        factor = self.cholesky()
        white = torch.linalg.solve_triangular(factor, self.kernel(squares(self.x, x)), upper=False)
        error = y - white.T @ torch.linalg.solve_triangular(factor, self.y, upper=False).squeeze(1)
        _, signal, noise = self.hyperparameters()
        variance = signal + noise - white.square().sum(dim=0)
        density = 0.5 * (error.square() / variance + (2 * math.pi * variance).log()).mean()
        return error.square().mean().sqrt().item(), density.item()


class Fit(NamedTuple):
    """The lowest loss, the losses at all evaluations, the time in seconds, and why the fit stopped."""

    best: float
    losses: list[float]
    seconds: float
    stop: str


def fit(model: nn.Module, optimizer: Optimizer, patience: int, evaluations: int) -> Fit:
    """Fit in a plain PyTorch loop that stops at convergence, and end with the best parameters."""
    best = BestWeights(model)
    convergence = Convergence(tolerance_change=1e-6, patience=patience)
    losses: list[float] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        best.update(loss)
        losses.append(loss.item())
        return loss

    start, stop = time.perf_counter(), ""
    while not stop:
        loss = optimizer.step(evaluate)
        if convergence.update(loss, model.parameters()):
            stop = "converged"
        elif not any(map(math.isfinite, losses[-10:])):
            stop = "NaN"
        elif len(losses) >= evaluations:
            stop = "budget"
    best.restore()
    return Fit(best.loss, losses, time.perf_counter() - start, stop)


# With the patience of Convergence: LBFGS makes up to 20 iterations in a step, so one step without progress is enough.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], int]] = {
    "Rprop": (lambda params: Rprop(params, lr=0.1), 10),
    "Rprop, retreat=False": (lambda params: Rprop(params, lr=0.1, retreat=False), 10),
    "LBFGS": (lambda params: LBFGS(params, line_search_fn="strong_wolfe"), 1),
    "Adam, lr 0.1": (lambda params: Adam(params, lr=0.1), 10),
    "Adam, lr 0.03": (lambda params: Adam(params, lr=0.03), 10),
}
KINDS = ("plain", "log")


def plot(fits: dict[tuple[str, str], list[Fit]], found: list[GaussianProcess], evaluations: int, path: Path) -> None:
    """Plot the lowest losses so far (median and quartiles of the starts), and the relevances of the inputs."""
    lowest = min(fit.best for row in fits.values() for fit in row)
    fig = Figure(figsize=(12, 4.5), layout="constrained")
    *panels, right = fig.subplots(1, 3)
    steps = range(1, evaluations + 1)
    for (kind, name), row in fits.items():
        losses = torch.full((len(row), evaluations), torch.inf)
        for i, fit in enumerate(row):
            values = torch.tensor(fit.losses[:evaluations]).nan_to_num(torch.inf)
            losses[i, : len(values)] = values
        above = (losses.cummin(dim=1).values - lowest).clamp(min=1e-6)
        low, middle, high = above.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
        axes = panels[KINDS.index(kind)]
        axes.plot(steps, middle, label=name, linestyle="--" if "False" in name else "-")
        axes.fill_between(steps, low, high, alpha=0.15)
        axes.set(xlabel="evaluations", yscale="log", ylim=(5e-7, 3), title=f"{kind} hyperparameters")
    panels[0].set_ylabel("loss minus the lowest of all")
    fig.legend(handles=panels[0].get_lines(), loc="outside lower center", ncols=len(OPTIMIZERS))
    right.axvspan(0.5, 5.5, color="0.92", zorder=0, label="inputs that matter")
    for gp in found:
        relevance = gp.hyperparameters()[0].detach().abs()
        inputs = range(1, len(relevance) + 1)
        right.plot(inputs, relevance, "o", color="C0", alpha=0.4)
    right.set(xlabel="input", xticks=inputs, ylabel="relevance", title="relevances found by Rprop, all starts")
    right.legend()
    fig.savefig(path, dpi=120)


def main() -> None:
    """Fit with each optimizer from each start, print a table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10, help="number of starts (default: 10)")
    parser.add_argument("--evaluations", type=int, default=200, help="maximum of a fit (default: 200)")
    parser.add_argument(
        "--output", type=Path, default=Path("gaussian_process.png"), help="file of the plot (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.starts < 1 or arguments.evaluations < 1:
        parser.error("--starts and --evaluations must be >= 1")

    torch.set_num_threads(1)  # more do not speed up such small matrices
    x, y = (torch.from_numpy(array) for array in make_friedman1(500, noise=1.0, random_state=0))
    x, y = (x - x.mean(dim=0)) / x.std(dim=0), (y - y.mean()) / y.std()
    train, test = (x[:100], y[:100]), (x[100:], y[100:])
    torch.manual_seed(0)
    # length scales near the typical distance of two samples, which is sqrt(20)
    typical = torch.tensor([0.2] * 10 + [1, 0.1], dtype=torch.float64)
    starts = [typical * (0.5 * torch.randn(12, dtype=torch.float64)).exp() for _ in range(arguments.starts)]

    fits: dict[tuple[str, str], list[Fit]] = {}
    found: dict[tuple[str, str], list[GaussianProcess]] = {}
    print(f"{len(starts)} starts, at most {arguments.evaluations} evaluations; medians, the worst loss, all retreats")
    print(
        f"{'':<6}{'optimizer':<21}{'loss':>7}{'worst':>8}{'evaluations':>13}{'seconds':>9}{'RMSE':>7}{'NLPD':>8}"
        f"{'retreats':>10}  stop"
    )
    for kind, (name, (make, patience)) in product(KINDS, OPTIMIZERS.items()):
        gps = [GaussianProcess(*train, start, log=kind == "log") for start in starts]
        optimizers = [make(gp.parameters()) for gp in gps]
        row = [fit(gp, opt, patience, arguments.evaluations) for gp, opt in zip(gps, optimizers, strict=True)]
        found[kind, name], fits[kind, name] = gps, row
        rmse, nlpd = map(median, zip(*(gp.errors(*test) for gp in gps), strict=True))
        retreats = sum(int(getattr(optimizer, "retreats", 0)) for optimizer in optimizers)
        stops = ", ".join(f"{count} {stop}" for stop, count in Counter(fit.stop for fit in row).items())
        print(
            f"{kind:<6}{name:<21}{median(fit.best for fit in row):>7.4f}{max(fit.best for fit in row):>8.4f}"
            f"{median(len(fit.losses) for fit in row):>13.0f}{median(fit.seconds for fit in row):>9.2f}"
            f"{rmse:>7.3f}{nlpd:>8.3f}{retreats:>10}  {stops}",
            flush=True,
        )
    plot(fits, found["plain", "Rprop"], arguments.evaluations, arguments.output)
    print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
