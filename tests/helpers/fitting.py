"""Fit a regression with FullBatch; with what several test files of ``tests/full_batch`` share."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lit import trainer
from torch.utils.data import DataLoader, IterableDataset
from whole_set import make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

DATA = make_data(103)  # a prime: no micro-batch size in the tests divides it


def fit(
    folder, module, size=8, data=DATA, steps=3, callbacks=(), per_epoch=4, full_batch=None, ckpt_path=None, **options
):
    """Train up to an optimizer step with FullBatch and return the Trainer, which gets the options."""
    options = {"max_steps": steps, "max_epochs": -1, **options}
    fitter = trainer(folder, [*callbacks, full_batch or FullBatch()], **options)
    fitter.fit(module, FullBatchLoader(data, size, steps_per_epoch=per_epoch), ckpt_path=ckpt_path)
    return fitter


def loop(module, steps, data=DATA):
    """Train the module in a plain loop without Lightning and return the loss of each step."""
    optimizer = module.configure_optimizers()
    x, y = data

    def closure():
        optimizer.zero_grad()
        loss = (module.net(x) - y).square().mean()
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


def stay(params):
    """Return an optimizer that moves nothing."""
    return Rprop(params, lr=0.0, step_sizes=(0, 1))


class Losses(pl.Callback):
    """Records the loss of each step as other callbacks see it."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Reiterable:
    """An iterable of ready batches that starts over at each pass; its length is unknown."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Stream(IterableDataset):
    """A stream of samples."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __iter__(self):
        return zip(*self.tensors, strict=True)


class Doubling(DataLoader):
    """A DataLoader that changes the batches in ``__iter__``, as prefetchers do."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


def shares(data, world, size=None):
    """Return each rank's pass over the data as a list of (values, number of counted samples)."""
    found = []
    for rank in range(world):
        loader = FullBatchLoader(data, size)
        loader.share(rank, world, torch.device("cpu"))
        micro_batches = list(loader.micro_batches())
        assert [m.is_last for m in micro_batches] == [False] * (len(micro_batches) - 1) + [True]
        values = [m.data if isinstance(m.data, torch.Tensor) else m.data[0] for m in micro_batches]
        found.append([(v.tolist(), m.size) for v, m in zip(values, micro_batches, strict=True)])
    return found
