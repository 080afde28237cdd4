"""Networks for classification and regression, and one iteration of fitted Q."""

from __future__ import annotations

import math
from functools import partial

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_linnerud, load_wine
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from benchmarks.problems import CANCER, DIABETES, DIGITS, Fit, Start, mlp, table
from benchmarks.suite.case import Case


def linnerud() -> Start:
    """Regress three body measures on three exercises in their units, 20 samples."""
    inputs, targets = (torch.tensor(each) for each in load_linnerud(return_X_y=True))
    targets = (targets - targets.mean(dim=0)) / targets.std(dim=0)
    return Fit(inputs, targets, lambda: mlp(3, 10, 3).double(), F.mse_loss).start()


def spirals() -> Start:
    """Separate two spirals of 97 points each (Lang and Witbrock 1988)."""
    i = torch.arange(97)
    angle, radius = i * math.pi / 16, 6.5 * (104 - i) / 104
    one = torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1)
    x, y = torch.cat([one, -one]), torch.cat([torch.ones(97), torch.zeros(97)]).unsqueeze(1)
    return Fit(x, y, lambda: mlp(2, 20, 20, 1), F.binary_cross_entropy_with_logits).start()


def mountain_car(state: Tensor, action: Tensor) -> Tensor:
    """Return the next states ``(n, 2)`` (position, velocity) of the mountain car; actions are -1, 0 and 1."""
    position, velocity = state.unbind(1)
    velocity = (velocity + 0.001 * action - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
    position = (position + velocity).clamp(min=-1.2)
    return torch.stack([position, torch.where(position > -1.2, velocity, 0)], dim=1)


def fitted_q() -> Start:
    """Fit the costs of 600 random transitions of the mountain car: one iteration of NFQ (Riedmiller 2005)."""
    state = torch.rand(600, 2) * torch.tensor([1.8, 0.14]) - torch.tensor([1.2, 0.07])
    action = torch.randint(-1, 2, (600,))
    after = mountain_car(state, action)
    scale = torch.tensor([1, 10])

    def network() -> nn.Sequential:
        layers = (nn.Sigmoid() if isinstance(each, nn.Tanh) else each for each in mlp(3, 5, 5, 1))
        return nn.Sequential(*layers, nn.Sigmoid())

    previous = network()
    with torch.no_grad():
        for p in previous.parameters():
            p *= 5  # costs that differ from state to state, as after several iterations
        costs = [previous(torch.cat([scale * after, torch.full((600, 1), a)], dim=1)) for a in (-1.0, 0.0, 1.0)]
        rest = torch.cat(costs, dim=1).amin(dim=1, keepdim=True)
        targets = torch.where(after[:, :1] >= 0.5, 0, (0.01 + rest).clamp(max=1))
    return Fit(torch.cat([scale * state, action.unsqueeze(1)], dim=1), targets, network, F.mse_loss).start()


IRIS = table(load_iris, 3, 10, torch.float64)._replace(criterion=partial(F.cross_entropy, label_smoothing=0.1))
CANCER_RAW = table(load_breast_cancer, 2, 16, standardize=False)
WINE_RAW = table(load_wine, 3, 16, standardize=False)
DIABETES_RAW = table(partial(load_diabetes, scaled=False), 1, 16, torch.float64, standardize=False)

CLASSIFICATION, REGRESSION = "classification network", "regression network"
CASES = {
    "digits": Case(CLASSIFICATION, "digits, 64-32-10", DIGITS.start),
    "cancer": Case(CLASSIFICATION, "breast cancer, 30-16-2", CANCER.start),
    "iris": Case(CLASSIFICATION, "iris, 4-10-3, smoothed labels", IRIS.start),
    "cancer-raw": Case(CLASSIFICATION, "breast cancer, inputs in their units, 30-16-2", CANCER_RAW.start),
    "wine-raw": Case(CLASSIFICATION, "wine, inputs in their units, 13-16-3", WINE_RAW.start),
    "spirals": Case(CLASSIFICATION, "two spirals, 2-20-20-1", spirals),
    "diabetes": Case(REGRESSION, "diabetes, 10-16-1", DIABETES.start),
    "diabetes-raw": Case(REGRESSION, "diabetes, inputs in their units, 10-16-1", DIABETES_RAW.start),
    "linnerud-raw": Case(REGRESSION, "Linnerud, inputs in their units, 3-10-3", linnerud),
    "fitted-q": Case("fitted Q iteration", "mountain car, one iteration of NFQ, 3-5-5-1", fitted_q),
}
