"""The example app's output during training."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from tabular.data import TabularData

SCORE = {"classification": "accuracy", "regression": "R^2"}


class Report(Callback):
    """Print the sizes of the splits, then a line every few epochs.

    Args:
        data: The data module.
        lines: Approximate number of lines to print.
    """

    def __init__(self, data: TabularData, lines: int = 10) -> None:
        self.data = data
        self.lines = lines

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the data set and the length of the run."""
        if trainer.is_global_zero:
            sizes = ", ".join(f"{name} {len(y)}" for name, (_, y) in self.data.splits.items())
            steps = self.data.steps_per_epoch
            print(
                f"{self.data.name}: {sizes} samples; {trainer.max_epochs} epochs of {steps} full-batch steps",
                flush=True,
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print losses and scores every few epochs."""
        now = trainer.callback_metrics
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        if trainer.is_global_zero and (epoch % max(1, last // self.lines) == 0 or epoch == last):
            line = f"epoch {epoch:4d}/{last}"
            for name in ("train", "val"):
                if f"{name}/loss" in now:  # not every epoch ends with a validation
                    line += (
                        f"  {name} loss {now[f'{name}/loss']:.4f} {SCORE[self.data.task]} {now[f'{name}/score']:.4f}"
                    )
            print(line, flush=True)
