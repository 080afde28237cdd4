"""Warnings, each once a fit, where the gradient of a full batch is less than it seems."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_rprop._torch import has_gradient_hooks, is_spectral_norm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def warn_of_micro_batches(pl_module: pl.LightningModule) -> None:
    """Warn of what sees the micro-batches one by one, where a full batch is made of several."""
    training = [(name, module) for name, module in pl_module.named_modules() if module.training]
    if names := [name for name, module in training if isinstance(module, _BATCH_NORMS)]:
        rank_zero_warn(
            f"{_listed(names)} normalizes by the statistics of a micro-batch, not of all samples: the gradient depends "
            "on how the data are cut. Use LayerNorm or GroupNorm, put the layer in eval mode, or take the whole set at "
            "once on one device (micro_batch_size=None)"
        )
    if names := [name for name, module in training if is_spectral_norm(module)]:
        rank_zero_warn(
            f"{_listed(names)} improves its estimate of the spectral norm at each micro-batch, so that each has other "
            "weights: the gradient depends on how the data are cut. Put the layer in eval mode, or take the whole set "
            "at once on one device (micro_batch_size=None)"
        )
    if names := [name for name, param in pl_module.named_parameters() if has_gradient_hooks(param)]:
        rank_zero_warn(
            f"{_listed(names)} has a hook on its gradient, which gets the part of each micro-batch, scaled: a mask is "
            "right, but what is not linear (clamping, signs, noise) is not. Do that in on_after_backward, which gets "
            "the gradient of all samples"
        )


def warn_of_dropout(pl_module: pl.LightningModule) -> bool:
    """Warn of dropout in training mode, and return whether there was some."""
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
