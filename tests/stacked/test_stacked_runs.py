"""Every member ends bit for bit as a separate run: 300 steps of a plain loop in float64."""

import io

import pytest
import torch
from torch import nn

from lightning_rprop import Rprop, Stacked

N, STEPS, BAD_AT = 3, 300, 40
X = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.sin(2 * X.sum(1, keepdim=True))
VARIANTS = ("irprop-", "irprop+", "rprop-", "rprop+")
CASES = {  # options, micro-batch size, steps with a bad loss
    "plain": ({}, 60, ()),
    "one bad step": ({"weight_decay": 1e-3, "retreat": True}, 25, (BAD_AT,)),
    "bad from then on": ({"lr": 0.1}, 60, range(BAD_AT, STEPS)),
}


def make():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def evaluate(model, size, dims, bad):
    """Compute losses and gradients from micro-batches; where ``bad``, they are NaN."""
    total = 0.0
    for x, y in zip(X.split(size), Y.split(size), strict=True):
        losses = (model(x) - y).square().sum(dim=dims) / len(X)
        losses = losses * torch.where(bad, torch.nan, 1.0)
        losses.sum().backward()
        total += losses.detach()
    return total


def train(model, optimizer, size, dims, member, bad_at, steps):
    """Train, with NaN for the members ``member`` at the steps ``bad_at``."""
    for step in steps:
        optimizer.zero_grad()
        optimizer.step(loss=evaluate(model, size, dims, member & torch.tensor(step in bad_at)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_members_end_as_separate_runs(case, variant):
    options, size, bad_at = CASES[case]
    torch.manual_seed(0)
    stacked = Stacked(make, N)
    optimizer = Rprop(stacked.parameters(), variant=variant, **options)
    train(stacked, optimizer, size, (1, 2), torch.arange(N) == 2, bad_at, range(STEPS // 2))
    saved = io.BytesIO()
    torch.save((stacked.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    model_state, state = torch.load(saved, weights_only=True)
    stacked = Stacked(make, N)
    stacked.load_state_dict(model_state)
    optimizer = Rprop(stacked.parameters(), variant=variant, **options)
    optimizer.load_state_dict(state)
    train(stacked, optimizer, size, (1, 2), torch.arange(N) == 2, bad_at, range(STEPS // 2, STEPS))

    torch.manual_seed(0)
    for i, net in enumerate([make() for _ in range(N)]):
        own = Rprop(net.parameters(), variant=variant, **options)
        train(net, own, size, (0, 1), torch.tensor(i == 2), bad_at, range(STEPS))
        for key, param in net.named_parameters():
            assert torch.equal(stacked.get_parameter(key)[i], param), (i, key)
            state = optimizer.state[stacked.get_parameter(key)]
            assert torch.equal(state["step_size"][i], own.state[param]["step_size"])
