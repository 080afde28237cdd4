"""A small network for tabular data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F  # noqa: N812 (the usual name)


class MLP(pl.LightningModule):
    """Fully connected layers with tanh in between, for classification or regression.

    Args:
        in_features: Number of input columns.
        out_features: Number of classes, or of target columns.
        task: ``"classification"`` (cross-entropy; the score is the accuracy) or ``"regression"`` (mean squared error;
            the score is R^2).
        optimizer: Function that makes the optimizer from the parameters, such as ``instantiate(cfg.optimizer)``.
        hidden: Width of each hidden layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        task: str,
        optimizer: Callable[..., torch.optim.Optimizer],
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])  # torch.load(weights_only=True) refuses a partial
        self.task = task
        self.optimizer = optimizer
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], out_features))

    def configure_model(self) -> None:
        """Shard the layers if the strategy has a device mesh (``trainer=fsdp2``)."""
        mesh = self.device_mesh
        if mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(n, in_features)`` to logits or predictions ``(n, out_features)``."""
        return self.net(x)

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str, **log: bool) -> Tensor:
        """Compute the loss of a batch, and log it and the score."""
        x, y = batch
        out = self(x)
        if self.task == "classification":
            loss = F.cross_entropy(out, y)
            score = (out.argmax(dim=1) == y).float().mean()
        else:
            loss = F.mse_loss(out, y)
            # standardized training targets have variance 1; that of a micro-batch would differ
            score = 1 - loss.detach() / (1 if stage == "train" else y.var(correction=0))
        self.log_dict({f"{stage}/loss": loss, f"{stage}/score": score}, batch_size=len(x), **log)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a micro-batch; FullBatch steps once all of them are done."""
        return self.evaluate(batch, "train", sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and score of the validation split."""
        self.evaluate(batch, "val", sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and score of the test split."""
        self.evaluate(batch, "test", sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the configured optimizer."""
        return self.optimizer(self.parameters())
