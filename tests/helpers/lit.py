"""A small LightningModule and its data, for tests that need a Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger


class Net(pl.LightningModule):
    """Regression with two layers; ``make`` makes the optimizers from the parameters."""

    def __init__(self, make, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.make = make
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("loss", loss, batch_size=len(batch))
        if self.automatic_optimization:
            return loss
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None

    def configure_optimizers(self):
        return self.make(self)


class ValidatedNet(Net):
    """The same with a validation, which Lightning warns of where it gets no data for it."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean(), batch_size=len(batch))


class Batches:
    """An iterable of ``n`` equal batches, not a DataLoader, so that Lightning has nothing to say about workers."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(10, 3, generator=generator)
        return iter([batch] * self.n)


class Recorder(Logger):
    """A logger that keeps the calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name, version = "recorder", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def records(self):
        """The calls of the monitor: step and metrics."""
        return [(step, metrics) for step, metrics in self.calls if any(k.startswith("step_size/") for k in metrics)]


def trainer(tmp_path, callbacks=(), package=pl, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return package.Trainer(callbacks=list(callbacks), **(defaults | kwargs))


def all_equal(a, b):
    """Whether two lists of tensors are the same, to the last bit."""
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def fit_in_two_parts(tmp_path, whole, first, second, batches):
    """The parameters of three modules, by how their optimizers are made.

    One is fitted to the end; one half-way; and one from the checkpoint of that on to the end.
    """
    modules = Net(whole), Net(first), Net(second)
    trainer(tmp_path, max_epochs=8).fit(modules[0], Batches(batches))
    fit = trainer(tmp_path, max_epochs=4)
    fit.fit(modules[1], Batches(batches))
    fit.save_checkpoint(tmp_path / "half.ckpt")
    fit = trainer(tmp_path, max_epochs=8)
    fit.fit(modules[2], Batches(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    return [list(module.parameters()) for module in modules]
