"""What the app tells while it trains, and the picture it leaves."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from tabular.data import TabularData

SCORE = {"classification": "accuracy", "regression": "R^2"}


class Report(Callback):
    """Print the split, a line every few epochs, and keep what ``picture`` draws.

    Args:
        data: The data module that is trained on.
        lines: About how many lines to print.
    """

    def __init__(self, data: TabularData, lines: int = 10) -> None:
        self.data = data
        self.lines = lines
        self.history: list[dict[str, float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell what is trained on."""
        if trainer.is_global_zero:
            sizes = ", ".join(f"{name} {len(y)}" for name, (_, y) in self.data.splits.items())
            steps = self.data.steps_per_epoch
            print(
                f"{self.data.name}: {sizes} samples; {trainer.max_epochs} epochs of {steps} full-batch steps",
                flush=True,
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the epoch's figures, and print some."""
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        now["step"] = trainer.global_step
        self.history.append(now)
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        if trainer.is_global_zero and (epoch % max(1, last // self.lines) == 0 or epoch == last):
            line = f"epoch {epoch:4d}/{last}"
            for name in ("train", "val"):
                if f"{name}/loss" in now:  # a validation need not be in every epoch
                    line += (
                        f"  {name} loss {now[f'{name}/loss']:.4f} {SCORE[self.data.task]} {now[f'{name}/score']:.4f}"
                    )
            print(line, flush=True)

    def picture(self, path: Path) -> bool:
        """Draw the losses, and the step sizes of every parameter over the steps, if they were monitored.

        Returns:
            Whether there was something to draw.
        """
        last = self.history[-1] if self.history else {}
        names = [key.split("/")[1] for key in last if key.startswith("step_size/") and key.count("/") == 2]
        names = list(dict.fromkeys(names))
        if not names:
            return False
        steps = [row["step"] for row in self.history]
        fig = Figure(figsize=(8, 7), layout="constrained")
        above, below = fig.subplots(2, sharex=True, height_ratios=[1, 2])
        for stage in ("train", "val"):
            above.plot(steps, [row.get(f"{stage}/loss", float("nan")) for row in self.history], label=stage)
        above.set(ylabel="loss", yscale="log", title=f"{self.data.name}: full-batch Rprop")
        above.legend()
        for i, name in enumerate(names):
            low, mean, high = ([row[f"step_size/{name}/{s}"] for row in self.history] for s in ("min", "mean", "max"))
            below.plot(steps, mean, color=f"C{i}", label=name)
            below.fill_between(steps, low, high, color=f"C{i}", alpha=0.12, linewidth=0)
        below.set(xlabel="optimizer step", ylabel="step size (line: mean; band: min to max)", yscale="log")
        below.legend(ncols=2, fontsize="small")
        fig.savefig(path, dpi=120)
        return True
