"""A loss with a restricted domain, which a large step leaves."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lightning_rprop import Rprop

ONES = torch.ones(8, 1)


class Domain(pl.LightningModule):
    """Minimizes ``w - 2 sqrt(w)``, which is smallest at 1, and NaN below 0 like its gradient.

    ``losses`` holds the loss of each training_step.

    Args:
        make: Makes the optimizer from the parameters.
        bad: Numbers of the training_steps whose loss is replaced.
        value: What replaces it.
    """

    def __init__(self, make=lambda params: Rprop(params, lr=2.0), bad=(), value=torch.nan):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.5, 3.0]))
        self.make, self.bad, self.value = make, bad, value
        self.losses = []

    def training_step(self, batch, batch_idx):
        w = self.w * batch.mean()
        loss = (w - 2 * w.sqrt()).sum()
        if len(self.losses) in self.bad:
            loss = loss.detach() * 0 + self.value + 0 * self.w.sum()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


def is_solved(module):
    """Return whether the weights are at the minimum; Rprop's smallest step is 1e-6."""
    return torch.allclose(module.w.detach(), torch.ones(2), atol=1e-4)
