"""Warnings, once per fit, about a full-batch gradient that is not exact or not deterministic."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_rprop._torch import has_gradient_hooks, is_spectral_norm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def warn_of_micro_batches(pl_module: pl.LightningModule) -> None:
    """Warn about layers and hooks whose result depends on how the data are cut into micro-batches."""
    training = [(name, module) for name, module in pl_module.named_modules() if module.training]
    if names := [name for name, module in training if isinstance(module, _BATCH_NORMS)]:
        rank_zero_warn(
            f"{_listed(names)} normalizes by the statistics of a micro-batch, so the gradient depends on how the data "
            "are cut. Use LayerNorm or GroupNorm, put the layer in eval mode, or use the whole set as one batch on one "
            "device (micro_batch_size=None)"
        )
    if names := [name for name, module in training if is_spectral_norm(module)]:
        rank_zero_warn(
            f"{_listed(names)} updates its estimate of the spectral norm at each micro-batch, so the gradient depends "
            "on how the data are cut. Put the layer in eval mode, or use the whole set as one batch on one device "
            "(micro_batch_size=None)"
        )
    if names := [name for name, param in pl_module.named_parameters() if has_gradient_hooks(param)]:
        rank_zero_warn(
            f"{_listed(names)} has a hook on its gradient, which gets the scaled gradient of each micro-batch; only "
            "linear hooks such as masks are then right, not clamping, signs or noise. Do that in on_after_backward, "
            "which gets the gradient of all samples"
        )


def warn_of_dropout(pl_module: pl.LightningModule) -> bool:
    """Warn about dropout in training mode, and return whether there is any."""
    names = [
        name
        for name, m in pl_module.named_modules()
        if m.training and ((isinstance(m, _DROPOUTS) and m.p > 0) or (isinstance(m, nn.RNNBase) and m.dropout > 0))
    ]
    if names:
        rank_zero_warn(
            f"{_listed(names)} drops at random, so the gradient is noisy from step to step, and Rprop cannot average "
            "this out because it uses only signs. Set p=0 and regularize with weight_decay"
        )
    return bool(names)


class RandomnessCheck:
    """Checks whether a training_step draws random numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._state()

    def finish(self) -> None:
        """Warn if it did."""
        if not all(map(torch.equal, self.before, self._state())):
            rank_zero_warn(
                "training_step draws random numbers (noise, random points, dropout), so the gradient is noisy from "
                "step to step, and Rprop cannot average this out because it uses only signs. Draw them once before "
                "training, and make them part of the data"
            )

    def _state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
