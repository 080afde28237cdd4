"""Check losses for NaN as FullBatch does on an accelerator."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from domain import Domain

from lightning_rprop import Rprop
from lightning_rprop.full_batch._bad_losses import BadLosses


class Elsewhere(torch.Tensor):
    """A loss that seems to be on an accelerator."""

    is_cpu = False


def watch(losses, **options):
    """Check losses as on an accelerator, and return how many are unread after each."""
    trainer = SimpleNamespace(world_size=1, strategy=SimpleNamespace(broadcast=lambda value, src: value))
    evaluation = SimpleNamespace(trainer=trainer, pl_module=Domain(), inputs=lambda: iter(()), scaler=None)
    vars(evaluation).update(options)
    bad_losses, optimizer = BadLosses(evaluation), Rprop([torch.nn.Parameter(torch.zeros(1))])
    unread = []
    for step, loss in enumerate(losses):
        bad_losses.check(torch.tensor(loss).as_subclass(Elsewhere), step, optimizer.param_groups)
        unread.append(len(bad_losses._unread))
    bad_losses.read()
    return unread
