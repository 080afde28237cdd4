"""FullBatch(take_over=True) turns the Trainer's own DataLoader into a full batch."""

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from fitting import DATA, Stream
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lit import all_equal, trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from whole_set import Regression, exact, relative_error

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

DATASET = TensorDataset(*DATA)


def fit(folder, loader, module=None, **options):
    """Train for three epochs; return module and Trainer."""
    module = module or Regression()
    fitter = trainer(folder, [FullBatch(take_over=True)], **options)
    fitter.fit(module, loader)
    assert "dataloader" not in vars(fitter.fit_loop._data_source)
    return module, fitter


IN_ORDER = {
    "plain": lambda: DataLoader(DATASET, batch_size=20),
    "batch sampler": lambda: DataLoader(DATASET, batch_sampler=BatchSampler(SequentialSampler(DATASET), 20, False)),
    "FullBatchLoader": lambda: FullBatchLoader(DATASET, 20),
    "drops none": lambda: DataLoader(DATASET, batch_size=103, drop_last=True),
}


SHUFFLED = {
    "shuffle": lambda: DataLoader(DATASET, batch_size=20, shuffle=True),
    "generator": lambda: DataLoader(DATASET, batch_size=20, shuffle=True, generator=torch.Generator()),
    "batch sampler": lambda: DataLoader(DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET), 20, False)),
    "ready batches": lambda: DataLoader(
        DATASET, batch_size=None, sampler=BatchSampler(RandomSampler(DATASET), 20, False)
    ),
    "distributed": lambda: DataLoader(DATASET, batch_size=20, sampler=DistributedSampler(DATASET, 2, 0)),
}


@pytest.mark.parametrize("kind", IN_ORDER)
def test_loader_in_order_is_taken_over(kind, tmp_path):
    module, fitter = fit(tmp_path, IN_ORDER[kind]())
    assert fitter.global_step == 3  # one per epoch
    assert fitter.num_training_batches == 1
    _, gradient = exact(Regression().net, DATA)
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32 rounding
    assert torch.equal(torch.cat(module.targets), DATA[1].flatten().repeat(3))


@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_is_turned_off_with_a_warning(kind, tmp_path):
    loader = SHUFFLED[kind]()
    sampler = loader.sampler, loader.batch_sampler
    with pytest.warns(UserWarning, match=r"take_over=True\) reads the training DataLoader in order") as caught:
        module, _ = fit(tmp_path, loader)
    assert len([w for w in caught if "in order" in str(w.message)]) == 1
    assert torch.equal(torch.cat(module.targets), DATA[1].flatten().repeat(3))
    assert (loader.sampler, loader.batch_sampler) == sampler  # the user's loader is unchanged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(DATASET, batch_size=20, drop_last=True), "drop_last=True drops the samples"),
        (lambda: DataLoader(DATASET, sampler=WeightedRandomSampler(torch.ones(103), 103)), "weigh the samples"),
        (lambda: DataLoader(DATASET, sampler=SubsetRandomSampler(range(50))), "a torch.utils.data.Subset"),
        (lambda: DataLoader(DATASET, sampler=RandomSampler(DATASET, replacement=True)), "shuffles"),
        (lambda: DataLoader(DATASET, sampler=RandomSampler(DATASET, num_samples=50)), "shuffles"),
    ],
)
def test_inexact_sampling_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make())


@pytest.mark.parametrize("loaders", [[IN_ORDER["plain"]()] * 2, {"a": IN_ORDER["plain"]()}, range(3)])
def test_anything_but_one_loader_is_refused(loaders, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"takes over one DataLoader, got .*: give the Trainer one"):
        fit(tmp_path, loaders)


def test_stream_is_taken_over(tmp_path):
    module, _ = fit(tmp_path, DataLoader(Stream(*DATA), batch_size=20))
    assert torch.equal(torch.cat(module.targets), DATA[1].flatten().repeat(3))


def test_module_and_datamodule_are_taken_over(tmp_path):
    class Data(pl.LightningDataModule):
        loaders = 0

        def train_dataloader(self):
            self.loaders += 1
            return DataLoader(DATASET, batch_size=20)

    class WithData(Regression):
        def train_dataloader(self):
            return DataLoader(DATASET, batch_size=20)

    data = Data()
    ours, _ = fit(tmp_path, data, reload_dataloaders_every_n_epochs=1)
    assert data.loaders == 3
    theirs, _ = fit(tmp_path, None, WithData())
    expected, _ = fit(tmp_path, FullBatchLoader(DATASET, 21))
    assert torch.equal(torch.cat(ours.targets), torch.cat(theirs.targets))
    assert all_equal(ours.parameters(), theirs.parameters())
    assert torch.equal(torch.cat(ours.targets), torch.cat(expected.targets))


def test_validation_loader_is_not_taken_over(tmp_path):
    class Validated(Regression):
        sizes = ()

        def validation_step(self, batch, batch_idx):
            self.sizes += (len(batch[0]),)

    module = Validated()
    fitter = trainer(tmp_path, [FullBatch(take_over=True)], max_epochs=1)
    fitter.fit(module, IN_ORDER["plain"](), DataLoader(DATASET, batch_size=50))
    assert module.sizes == (50, 50, 3)
    fitter.validate(module, DataLoader(DATASET, batch_size=50), verbose=False)


def test_next_fit_without_callback_uses_batches(tmp_path):
    module, fitter = fit(tmp_path, IN_ORDER["plain"]())
    fitter.callbacks = []
    fitter.fit_loop.max_epochs = 4
    fitter.fit(module, IN_ORDER["plain"]())
    assert fitter.global_step == 3 + 6


def test_error_without_take_over_names_it(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"got DataLoader: wrap.*use FullBatch\(take_over=True\)"):
        trainer(tmp_path, [FullBatch()]).fit(Regression(), IN_ORDER["plain"]())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pytorch_lightning_trainer_works(tmp_path):
    class Plain(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Regression()

        def training_step(self, batch, batch_idx):
            return (self.inner.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            return Rprop(self.inner.net.parameters(), variant="irprop+")

    ends = []
    for loader in (IN_ORDER["plain"](), FullBatchLoader(DATASET, 20)):
        module = Plain()
        trainer(tmp_path, [FullBatch(take_over=True)], pytorch_lightning, max_epochs=4).fit(module, loader)
        ends.append(list(module.inner.net.parameters()))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q)  # other micro-batches, other rounding


@pytest.mark.parametrize("limits", [{"limit_train_batches": 2}, {"overfit_batches": 2}, {"limit_train_batches": 0.5}])
def test_limited_batches_are_refused(limits, tmp_path):
    loader = IN_ORDER["plain"]()
    with pytest.raises(MisconfigurationException, match="overfit_batches or limit_train_batches ask for some of them"):
        trainer(tmp_path, [FullBatch(take_over=True)], max_epochs=1, **limits).fit(Regression(), loader)
    fitter = trainer(tmp_path, [FullBatch(take_over=True)], fast_dev_run=True)
    fitter.fit(Regression(), loader)
    assert fitter.global_step == 1
