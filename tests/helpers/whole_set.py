"""A regression on a whole data set, and its exact gradient: for the tests of full batches."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_rprop import Rprop


def make_data(n, features=5):
    """``n`` samples: inputs ``(n, features)`` and targets ``(n, 1)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, features, generator=generator), torch.randn(n, 1, generator=generator)


def whole_numbers(n):
    """The same in small whole numbers: all sums of them are exact in float64, whoever adds them up."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-4, 5, (n, 5), generator=generator).double()
    return x, torch.randint(-40, 41, (n, 1), generator=generator).double()


class Regression(pl.LightningModule):
    """A small network; it keeps the gradients that the optimizer gets, and the targets of the batches it sees."""

    def __init__(self, make=Rprop, reduction="mean", net=None, **log):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
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
    """The mean squared error over all samples and its gradient, in float64."""
    net = copy.deepcopy(net).double()
    x, y = (t.double() for t in data)
    loss = (net(x) - y).square().mean()
    return loss.item(), torch.autograd.grad(loss, list(net.parameters()))


def relative_error(gradients, exact_ones):
    """The norm of the difference, over all parameters, relative to the exact gradient's."""
    difference = sum((a.double() - b).square().sum() for a, b in zip(gradients, exact_ones, strict=True))
    return (difference / sum(b.square().sum() for b in exact_ones)).sqrt().item()
