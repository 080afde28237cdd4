"""Which variant wins where: gradient evaluations to a target loss, on whole-data-set problems.

Every problem is run from the same starts with each variant, at Rprop's usual parameters (lr 0.01, 0.1 for the Gaussian
process; etas 0.5 and 1.2; step sizes from 1e-6 to 50). Printed is the median over the starts (an unsolved one counts as
infinite), and how many starts were solved within the cap.

    python -m benchmarks.variants
    python -m benchmarks.variants --starts 3 --only digits,gp
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from lightning_rprop import Rprop

VARIANTS = ("rprop+", "rprop-", "irprop+", "irprop-")
Start = tuple[list[Tensor], Callable[[], Tensor]]


class Problem(NamedTuple):
    """What is solved, from where, and when it counts as solved."""

    about: str
    start: Callable[[], Start]  # parameters and loss, made anew from torch's random state
    target: float
    cap: int
    lr: float = 0.01


def mlp(*widths: int) -> nn.Sequential:
    """Stack linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def table(load: Callable[..., tuple], classes: int, hidden: int) -> Callable[[], Start]:
    """Fit a network to one of scikit-learn's tables, standardised: cross-entropy, or squared error for one class."""
    inputs, targets = load(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(inputs), dtype=torch.float32)
    y = torch.tensor(targets) if classes > 1 else torch.tensor(targets, dtype=torch.float32).unsqueeze(1)
    y = y if classes > 1 else (y - y.mean()) / y.std()

    def start() -> Start:
        net = mlp(x.shape[1], hidden, classes)
        criterion = F.cross_entropy if classes > 1 else F.mse_loss
        return list(net.parameters()), lambda: criterion(net(x), y)

    return start


def oscillator() -> Start:
    """Physics-informed: u'' + 4 u = 0, u(0) = 1, u'(0) = 0 on [0, pi], by a network of its own for u."""
    net = mlp(1, 20, 20, 1).double()
    t = torch.linspace(0, math.pi, 60, dtype=torch.float64).unsqueeze(1).requires_grad_()

    def loss() -> Tensor:
        u = net(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), t, create_graph=True)
        return (ddu + 4 * u).square().mean() + (u[0] - 1).square().sum() + du[0].square().sum()

    return list(net.parameters()), loss


def gaussian_process() -> Start:
    """Hyperparameters of a Gaussian process (10 length scales, signal, noise): negative log likelihood a sample."""
    inputs, targets = load_diabetes(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(inputs))[:200]
    y = torch.tensor(targets)[:200]
    y = (y - y.mean()) / y.std()
    logs = (0.5 * torch.randn(12, dtype=torch.float64)).requires_grad_()

    def loss() -> Tensor:
        scaled = x / logs[:10].exp()
        covariance = logs[10].exp() * torch.exp(-0.5 * (scaled.unsqueeze(1) - scaled).square().sum(dim=2))
        covariance = covariance + (logs[11].exp() + 1e-6) * torch.eye(len(x), dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance)
        whitened = torch.linalg.solve_triangular(factor, y.unsqueeze(1), upper=False)
        return (0.5 * whitened.square().sum() + factor.diagonal().log().sum()) / len(x)

    return [logs], loss


def ellipsoid(condition: float, rotated: bool) -> Callable[[], Start]:
    """Minimise a quadratic in 20 dimensions, with axes parallel to the coordinates' or turned at random."""

    def start() -> Start:
        scales = condition ** torch.linspace(0, 1, 20, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
        axes = axes if rotated else torch.eye(20, dtype=torch.float64)
        w = F.normalize(torch.randn(20, dtype=torch.float64), dim=0).requires_grad_()
        return [w], lambda: (scales * (axes @ w)).square().sum()

    return start


PROBLEMS = {
    "digits": Problem("digits, 64-32-10 network", table(load_digits, 10, 32), 1e-3, 500),
    "cancer": Problem("breast cancer, 30-16-2 network", table(load_breast_cancer, 2, 16), 1e-4, 500),
    "diabetes": Problem("diabetes, 10-16-1 network", table(load_diabetes, 1, 16), 0.2, 3000),
    "oscillator": Problem("oscillator, physics-informed 1-20-20-1", oscillator, 1e-3, 3000),
    "gp": Problem("Gaussian process, 12 hyperparameters", gaussian_process, 0.2036, 300, 0.1),
    "ellipsoid": Problem("ellipsoid, condition 10^2, parallel axes", ellipsoid(10, False), 1e-6, 3000),
    "rotated": Problem("the same, axes turned", ellipsoid(10, True), 1e-6, 3000),
}


def evaluations(problem: Problem, variant: str, seed: int) -> tuple[float, float]:
    """Count the evaluations to the target (inf: not within the cap), and give the best loss."""
    torch.manual_seed(seed)
    params, loss_function = problem.start()
    optimizer = Rprop(params, lr=problem.lr, variant=variant)
    best = math.inf
    for count in range(1, problem.cap + 1):
        optimizer.zero_grad()
        loss = loss_function()
        best = min(best, loss.item())
        if best <= problem.target:
            return count, best
        loss.backward()
        optimizer.step(loss=loss)
    return math.inf, best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=11, help="starts of each problem (default: 11)")
    parser.add_argument("--only", help=f"some of the problems, separated by commas: {', '.join(PROBLEMS)}")
    parser.add_argument("--best", action="store_true", help="print the median of the best losses too")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(PROBLEMS)
    if unknown := set(chosen) - set(PROBLEMS):
        parser.error(f"--only: no problem {', '.join(sorted(unknown))}; there are {', '.join(PROBLEMS)}")

    begin = time.perf_counter()
    print(f"| problem | target | {' | '.join(VARIANTS)} |\n|---|---|{'---|' * len(VARIANTS)}")
    for name in chosen:
        problem = PROBLEMS[name]
        cells = []
        for variant in VARIANTS:
            results = [evaluations(problem, variant, seed) for seed in range(arguments.starts)]
            middle = statistics.median(count for count, _ in results)
            solved = sum(math.isfinite(count) for count, _ in results)
            cell = f"{middle:.0f}" if math.isfinite(middle) else f">{problem.cap}"
            cell += f" ({solved}/{arguments.starts})"
            if arguments.best:
                cell += f" {statistics.median(best for _, best in results):.4g}"
            cells.append(cell)
        print(f"| {problem.about} | {problem.target:g} | {' | '.join(cells)} |", flush=True)
    threads, seconds = torch.get_num_threads(), time.perf_counter() - begin
    print(f"\nPython {platform.python_version()}, torch {torch.__version__}, {threads} threads, {seconds:.0f} s")


if __name__ == "__main__":
    main()
