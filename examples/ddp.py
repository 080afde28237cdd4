"""Full-batch training under DDP on several CPU processes, which ends with the weights of a single process.

FullBatch gives each rank the exact gradient of all 1,003 samples, up to rounding, and Rprop uses only its signs. So the
weights equal those of a single process bit for bit as long as rounding changes no sign, which is likely in float64. At
the end rank 0 trains the same network in a plain loop, and compares (10 s on two CPU cores).

    python examples/ddp.py
    python examples/ddp.py --devices 1
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_rprop import BestWeights, FullBatch, FullBatchLoader, KeepBest, Rprop, StepSizeMonitor


class Fit(pl.LightningModule):
    """A network for the function, and its loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()

    def training_step(self, batch, batch_idx):
        """Return the mean squared error of a micro-batch."""
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        """Return Rprop with its default arguments."""
        return Rprop(self.parameters())


def train_in_plain_loop(data, steps):
    """Return a network trained like the others, by one process without Lightning."""
    fit = Fit()
    optimizer, best = fit.configure_optimizers(), BestWeights(fit)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = fit.training_step(data, 0)
        loss.backward()
        best.update(loss)
        optimizer.step(loss=loss)
    best.restore()
    return fit


def main():
    """Train on all devices, then compare and plot on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of 100 steps (default: 10)")
    parser.add_argument("--output", default="ddp.png", help="file of the plot (default: ddp.png)")
    arguments = parser.parse_args()
    if arguments.devices < 1 or arguments.epochs < 1:
        parser.error(f"--devices and --epochs must be >= 1, got {arguments.devices} and {arguments.epochs}")

    torch.set_num_threads(1)  # faster for small tensors, and the processes share the cores
    x = 2 * torch.rand(1003, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    data = x, (3 * x[:, :1]).sin() * x[:, 1:]
    keep_best = KeepBest()
    monitor = StepSizeMonitor(every_n_steps=5, silence=["no_logger"])
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp",
        max_epochs=arguments.epochs,
        callbacks=[FullBatch(log_as="loss", prog_bar=True), keep_best, monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    fit = Fit()
    trainer.fit(fit, FullBatchLoader(data, steps_per_epoch=100))
    torch.distributed.destroy_process_group()  # otherwise torch may abort on exit (torch issue 190489)
    if trainer.is_global_zero:
        expected = train_in_plain_loop(data, trainer.global_step)
        pairs = zip(fit.parameters(), expected.parameters(), strict=True)
        difference = max((p - q).abs().max().item() for p, q in pairs)
        print(f"{arguments.devices} ranks: best loss {keep_best.best_loss:.3e} at step {keep_best.best_step}")
        print(f"largest difference from the weights of one process: {difference:.1e}")
        fig, _ = monitor.plot(f"DDP on {arguments.devices} CPU processes")
        fig.savefig(arguments.output, dpi=100)
        print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
