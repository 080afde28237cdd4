"""Small problems for the other benchmarks, all with the whole data set in each step."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

Start = tuple[list[Tensor], Callable[[], Tensor]]


class Problem(NamedTuple):
    """A problem, how to start it, and when it counts as solved."""

    about: str
    start: Callable[[], Start]  # returns new parameters and their loss function, drawn from torch's random state
    target: float
    cap: int
    lr: float = 0.01


def mlp(*widths: int) -> nn.Sequential:
    """Stack linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Fit(NamedTuple):
    """Inputs, targets, a function that creates a network from torch's random state, and the loss of its outputs."""

    x: Tensor
    y: Tensor
    net: Callable[[], nn.Sequential]
    criterion: Callable[[Tensor, Tensor], Tensor]

    def start(self) -> Start:
        """Return a new network's parameters and its loss over all samples."""
        net = self.net()
        return list(net.parameters()), lambda: self.criterion(net(self.x), self.y)


def table(
    load: Callable[..., tuple], classes: int, hidden: int, dtype: torch.dtype = torch.float32, standardize: bool = True
) -> Fit:
    """Fit a network to a scikit-learn table: cross-entropy, or squared error if ``classes`` is 1.

    Args:
        load: A loader of :mod:`sklearn.datasets`.
        classes: The number of classes; 1 for a number to regress, which is standardized.
        hidden: The number of hidden units.
        dtype: The dtype of the inputs and the network.
        standardize: Whether to standardize the inputs.
    """
    inputs, targets = load(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(inputs) if standardize else inputs, dtype=dtype)
    y = torch.tensor(targets) if classes > 1 else torch.tensor(targets, dtype=dtype).unsqueeze(1)
    y = y if classes > 1 else (y - y.mean()) / y.std()
    criterion = F.cross_entropy if classes > 1 else F.mse_loss
    return Fit(x, y, lambda: mlp(x.shape[1], hidden, classes).to(dtype), criterion)


def oscillator() -> Start:
    """Physics-informed: u'' + 4 u = 0, u(0) = 1, u'(0) = 0 on [0, pi], with a network for u."""
    net = mlp(1, 20, 20, 1).double()
    t = torch.linspace(0, math.pi, 60, dtype=torch.float64).unsqueeze(1).requires_grad_()

    def loss() -> Tensor:
        u = net(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), t, create_graph=True)
        return (ddu + 4 * u).square().mean() + (u[0] - 1).square().sum() + du[0].square().sum()

    return list(net.parameters()), loss


def likelihood(covariance: Tensor, y: Tensor) -> Tensor:
    """Return the negative log likelihood per sample of a Gaussian process, NaN if the covariance is not positive."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    whitened = torch.linalg.solve_triangular(factor, y.unsqueeze(1), upper=False)
    loss = (0.5 * whitened.square().sum() + factor.diagonal().log().sum()) / len(y)
    return torch.where(failed == 0, loss, torch.nan)


def gaussian_process(samples: int = 200) -> Start:
    """Fit a Gaussian process (10 length scales, signal, noise): negative log likelihood per sample."""
    inputs, targets = load_diabetes(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(inputs))[:samples]
    y = torch.tensor(targets)[:samples]
    y = (y - y.mean()) / y.std()
    logs = (0.5 * torch.randn(12, dtype=torch.float64)).requires_grad_()

    def loss() -> Tensor:
        scaled = x / logs[:10].exp()
        covariance = logs[10].exp() * torch.exp(-0.5 * (scaled.unsqueeze(1) - scaled).square().sum(dim=2))
        return likelihood(covariance + (logs[11].exp() + 1e-6) * torch.eye(len(x), dtype=torch.float64), y)

    return [logs], loss


def ellipsoid(condition: float, rotated: bool) -> Callable[[], Start]:
    """Minimize a quadratic in 20 dimensions, with its axes parallel to the coordinate axes or rotated at random."""

    def start() -> Start:
        scales = condition ** torch.linspace(0, 1, 20, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
        axes = axes if rotated else torch.eye(20, dtype=torch.float64)
        w = F.normalize(torch.randn(20, dtype=torch.float64), dim=0).requires_grad_()
        return [w], lambda: (scales * (axes @ w)).square().sum()

    return start


DIGITS, CANCER, DIABETES = table(load_digits, 10, 32), table(load_breast_cancer, 2, 16), table(load_diabetes, 1, 16)
PROBLEMS = {
    "digits": Problem("digits, 64-32-10 network", DIGITS.start, 1e-3, 500),
    "cancer": Problem("breast cancer, 30-16-2 network", CANCER.start, 1e-4, 500),
    "diabetes": Problem("diabetes, 10-16-1 network", DIABETES.start, 0.2, 3000),
    "oscillator": Problem("oscillator, physics-informed 1-20-20-1", oscillator, 1e-3, 3000),
    "gp": Problem("Gaussian process, 12 hyperparameters", gaussian_process, 0.2036, 300, 0.1),
    "ellipsoid": Problem("ellipsoid, condition 10^2, parallel axes", ellipsoid(10, False), 1e-6, 3000),
    "rotated": Problem("the same, axes turned", ellipsoid(10, True), 1e-6, 3000),
}


def add_only(parser: argparse.ArgumentParser, problems: dict[str, Any] = PROBLEMS) -> None:
    """Add the option ``--only``, which selects some of the problems (default: all)."""

    def select(names: str) -> dict[str, Any]:
        if unknown := set(names.split(",")) - set(problems):
            raise argparse.ArgumentTypeError(
                f"no problem {', '.join(sorted(unknown))}; there are {', '.join(problems)}"
            )
        return {name: problems[name] for name in names.split(",")}

    about = f"some of the problems, separated by commas: {', '.join(problems)}"
    parser.add_argument("--only", type=select, default=problems, help=about)
