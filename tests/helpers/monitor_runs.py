"""What the tests of StepSizeMonitor in a Trainer share."""

from __future__ import annotations

import torch
from lit import Net

from lightning_rprop import Rprop, StepSizeMonitor
from lightning_rprop.monitor._warnings import TOPICS

NAMES = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")
BOUNDS = (0.03, 0.2)  # the step sizes of these short runs reach both

# Float64 sums are added in a different order here. callback_metrics and TensorBoard store float32.
CLOSE = {"rel": 1e-12, "abs": 1e-15}
FLOAT32 = {"rel": 1e-6, "abs": 1e-7}


def make_ours(module):
    return Rprop(module.parameters(), lr=0.1, step_sizes=BOUNDS, weight_decay=0.01)


def make_torch(module):
    return torch.optim.Rprop(module.parameters(), lr=0.1, step_sizes=BOUNDS)


def quiet_monitor(**options):
    """Build a monitor that never warns; test_advice.py tests the warnings."""
    return StepSizeMonitor(silence=TOPICS, **options)


def published(trainer):
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("step_size")}


class TakingTurns(Net):
    """Step one of two optimizers per batch, alternately."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        optimizer.step()
