"""Statistical models: Gaussian processes, Poisson log-normal, logistic regression and matrix factorization."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from benchmarks.problems import Start, gaussian_process, likelihood
from benchmarks.suite.case import Case


def series() -> Start:
    """Fit a Gaussian process to 80 points of a trend with a period: seven logarithms of hyperparameters."""
    double = torch.float64
    t = torch.linspace(0, 10, 80, dtype=double)
    y = (2 * math.pi * t / 1.3).sin() + 0.5 * (t / 2).sin() + 0.1 * torch.randn(80, dtype=double)
    logs = (torch.tensor([0, 1, 0, 0, 0.2, 0, -1], dtype=double) + 0.2 * torch.randn(7, dtype=double)).requires_grad_()
    distance = (t.unsqueeze(1) - t).abs()

    def loss() -> Tensor:
        trend, length, wave, smooth, period, decay, noise = logs.exp()
        covariance = trend * torch.exp(-0.5 * (distance / length).square())
        turns = (math.pi * distance / period).sin() / smooth
        covariance = covariance + wave * torch.exp(-2 * turns.square() - 0.5 * (distance / (10 * decay)).square())
        return likelihood(covariance + (noise.square() + 1e-6) * torch.eye(80, dtype=double), y)

    return [logs], loss


def poisson_lognormal() -> Start:
    """Fit a Poisson log-normal model to 60 x 12 counts (Chiquet, Mariadassou and Robin 2021): variational bound.

    The parameters are the coefficients, and the mean and standard deviation of each latent variable. The covariance
    of the latent variables that maximizes the bound is known in closed form.
    """
    n, p, double = 60, 12, torch.float64
    x = torch.cat([torch.ones(n, 1), torch.randn(n, 2)], dim=1).double()
    b = torch.randn(3, p, dtype=double) * torch.tensor([[1], [0.5], [0.5]], dtype=double) + torch.tensor(
        [[2], [0], [0]]
    )
    factor = torch.linalg.cholesky(0.6 ** (torch.arange(p).unsqueeze(1) - torch.arange(p)).abs().double())
    y = torch.poisson((x @ b + 0.7 * torch.randn(n, p, dtype=double) @ factor.T).exp())
    coefficients = torch.zeros(3, p, dtype=double)
    means, deviations = 0.1 * torch.randn(n, p, dtype=double), 1 + 0.1 * torch.randn(n, p, dtype=double)
    params = [coefficients, means, deviations]
    for each in params:
        each.requires_grad_()

    def loss() -> Tensor:
        linear, variances = x @ coefficients + means, deviations.square()
        fit = (y * linear - (linear + variances / 2).exp() + 0.5 * variances.log()).sum()
        sigma = (means.T @ means + variances.sum(dim=0).diag()) / n
        return 0.5 * torch.linalg.slogdet(sigma).logabsdet - fit / n

    return params, loss


def logistic(standardize: bool) -> Callable[[], Start]:
    """Fit a logistic regression to breast cancer with an L2 penalty, with standardized inputs or in their units."""
    inputs, targets = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(StandardScaler().fit_transform(inputs) if standardize else inputs), torch.tensor(targets)
    y = y.double()

    def start() -> Start:
        w, bias = 0.01 * torch.randn(30, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        params = [w.requires_grad_(), bias.requires_grad_()]
        return params, lambda: F.binary_cross_entropy_with_logits(x @ w + bias, y) + 1e-3 * w.square().sum()

    return start


def softmax() -> Start:
    """Fit a softmax regression to the digits, pixels from 0 to 1, with an L2 penalty."""
    inputs, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)
    w, bias = (0.01 * torch.randn(64, 10)).requires_grad_(), torch.zeros(10, requires_grad=True)
    return [w, bias], lambda: F.cross_entropy(x @ w + bias, y) + 1e-4 * w.square().sum()


def factorization() -> Start:
    """Factorize an 80 x 60 matrix of rank 5, of which half of the entries are known, with an L2 penalty."""
    target = torch.randn(80, 5) @ torch.randn(5, 60) + 0.1 * torch.randn(80, 60)
    known = torch.rand(80, 60) < 0.5
    u, v = (0.3 * torch.randn(80, 5)).requires_grad_(), (0.3 * torch.randn(5, 60)).requires_grad_()

    def loss() -> Tensor:
        errors = torch.where(known, u @ v - target, 0)
        return (errors.square().sum() + 0.1 * (u.square().sum() + v.square().sum())) / 2400

    return [u, v], loss


GP, REGRESSION = "Gaussian process", "logistic and softmax regression"
CASES = {
    "gp": Case(GP, "80 samples of diabetes, 10 length scales", partial(gaussian_process, 80)),
    "gp-series": Case(GP, "time series, trend and period", series),
    "pln": Case("Poisson log-normal model", "60 x 12 counts, two covariates", poisson_lognormal),
    "logistic": Case(REGRESSION, "breast cancer, logistic", logistic(standardize=True)),
    "logistic-raw": Case(REGRESSION, "breast cancer, logistic, inputs in their units", logistic(standardize=False)),
    "softmax": Case(REGRESSION, "digits, softmax", softmax),
    "factorization": Case("matrix factorization", "80 x 60, rank 5, half of the entries", factorization),
}
