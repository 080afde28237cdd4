"""Small real data sets from scikit-learn's wheel (nothing is downloaded), whole, as one batch."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def two_spirals(n: int = 1000, turns: float = 1.5, noise: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Generate two interlocked spirals in the plane: ``n`` points ``(n, 2)`` and their classes ``(n,)``."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    angle = 2 * np.pi * turns * np.sqrt(rng.uniform(0.02, 1, n))
    points = np.stack([np.cos(angle + np.pi * label), np.sin(angle + np.pi * label)], axis=1) * angle[:, None]
    return points + rng.normal(scale=noise, size=points.shape), label


CLASSIFICATION = {
    "digits": lambda seed: load_digits(return_X_y=True),
    "breast_cancer": lambda seed: load_breast_cancer(return_X_y=True),
    "spirals": lambda seed: two_spirals(seed=seed),
}
REGRESSION = {"diabetes": lambda seed: load_diabetes(return_X_y=True)}


class WholeSet:
    """An iterable that gives the whole split as one batch, again and again: one full-batch step each.

    Not a ``DataLoader``: there is nothing to collate at every step, and Lightning puts no sampler into it, so that
    under DDP each rank computes the gradient of all samples.
    """

    def __init__(self, batch: tuple[Tensor, Tensor], times: int = 1) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the one batch as often as an epoch has steps."""
        for _ in range(self.times):
            yield self.batch


class TabularData(pl.LightningDataModule):
    """A data set, split in train, val and test.

    The split is seeded, and stratified by class; inputs (and a regression's target) are standardised with the mean and
    deviation of the training part alone.

    Args:
        dataset: ``"digits"``, ``"breast_cancer"``, ``"spirals"`` (classification) or ``"diabetes"`` (regression).
        val_size: Share of the set held out to choose the checkpoint.
        test_size: Share of the set held out for the final figure.
        seed: Seed of the split.
        steps_per_epoch: Full-batch steps between two validations.
    """

    def __init__(self, dataset: str, val_size: float, test_size: float, seed: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.name = dataset
        self.task = "classification" if dataset in CLASSIFICATION else "regression"
        inputs, targets = (CLASSIFICATION | REGRESSION)[dataset](seed)
        classes = targets if self.task == "classification" else None

        rows = np.arange(len(inputs))
        rest, test = train_test_split(rows, test_size=test_size, random_state=seed, stratify=classes)
        train, val = train_test_split(
            rest,
            test_size=val_size / (1 - test_size),
            random_state=seed,
            stratify=None if classes is None else classes[rest],
        )

        x = torch.tensor(StandardScaler().fit(inputs[train]).transform(inputs), dtype=torch.float32)
        if self.task == "classification":
            y = torch.tensor(targets, dtype=torch.long)
            self.out_features = int(targets.max()) + 1
        else:
            column = targets[:, None]
            y = torch.tensor(StandardScaler().fit(column[train]).transform(column), dtype=torch.float32)
            self.out_features = 1
        self.in_features = x.shape[1]
        self.splits = {name: (x[part], y[part]) for name, part in (("train", train), ("val", val), ("test", test))}
        self.steps_per_epoch = steps_per_epoch

    def train_dataloader(self) -> WholeSet:
        """Give the training part, once for each step of an epoch."""
        return WholeSet(self.splits["train"], self.steps_per_epoch)

    def val_dataloader(self) -> WholeSet:
        """Give the part that chooses the checkpoint."""
        return WholeSet(self.splits["val"])

    def test_dataloader(self) -> WholeSet:
        """Give the part that nothing was chosen by."""
        return WholeSet(self.splits["test"])
