"""A small network for tabular data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_rprop import Stacked


class MLP(pl.LightningModule):
    """Fully connected layers with tanh in between, for classification or regression.

    Args:
        in_features: Number of input columns.
        out_features: Number of classes, or of target columns.
        task: ``"classification"`` (cross-entropy; the score is the accuracy) or ``"regression"`` (mean squared error;
            the score is R^2).
        optimizer: Function that makes the optimizer from the parameters, such as ``instantiate(cfg.optimizer)``.
        hidden: Width of each hidden layer.
        starts: Number of networks, which train side by side. The logged values are those of the network with the lowest
            validation loss.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        task: str,
        optimizer: Callable[..., torch.optim.Optimizer],
        hidden: Sequence[int],
        starts: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])  # torch.load(weights_only=True) refuses a partial
        self.task = task
        self.optimizer = optimizer
        widths = [in_features, *hidden]

        def make() -> nn.Module:
            layers: list[nn.Module] = []
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), nn.Tanh()]
            return nn.Sequential(*layers, nn.Linear(widths[-1], out_features))

        self.net = make() if starts == 1 else Stacked(make, starts)
        if starts > 1:
            self.register_buffer("best", torch.tensor(0))  # the network with the lowest validation loss

    def configure_model(self) -> None:
        """Shard the layers if the strategy has a device mesh (``trainer=fsdp2``)."""
        mesh = self.device_mesh
        if mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(n, in_features)`` to logits or predictions ``([starts,] n, out_features)``."""
        return self.net(x)

    def judge(self, out: Tensor, y: Tensor, stage: str) -> tuple[Tensor, Tensor]:
        """Return the loss and the score of a network's outputs."""
        if self.task == "classification":
            return F.cross_entropy(out, y), (out.argmax(dim=1) == y).float().mean()
        loss = F.mse_loss(out, y)
        # standardized training targets have variance 1; that of a micro-batch would differ
        return loss, 1 - loss.detach() / (1 if stage == "train" else y.var(correction=0))

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str, **log: bool) -> Tensor:
        """Compute the loss of a batch, or one for each network, and log it and the score."""
        x, y = batch
        judge = partial(self.judge, stage=stage)
        if not isinstance(self.net, Stacked):
            loss, score = judge(self(x), y)
            values = {"loss": loss, "score": score}
        else:
            loss, score = torch.vmap(judge, (0, None))(self(x), y)
            if stage == "val":
                self.best.copy_(loss.nan_to_num(torch.inf).argmin())
            values = {"loss": loss[self.best], "score": score[self.best], "start": self.best.float()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, batch_size=len(x), **log)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Compute the loss of a micro-batch; FullBatch steps once all of them are done."""
        loss = self.evaluate(batch, "train", sync_dist=True)
        return loss if loss.dim() == 0 else {"loss": loss.sum(), "member_losses": loss}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and score of the validation split."""
        self.evaluate(batch, "val", sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and score of the test split."""
        self.evaluate(batch, "test", sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the configured optimizer."""
        return self.optimizer(self.parameters())
