"""Small data sets that scikit-learn ships (nothing is downloaded), and a generated one; each is one full batch."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from lightning_rprop import FullBatchLoader


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


class TabularData(pl.LightningDataModule):
    """A data set split into train, val and test.

    The split is seeded and stratified by class. Inputs and regression targets are standardized with the mean and
    standard deviation of the training split.

    Args:
        dataset: ``"digits"``, ``"breast_cancer"``, ``"spirals"`` (classification) or ``"diabetes"`` (regression).
        val_size: Fraction of the samples held out to choose the checkpoint.
        test_size: Fraction of the samples held out for the final score.
        seed: Seed of the split.
        steps_per_epoch: Full-batch steps per epoch.
        micro_batch_size: Samples per forward pass; ``None`` takes all.
    """

    def __init__(
        self,
        dataset: str,
        val_size: float,
        test_size: float,
        seed: int,
        steps_per_epoch: int,
        micro_batch_size: int | None = None,
    ) -> None:
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
        self.micro_batch_size = micro_batch_size

    def train_dataloader(self) -> FullBatchLoader:
        """Return the loader of the training split, which yields all of it at each step."""
        return FullBatchLoader(self.splits["train"], self.micro_batch_size, self.steps_per_epoch)

    def val_dataloader(self) -> FullBatchLoader:
        """Return the loader of the validation split, all of it on every rank."""
        return FullBatchLoader(self.splits["val"])

    def test_dataloader(self) -> FullBatchLoader:
        """Return the loader of the test split, all of it on every rank."""
        return FullBatchLoader(self.splits["test"])
