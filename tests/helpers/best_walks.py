"""Walks of parameters with given losses, for the tests of BestWeights."""

from __future__ import annotations

import math

import torch
from torch import nn

LOSSES = [3.0, math.nan, 2.0, 2.0, math.inf, 2.5, -1.0, 0.0]
BEST = 6  # the step of the lowest


def network():
    """Return a network with parameters and buffers."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def move(tensors):
    """Change tensors in place, as a step does."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(1)


def walk(best, tensors, losses=LOSSES):
    """Update with these losses, move after each, and return the tensors at each."""
    seen = []
    for loss in losses:
        seen.append(copies(tensors))
        best.update(torch.tensor(loss))
        move(tensors)
    return seen
