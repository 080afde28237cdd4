"""Errors in tuners, evaluation loops and manual optimization name a remedy that works."""

import re

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lit import all_equal, trainer
from torch.utils.data import DataLoader, TensorDataset
from whole_set import make_data, network

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

X, Y = make_data(20)
REMEDY = "for validate, test, predict, tuners and finders use micro_batch_size=None or a DataLoader"


class Tuned(pl.LightningModule):
    def __init__(self, size):
        super().__init__()
        self.lr, self.batch_size = 1e-2, size
        self.net = network()

    def train_dataloader(self):
        return FullBatchLoader((X, Y), self.batch_size, steps_per_epoch=50)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    test_step = predict_step = training_step

    def configure_optimizers(self):
        return Rprop(self.parameters(), lr=self.lr)


class Validated(Tuned):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


class TunedPlainly(Tuned):
    def train_dataloader(self):
        return DataLoader(TensorDataset(X.repeat(5, 1), Y.repeat(5, 1)), batch_size=self.batch_size)


LR_FINDERS = [
    lambda fitter, module: Tuner(fitter).lr_find(module, num_training=20),
    lambda fitter, module: add(fitter, LearningRateFinder(num_training_steps=20)).fit(module),
]


BATCH_SIZE_FINDERS = [
    lambda fitter, module: Tuner(fitter).scale_batch_size(module, max_trials=2, steps_per_trial=1),
    lambda fitter, module: add(fitter, BatchSizeFinder(max_trials=2, steps_per_trial=1)).fit(module),
]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The loaded state replaced options")  # lr_find restores the first lr
@pytest.mark.parametrize("tune", [*LR_FINDERS, *BATCH_SIZE_FINDERS])
def test_remedy_for_tuners_works(tune, tmp_path):
    with pytest.raises(RuntimeError, match=re.escape(REMEDY)):
        tune(trainer(tmp_path, [FullBatch()], max_epochs=1), Tuned(8))
    if tune in LR_FINDERS:
        tune(trainer(tmp_path, [FullBatch()], max_epochs=1), Tuned(None))
    tune(trainer(tmp_path, [], max_epochs=1), TunedPlainly(8))


def add(fitter, callback):
    fitter.callbacks.append(callback)
    return fitter


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_remedy_for_evaluation_loops_works(loop, tmp_path):
    def run(size):
        return getattr(trainer(tmp_path, [FullBatch()]), loop)(Validated(None), FullBatchLoader((X, Y), size))

    with pytest.raises(RuntimeError, match=re.escape(REMEDY)):
        run(7)
    run(None)


def test_remedy_for_validation_in_fit_works(tmp_path):
    def run(size):
        trainer(tmp_path, [FullBatch()], max_epochs=1).fit(Validated(7), None, FullBatchLoader((X, Y), size))

    with pytest.raises(RuntimeError, match=re.escape(REMEDY)):
        run(7)
    run(None)


class Alternating(pl.LightningModule):
    """Manual optimization with two optimizers, as the error message describes."""

    automatic_optimization = False

    def __init__(self, loader=None):
        super().__init__()
        self.net = network()
        self.loader = loader

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            for micro_batch in self.loader.micro_batches():
                x, y = micro_batch.data
                self.manual_backward((self.net(x) - y).square().sum() / self.loader.num_samples)
            optimizer.step()

    def configure_optimizers(self):
        return Rprop(self.net[0].parameters()), Rprop(self.net[2].parameters())


def test_remedy_for_manual_optimization_works(tmp_path):
    message = r"train_dataloaders=range\(steps\), and iterate over loader.mi"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, [FullBatch()]).fit(Alternating(), FullBatchLoader((X, Y), 7))
    ends = []
    for size in (None, 7):
        module = Alternating(FullBatchLoader((X, Y), size))
        trainer(tmp_path, max_epochs=2).fit(module, range(10))
        ends.append(list(module.parameters()))
    assert all_equal(*ends)  # rounding changes no sign
