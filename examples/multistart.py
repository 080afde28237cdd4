"""Two problems with many local optima from 64 starts: stacked into one model, and with LBFGS one after another.

(a) Hyperparameters of an exact Gaussian process with a spectral mixture kernel (Wilson and Adams 2013): the variance,
bandwidth and frequency of each component, and the noise variance. (b) Two damped oscillations in noise: amplitude,
damping, frequency and phase of each. Both losses have a local optimum for nearly every wrong frequency.

All starts are members of one Stacked and train together, each judged by its own loss, until all have converged. LBFGS
with the strong Wolfe line search then fits the same starts one by one. The table shows the runs that it completes in
the time of the stacked fit, and all of them. "Median" is what a single start ends with.

    python examples/multistart.py
    python examples/multistart.py --starts 16 --seed 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from gaussian_process import GaussianProcess, fit
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_rprop import BestWeights, Convergence, Rprop, Stacked

DOUBLE = torch.float64


class SpectralMixture(GaussianProcess):
    """A GP with a spectral mixture kernel, on inputs ``(n, 1)``; the components have random frequencies.

    Args:
        x: Inputs ``(n, 1)``.
        y: Targets ``(n,)``, standardized.
        components: Number of components.
    """

    def __init__(self, x: Tensor, y: Tensor, components: int = 4) -> None:
        variance = torch.full((components,), 1 / components, dtype=DOUBLE)
        bandwidth = 0.05 + 0.5 * torch.rand(components, dtype=DOUBLE)
        frequency = 3 * torch.rand(components, dtype=DOUBLE)
        super().__init__(x, y, torch.cat([variance, bandwidth, frequency, torch.tensor([0.1], dtype=DOUBLE)]), log=True)

    def kernel(self, squares: Tensor) -> Tensor:
        """Return the covariances ``(n, m)`` of the noise-free function."""
        variance, bandwidth, frequency = self.raw[:-1].exp().view(3, -1)
        waves = torch.cos(2 * torch.pi * squares.sqrt() * frequency)
        return (variance * torch.exp(-0.5 * squares * bandwidth.square()) * waves).sum(dim=-1)

    def frequencies(self) -> Tensor:
        """Return the frequencies of the components whose variance is not near 0."""
        variance, _, frequency = self.raw.detach()[:-1].exp().view(3, -1)
        return frequency[variance > 1e-3]


class Oscillations(nn.Module):
    """A sum of damped oscillations with random frequencies.

    Args:
        t: Times ``(n,)``.
        y: Measured values ``(n,)``.
        modes: Number of oscillations.
    """

    def __init__(self, t: Tensor, y: Tensor, modes: int = 2) -> None:
        super().__init__()
        self.t, self.y = t.unsqueeze(1), y
        self.amplitude = nn.Parameter(torch.ones(modes, dtype=DOUBLE))
        self.log_damping = nn.Parameter(torch.full((modes,), 0.1, dtype=DOUBLE).log())
        self.frequency = nn.Parameter(60 * torch.rand(modes, dtype=DOUBLE))
        self.phase = nn.Parameter(torch.zeros(modes, dtype=DOUBLE))

    def forward(self) -> Tensor:
        """Return the mean squared error."""
        envelope = self.amplitude * torch.exp(-self.log_damping.exp() * self.t)
        return ((envelope * torch.cos(self.frequency * self.t + self.phase)).sum(dim=1) - self.y).square().mean()

    def frequencies(self) -> Tensor:
        """Return the frequencies of the oscillations."""
        return self.frequency.detach().abs()


def gaussian_process() -> Callable[[], nn.Module]:
    """Sample three periodic signals with noise, and return a function that builds a GP with a random start."""
    t = torch.linspace(0, 10, 60, dtype=DOUBLE)
    slow, middle, fast = ((2 * torch.pi * frequency * t).sin() for frequency in (0.37, 1, 2.3))
    y = 0.6 * slow * (0.3 * t).cos() + middle + 0.5 * fast + 0.2 * torch.randn(60, dtype=DOUBLE)
    y = (y - y.mean()) / y.std()
    return lambda: SpectralMixture(t.unsqueeze(1), y)


def oscillations() -> Callable[[], nn.Module]:
    """Sample two damped oscillations with noise, and return a function that builds a model with a random start."""
    t = torch.linspace(0, 20, 400, dtype=DOUBLE)
    y = torch.exp(-0.1 * t) * torch.cos(20 * t + 0.8) + torch.exp(-0.15 * t) * torch.cos(27 * t + 1.8)
    y += 0.3 * torch.randn(400, dtype=DOUBLE)
    return lambda: Oscillations(t, y)


PROBLEMS = {"Gaussian process": gaussian_process, "damped oscillations": oscillations}


class Run(NamedTuple):
    """The losses of all members at all steps ``(steps, n)``, their lowest ones ``(n,)``, and the time in seconds."""

    losses: Tensor
    best: Tensor
    seconds: float


def train(model: Stacked, steps: int) -> Run:
    """Fit all members in a plain PyTorch loop until all have converged, and end with the best weights of each."""
    optimizer = Rprop(model.parameters(), lr=0.1)
    best, convergence = BestWeights(model), Convergence(tolerance_change=1e-6)
    history = []
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        losses = model()
        losses.sum().backward()  # each member gets the gradient of its own loss
        best.update(losses)
        history.append(losses.detach())
        if convergence.update(losses, optimizer):
            break
        optimizer.step(loss=losses)
    best.restore()
    return Run(torch.stack(history), best.loss, time.perf_counter() - start)


class Result(NamedTuple):
    """A stacked run and its best member; for each LBFGS run, the lowest loss ``(n,)`` and when it ended ``(n,)``."""

    stacked: Run
    best: nn.Module
    lowest: Tensor
    ends: Tensor

    def rows(self) -> dict[str, tuple[Tensor, float]]:
        """Return the lowest losses and the seconds of each line of the table."""
        in_time = self.lowest[self.ends <= self.stacked.seconds]
        return {
            "Rprop, stacked": (self.stacked.best, self.stacked.seconds),
            "LBFGS, in the same time": (in_time, self.stacked.seconds),
            "LBFGS, all starts": (self.lowest, float(self.ends[-1])),
        }

    def table(self) -> str:
        """Return the lines of the table."""
        best = min(self.stacked.best.min(), self.lowest.min())
        lines = []
        for name, (lowest, seconds) in self.rows().items():
            values = f"{'-':>9}{'-':>9}{'-':>9}"
            if len(lowest):
                share = (lowest <= best + 1e-3).double().mean()
                values = f"{lowest.min():>9.4f}{lowest.nanquantile(0.5):>9.4f}{share:>9.0%}"
            lines.append(f"{name:<25}{len(lowest):>6}{seconds:>9.2f}{values}")
        frequencies = ", ".join(f"{value:.2f}" for value in self.best.frequencies().sort().values)
        return "\n".join([*lines, f"frequencies of the best member: {frequencies}"])


def compare(make: Callable[[], nn.Module], starts: int, steps: int) -> Result:
    """Fit all starts as one model, and then one after another with LBFGS."""
    model = Stacked(make, starts)
    separate = [model.member(i) for i in range(starts)]
    stacked = train(model, steps)
    fits = [fit(each, torch.optim.LBFGS(each.parameters(), line_search_fn="strong_wolfe"), 1, 500) for each in separate]
    lowest = torch.tensor([each.best for each in fits])
    best = model.member(stacked.best.argmin())
    return Result(stacked, best, lowest, torch.tensor([*accumulate(each.seconds for each in fits)]))


def plot(results: dict[str, Result], path: Path) -> None:
    """Plot the losses of all members over time with the ends of the LBFGS runs, and the lowest losses of all starts."""
    fig = Figure(figsize=(12, 4), layout="constrained")
    panels = fig.subplots(1, 2 * len(results), width_ratios=[1.4, 1] * len(results))
    for (name, result), left, right in zip(results.items(), panels[::2], panels[1::2], strict=True):
        losses, best = result.stacked.losses, int(result.stacked.best.argmin())
        seconds = torch.linspace(0, result.stacked.seconds, len(losses) + 1)[1:]
        left.plot(seconds, losses, color="C0", linewidth=0.5, alpha=0.3)
        left.plot(seconds, losses[:, best], color="C0", linewidth=2, label="Rprop, stacked: the best member")
        left.plot(result.ends, result.lowest, "x", color="C1", label="LBFGS: end of a run")
        left.axhline(result.stacked.best.median(), color="0.4", linestyle=":", label="a single start: the median")
        low, high = (float(limit(result.lowest)) for limit in (torch.min, torch.max))
        margins = low - 0.1 * (high - low), high + 0.5 * (high - low)
        left.set(xscale="log", xlabel="seconds", ylabel="loss", ylim=margins, title=name)
        for label, lowest, color in (("Rprop", result.stacked.best, "C0"), ("LBFGS", result.lowest, "C1")):
            right.plot(range(1, len(lowest) + 1), lowest.sort().values, ".", color=color, label=label)
        right.set(xlabel="starts, sorted", title="lowest loss of each start", ylim=margins)
        right.legend(loc="upper left")
    fig.legend(handles=panels[0].get_lines()[-3:], loc="outside lower center", ncols=3)
    fig.savefig(path, dpi=110)


def main() -> None:
    """Fit both problems, print a table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=64, help="number of starts (default: 64)")
    parser.add_argument("--steps", type=int, default=500, help="maximum of the stacked fit (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the starts (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("multistart.png"), help="file of the plot (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.starts < 2 or arguments.steps < 1:
        parser.error("--starts must be >= 2 and --steps >= 1")

    torch.set_num_threads(1)  # more do not speed up such small problems
    results = {}
    print(f"{'':<25}{'runs':>6}{'seconds':>9}{'best':>9}{'median':>9}{'at best':>9}")
    for name, problem in PROBLEMS.items():
        torch.manual_seed(arguments.seed)
        results[name] = compare(problem(), arguments.starts, arguments.steps)
        print(f"{name}\n{results[name].table()}", flush=True)
    plot(results, arguments.output)
    print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
