"""Members of a ``Stacked`` and separate models for them, trained by Lightning."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lit import all_equal
from torch import nn
from whole_set import make_data

from lightning_rprop import Rprop, Stacked

WAVES = tuple(t.double() for t in make_data(103, features=1))  # a prime number of samples


class Wave(nn.Module):
    """A curve of one input. Without matrix products, members give the bits of separate models."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return self.a * torch.sin(3 * self.b * x)


def stacked(n):
    torch.manual_seed(0)
    return Stacked(Wave, n)


class Members(pl.LightningModule):
    """A regression with several members.

    Args:
        net: The ``Stacked``.
        make: Makes the optimizer from the parameters.
        reduction: Of the samples of a micro-batch.
        spoil: Takes the losses and the number of the training_step, and returns others.
    """

    def __init__(self, net, make=Rprop, reduction="mean", spoil=lambda losses, i: losses):
        super().__init__()
        self.net, self.make, self.reduction, self.spoil = net, make, reduction, spoil
        self.steps = 0

    def training_step(self, batch, batch_idx):
        losses = self.spoil(self.losses(*batch), self.steps)
        self.steps += 1
        return {"loss": losses.sum(), "member_losses": losses}

    def losses(self, x, y):
        squares = (self.net(x) - y).square().flatten(1)
        return squares.mean(1) if self.reduction == "mean" else squares.sum(1)

    def configure_optimizers(self):
        return self.make(self.parameters())


class Alone(Members):
    """A single model, which returns an ordinary loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]

    def losses(self, x, y):
        squares = (self.net(x) - y).square()
        return squares.mean() if self.reduction == "mean" else squares.sum()


class Outputs(pl.Callback):
    """Records a value that other callbacks see in the outputs of each step."""

    def __init__(self, name="member_losses"):
        self.name, self.values = name, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs[self.name].clone())


def compare(n, fit, make=Rprop, reduction="mean"):
    """Check that n members have the losses and parameters of n separate fits, bit for bit; return the former.

    Args:
        n: Number of members.
        fit: Fits a module with a callback.
        make: Makes the optimizer.
        reduction: As for ``Members``.
    """
    net, outputs = stacked(n), Outputs()
    models = [net.member(i) for i in range(n)]
    fit(Members(net, make, reduction), outputs)
    losses = torch.stack(outputs.values)
    for i, model in enumerate(models):
        alone = Outputs("loss")
        fit(Alone(model, make, reduction), alone)
        assert torch.equal(losses[:, i], torch.stack(alone.values)), i
        assert all_equal(net.member(i).parameters(), model.parameters()), i
    return losses
