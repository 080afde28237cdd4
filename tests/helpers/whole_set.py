"""A regression on a small data set, with its exact gradient."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_rprop import Rprop


def make_data(n, features=5):
    """Return ``n`` random samples: inputs ``(n, features)`` and targets ``(n, 1)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, features, generator=generator), torch.randn(n, 1, generator=generator)


def whole_numbers(n):
    """Return ``n`` samples of small integers, whose sums are exact in float64 in any order."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-4, 5, (n, 5), generator=generator).double()
    return x, torch.randint(-40, 41, (n, 1), generator=generator).double()


def network(*layers):
    """Return a small network, the same at each call, with extra layers after the first."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Tanh(), nn.Linear(8, 1))


class Regression(pl.LightningModule):
    """A small regression that records the gradients its optimizer gets and the targets of its batches."""

    def __init__(self, make=Rprop, reduction="mean", net=None, **log):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or network()
        self.make = make
        self.reduction = reduction
        self.log_options = log
        self.gradients = []
        self.targets = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.targets.append(y.flatten())
        losses = (self.net(x) - y).square()
        if self.log_options:
            self.log("loss", losses.mean(), **self.log_options)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return self.make(self.parameters())


def exact(net, data):
    """Return the mean squared error over all samples and its gradient, computed in float64."""
    net = copy.deepcopy(net).double()
    x, y = (t.double() for t in data)
    loss = (net(x) - y).square().mean()
    return loss.item(), torch.autograd.grad(loss, list(net.parameters()))


def relative_error(gradients, exact_ones):
    """Return the norm of the difference over all parameters, relative to the norm of the exact gradient."""
    difference = sum((a.double() - b).square().sum() for a, b in zip(gradients, exact_ones, strict=True))
    return (difference / sum(b.square().sum() for b in exact_ones)).sqrt().item()
