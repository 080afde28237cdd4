"""A small LightningModule, its data, a quiet Trainer and a recording logger."""

from __future__ import annotations

from inspect import signature

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

# Trainer.fit has this argument from Lightning 2.6 on.
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in signature(pl.Trainer.fit).parameters else {}


class Net(pl.LightningModule):
    """A regression with two layers, whose optimizers ``make`` builds from the module."""

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
    """Adds a validation step; separate, because Lightning warns if such a module gets no validation data."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean(), batch_size=len(batch))


class Batches:
    """An iterable of ``n`` equal batches; not a DataLoader, so Lightning does not warn about workers."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(10, 3, generator=generator)
        return iter([batch] * self.n)


class Recorder(Logger):
    """A logger that records its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name, version = "recorder", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def records(self):
        """Return step and metrics of the calls made by StepSizeMonitor."""
        return [(step, metrics) for step, metrics in self.calls if any(k.startswith("step_size/") for k in metrics)]


def trainer(tmp_path, callbacks=(), package=pl, **kwargs):
    """Return a Trainer on the CPU that prints and saves nothing by default."""
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
    """Return whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def fit_in_two_parts(tmp_path, whole, first, second, batches):
    """Return the parameters of three fits: a whole one, its first half, and one resumed from that half's checkpoint.

    The arguments ``whole``, ``first`` and ``second`` build the optimizers of the three.
    """
    modules = Net(whole), Net(first), Net(second)
    trainer(tmp_path, max_epochs=8).fit(modules[0], Batches(batches))
    fit = trainer(tmp_path, max_epochs=4)
    fit.fit(modules[1], Batches(batches))
    fit.save_checkpoint(tmp_path / "half.ckpt")
    fit = trainer(tmp_path, max_epochs=8)
    fit.fit(modules[2], Batches(batches), ckpt_path=tmp_path / "half.ckpt", **WEIGHTS_ONLY)
    return [list(module.parameters()) for module in modules]
