"""Warnings, each once a fit, where the gradient of a full batch is less than it seems."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def warn_of_batch_statistics(pl_module: pl.LightningModule) -> None:
    """Warn of BatchNorm in training mode, where a full batch is made of several micro-batches."""
    names = [name for name, m in pl_module.named_modules() if isinstance(m, _BATCH_NORMS) and m.training]
    if names:
        rank_zero_warn(
            f"{_listed(names)} normalizes by the statistics of a micro-batch, not of all samples: the gradient depends "
            "on how the data are cut. Use LayerNorm or GroupNorm, put the layer in eval mode, or take the whole set at "
            "once on one device (micro_batch_size=None)"
        )


def warn_of_dropout(pl_module: pl.LightningModule) -> bool:
    """Warn of dropout in training mode; tell whether there was some."""
    names = [
        name
        for name, m in pl_module.named_modules()
        if m.training and ((isinstance(m, _DROPOUTS) and m.p > 0) or (isinstance(m, nn.RNNBase) and m.dropout > 0))
    ]
    if names:
        rank_zero_warn(
            f"{_listed(names)} drops at random: the gradient of the whole set is noisy from step to step then, which "
            "Rprop, looking at signs, cannot average out. Set p=0 and regularize by weight_decay"
        )
    return bool(names)


class RandomnessCheck:
    """Finds out whether the first training_step draws random numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._state()

    def finish(self) -> None:
        """Warn if it did."""
        if not all(map(torch.equal, self.before, self._state())):
            rank_zero_warn(
                "training_step draws random numbers (noise, random points, dropout): the gradient is then noisy from "
                "step to step, and Rprop, which looks at signs, cannot average that out. Draw them once, before "
                "training, and make them part of the data"
            )

    def _state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
