"""FullBatchLoader holds tensors and map-style datasets, and shares them among the ranks."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fitting import DATA, fit, shares
from lit import all_equal
from torch.utils.data import DataLoader, Dataset, TensorDataset
from whole_set import Regression

from lightning_rprop import FullBatchLoader

X = torch.arange(10.0)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 103])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [None, 1, 2, 7, 1000])
def test_every_sample_counts_once_over_all_ranks(n, world, size):
    x = torch.arange(float(n))
    found = shares(x, world, size)
    counted = [v for rank in found for values, count in rank if count for v in values]
    assert counted == x.tolist()
    assert len({len(rank) for rank in found}) == 1
    assert all(len(values) == max(count, 1) for rank in found for values, count in rank)
    sizes = [count for rank in found for _, count in rank]
    assert size is None or max(sizes) <= size
    assert all(max(c for _, c in rank) - min(c for _, c in rank) <= 1 for rank in found)
    assert max(sum(c for _, c in rank) for rank in found) == -(-n // world)  # even shares


def test_micro_batches_are_fresh_views():
    x = torch.zeros(10, 2)
    for size in (None, 3):
        loader = FullBatchLoader({"x": x}, size)
        loader.share(0, 1, torch.device("cpu"))
        for micro_batch in loader.micro_batches():
            assert micro_batch.data["x"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            micro_batch.data["x"].requires_grad_()
            del micro_batch.data["x"]
        assert not x.requires_grad
        assert len(next(loader.micro_batches()).data["x"]) > 0


def test_rank_holds_only_its_share():
    x = torch.zeros(1000, 2)
    loader = FullBatchLoader(x)
    loader.share(1, 4, torch.device("meta"))  # stands for any device to which held data are moved
    (micro_batch,) = loader.micro_batches()
    assert micro_batch.data.device.type == "meta"
    assert micro_batch.data.shape == (250, 2)
    assert loader._part.data.shape == (250, 2)
    loader = FullBatchLoader(x, device="cpu")
    loader.share(1, 4, torch.device("meta"))
    assert not loader._is_on(torch.device("meta"))
    assert loader._is_on(torch.device("cpu"))


@pytest.mark.gpu
def test_held_data_are_on_the_gpu_or_pinned():
    gpu = torch.device("cuda", 0)
    for device in (None, "cpu"):
        loader = FullBatchLoader(X, device=device)
        loader.share(0, 1, gpu)
        (micro_batch,) = loader.micro_batches()
        assert (micro_batch.data.device == gpu) == (device is None)
        assert micro_batch.data.is_pinned() == (device == "cpu")


@pytest.mark.parametrize("base", [Dataset, object])
def test_map_style_dataset_is_read_once(base):
    class Counting(base):
        reads = 0

        def __len__(self):
            return 5

        def __getitem__(self, i):
            self.reads += 1
            return {"x": torch.tensor(float(i)), "y": i}

    dataset = Counting()
    loader = FullBatchLoader(dataset, 2)
    reads = dataset.reads
    assert reads <= 6
    batches = [m.data for _ in range(3) for m in loader.micro_batches()]
    assert dataset.reads == reads
    assert torch.cat([b["x"] for b in batches]).tolist() == [0, 1, 2, 3, 4] * 3
    assert torch.cat([b["y"] for b in batches]).tolist() == [0, 1, 2, 3, 4] * 3


def test_augmenting_dataset_warns():
    class Augmenting(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return torch.randn(2)

    with pytest.warns(UserWarning, match="Augmenting returns a different sample 0 each time.*do so once"):
        FullBatchLoader(Augmenting())


def test_without_callback_a_batch_is_everything():
    loader = FullBatchLoader((X, X), steps_per_epoch=np.int64(3))
    assert len(loader) == 3
    assert [torch.equal(x, X) for x, _ in loader] == [True] * 3
    with pytest.raises(RuntimeError, match=r"callbacks=\[lightning_rprop.FullBatch\(\)\]"):
        next(iter(FullBatchLoader(X, 4)))


def test_different_lengths_cannot_be_cut():
    data = {"inside": torch.zeros(100, 2), "edge": torch.zeros(7, 2)}
    (batch,) = FullBatchLoader(data)
    assert [len(t) for t in batch.values()] == [100, 7]
    with pytest.raises(ValueError, match=r"\(data\['inside'\] 100, data\['edge'\] 7\) cannot be cut.*one device"):
        FullBatchLoader(data, 10)
    with pytest.raises(ValueError, match="cannot be cut into micro-batches or shared among 2 ranks"):
        FullBatchLoader(data).share(0, 2)


def test_pickling_keeps_data_and_settings():
    loader = FullBatchLoader({"x": X.clone().add_(1)}, 4, 7)
    list(loader.micro_batches())
    loader = pickle.loads(pickle.dumps(loader))
    assert len(loader) == 7
    assert [m.size for m in loader.micro_batches()] == [3, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, 0), ValueError, "micro_batch_size must be a number of samples >= 1, or None, got 0"),
        ((X, 2.0), ValueError, "micro_batch_size .* got 2.0"),
        ((X, True), ValueError, "micro_batch_size .* got True"),
        ((X, None, 0), ValueError, "steps_per_epoch must be a number of steps >= 1, got 0"),
        ((X, None, None), ValueError, "steps_per_epoch .* got None"),
        ((X, None, 1, "gpu"), RuntimeError, "device"),
        ((np.zeros(3),), TypeError, "data must be a tensor.*got ndarray. For arrays use torch.as_tensor"),
        (({"x": X, "y": np.zeros(10)},), TypeError, r"data\['y'\] must be a tensor, got ndarray: use torch.as_tensor"),
        ((([X, (X, 3)]),), TypeError, r"data\[1\]\[1\] must be a tensor, got int"),
        (((X, torch.tensor(3.0)),), ValueError, r"data\[1\] has no dimension of samples, its shape is \(\)"),
        ((X.clone().requires_grad_(),), ValueError, r"data requires a gradient.*use detach\(\)"),
        ((X[:0],), ValueError, "data has no samples"),
        (((),), ValueError, "data has no tensor in it"),
        ((TensorDataset(X[:0]),), ValueError, "data has no samples"),
        ((iter([X]),), ValueError, "list_iterator, which can be read once only"),
        (
            (DataLoader(TensorDataset(X)), 5),
            ValueError,
            "micro_batch_size=5 cannot be used with a DataLoader.*set the DataLoader's batch_size",
        ),
        (("digits.csv",), TypeError, "data must be a tensor.*got str"),
        ((3,), TypeError, "got int"),
    ],
)
def test_invalid_loader_argument_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        FullBatchLoader(*arguments)


class Scaled(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return 2 * x, y


class Several(TensorDataset):
    def __getitems__(self, indices):
        return [(2 * self.tensors[0][i], self.tensors[1][i]) for i in indices]


class Half(TensorDataset):
    def __len__(self):
        return super().__len__() // 2


@pytest.mark.parametrize("kind", [Scaled, Several, Half])
def test_dataset_subclass_keeps_its_behavior(kind, tmp_path):
    dataset = kind(*DATA)
    x, y = next(iter(DataLoader(dataset, batch_size=len(DATA[0]))))
    held, streamed, expected = Regression(), Regression(), Regression()
    fit(tmp_path, held, 7, dataset, steps=5)
    fit(tmp_path, streamed, None, DataLoader(dataset, batch_size=7), steps=5)
    fit(tmp_path, expected, 7, (x, y), steps=5)
    assert len(x) == len(dataset)
    assert all_equal(held.parameters(), expected.parameters())
    assert torch.equal(torch.cat(streamed.targets[: -(-len(dataset) // 7)]), y.flatten())


def test_dataset_without_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, i):
            return X[i % 20]

    with pytest.raises(TypeError, match=r"Endless has no __len__.*IterableDataset"):
        FullBatchLoader(Endless())


def test_fingerprint_ignores_order_of_keys():
    x, y = DATA
    for kind in (OrderedDict, dict):
        fingerprint = FullBatchLoader(kind(x=x, y=y))._fingerprint()
        assert fingerprint == FullBatchLoader(kind(y=y, x=x))._fingerprint()
        assert fingerprint != FullBatchLoader(kind(x=x, y=y + 1))._fingerprint()
