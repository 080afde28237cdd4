"""A small network for tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F  # noqa: N812 (the field's name for it)


class MLP(pl.LightningModule):
    """Fully connected layers with tanh between them, for classification or regression.

    Args:
        in_features: Columns of the input.
        out_features: Classes, or columns of the target.
        task: ``"classification"`` (cross-entropy; the score is the accuracy) or ``"regression"`` (mean squared error;
            the score is R^2).
        optimizer: Makes the optimizer from the parameters: what ``optimizer=rprop`` instantiates to.
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
        self.save_hyperparameters(ignore=["optimizer"])  # a partial would keep the checkpoint from loading
        self.task = task
        self.optimizer = optimizer
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], out_features))

    def configure_model(self) -> None:
        """Share the layers out where the strategy has a mesh of processes for that (``trainer=fsdp2``)."""
        mesh = self.device_mesh
        if mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(n, in_features)`` to logits or predictions ``(n, out_features)``."""
        return self.net(x)

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str, **log: bool) -> Tensor:
        """Compute the loss of a batch, and log it with the score."""
        x, y = batch
        out = self(x)
        if self.task == "classification":
            loss = F.cross_entropy(out, y)
            score = (out.argmax(dim=1) == y).float().mean()
        else:
            loss = F.mse_loss(out, y)
            # the training targets are standardised, and may come in parts, whose variances are others
            score = 1 - loss.detach() / (1 if stage == "train" else y.var(correction=0))
        self.log_dict({f"{stage}/loss": loss, f"{stage}/score": score}, batch_size=len(x), **log)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a micro-batch of the training part; the step is made with all of it."""
        return self.evaluate(batch, "train", sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and score of the held-out part."""
        self.evaluate(batch, "val", sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and score of the test part."""
        self.evaluate(batch, "test", sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer that the config names."""
        return self.optimizer(self.parameters())
