"""FullBatchLoader by itself: how data are held, cut and shared, and what is refused."""

import pickle
from itertools import cycle

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_rprop import FullBatchLoader

X = torch.arange(10.0)
TEN = TensorDataset(X)


def shares(data, world, size=None):
    """What each rank gets in a pass: lists of (values, counted samples)."""
    found = []
    for rank in range(world):
        loader = FullBatchLoader(data, size)
        loader.share(rank, world, torch.device("cpu"))
        micro_batches = list(loader.micro_batches())
        assert [m.is_last for m in micro_batches] == [False] * (len(micro_batches) - 1) + [True]
        values = [m.data if isinstance(m.data, torch.Tensor) else m.data[0] for m in micro_batches]
        found.append([(v.tolist(), m.size) for v, m in zip(values, micro_batches, strict=True)])
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 10, 103])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [None, 1, 2, 7, 1000])
def test_every_sample_counts_once_and_ranks_have_as_many_micro_batches(n, world, size):
    x = torch.arange(float(n))
    found = shares(x, world, size)
    counted = [v for rank in found for values, count in rank if count for v in values]
    assert counted == x.tolist()  # each once, in order
    assert len({len(rank) for rank in found}) == 1
    assert all(len(values) == max(count, 1) for rank in found for values, count in rank)
    sizes = [count for rank in found for _, count in rank]
    assert size is None or max(sizes) <= size
    assert all(max(c for _, c in rank) - min(c for _, c in rank) <= 1 for rank in found)
    assert max(sum(c for _, c in rank) for rank in found) == -(-n // world)  # shared evenly


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, batch_size=2),
        lambda data: DataLoader(data, batch_sampler=[[i] for i in range(len(data))]),
        lambda data: DataLoader(data, batch_size=None, sampler=[[i] for i in range(len(data))]),
    ],
)
def test_a_data_loader_is_shared_by_batches(n, world, make):
    found = shares(make(TensorDataset(torch.arange(float(n)))), world)
    counted = sorted(v for rank in found for values, count in rank if count for v in values)
    assert counted == list(range(n))
    assert len({len(rank) for rank in found}) == 1


def test_a_shared_data_loader_keeps_its_settings():
    loader = DataLoader(TEN, batch_size=2, num_workers=1, collate_fn=len, timeout=9, prefetch_factor=3)
    full = FullBatchLoader(loader)
    full.share(1, 2, torch.device("cpu"))
    own = full._part.batches
    for name in ("num_workers", "collate_fn", "timeout", "prefetch_factor", "persistent_workers", "pin_memory"):
        assert getattr(own, name) == getattr(loader, name)


def test_a_distributed_sampler_that_gives_each_sample_once_is_left_as_it_is():
    for rank in range(2):
        loader = DataLoader(TEN, batch_size=3, sampler=DistributedSampler(TEN, 2, rank, shuffle=False))
        full = FullBatchLoader(loader)
        full.share(rank, 2, torch.device("cpu"))
        assert torch.cat([m.data[0] for m in full.micro_batches()]).tolist() == list(range(rank, 10, 2))
        with pytest.raises(
            ValueError, match=f"gives rank {rank} of 2 its share, but this is rank 0 of 1. Use no sampler"
        ):
            full.share(0, 1)


def test_a_streams_ranks_keep_their_own():
    class Own(IterableDataset):
        def __iter__(self):
            return iter([1.0, 2.0, 3.0])

    assert shares(Own(), 2, 2) == [[([1.0, 2.0], 2), ([3.0], 1)]] * 2


def test_held_data_are_views_made_anew():
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


def test_a_rank_holds_its_share_only():
    x = torch.zeros(1000, 2)
    loader = FullBatchLoader(x)
    loader.share(1, 4, torch.device("meta"))  # a device to which things must be brought
    (micro_batch,) = loader.micro_batches()
    assert micro_batch.data.device.type == "meta"
    assert micro_batch.data.shape == (250, 2)
    assert loader._part.data.shape == (250, 2)
    loader = FullBatchLoader(x, device="cpu")
    loader.share(1, 4, torch.device("meta"))
    assert not loader._is_on(torch.device("meta"))
    assert loader._is_on(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_held_data_lie_on_the_gpu_or_are_pinned():
    gpu = torch.device("cuda", 0)
    for device in (None, "cpu"):
        loader = FullBatchLoader(X, device=device)
        loader.share(0, 1, gpu)
        (micro_batch,) = loader.micro_batches()
        assert (micro_batch.data.device == gpu) == (device is None)
        assert micro_batch.data.is_pinned() == (device == "cpu")


@pytest.mark.parametrize("base", [Dataset, object])
def test_map_style_datasets_are_read_once(base):
    class Counting(base):
        looks = 0

        def __len__(self):
            return 5

        def __getitem__(self, i):
            self.looks += 1
            return {"x": torch.tensor(float(i)), "y": i}

    dataset = Counting()
    loader = FullBatchLoader(dataset, 2)
    looks = dataset.looks
    assert looks <= 6
    batches = [m.data for _ in range(3) for m in loader.micro_batches()]
    assert dataset.looks == looks
    assert torch.cat([b["x"] for b in batches]).tolist() == [0, 1, 2, 3, 4] * 3
    assert torch.cat([b["y"] for b in batches]).tolist() == [0, 1, 2, 3, 4] * 3


def test_an_augmenting_dataset_is_warned_of():
    class Augmenting(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return torch.randn(2)

    with pytest.warns(UserWarning, match="Augmenting returns a different sample 0 each time.*do so once"):
        FullBatchLoader(Augmenting())


def test_iterated_without_the_callback_it_gives_the_whole_set():
    loader = FullBatchLoader((X, X), steps_per_epoch=np.int64(3))
    assert len(loader) == 3
    assert [torch.equal(x, X) for x, _ in loader] == [True] * 3
    with pytest.raises(RuntimeError, match=r"callbacks=\[lightning_rprop.FullBatch\(\)\]"):
        next(iter(FullBatchLoader(X, 4)))


def test_different_lengths_only_as_a_whole():
    data = {"inside": torch.zeros(100, 2), "edge": torch.zeros(7, 2)}
    (batch,) = FullBatchLoader(data)
    assert [len(t) for t in batch.values()] == [100, 7]
    with pytest.raises(ValueError, match=r"\(data\['inside'\] 100, data\['edge'\] 7\) cannot be cut.*one device"):
        FullBatchLoader(data, 10)
    with pytest.raises(ValueError, match="cannot be cut into micro-batches or shared among 2 ranks"):
        FullBatchLoader(data).share(0, 2)


def test_pickled_it_stays_what_it_is():
    loader = FullBatchLoader({"x": X.clone().add_(1)}, 4, 7)
    list(loader.micro_batches())
    loader = pickle.loads(pickle.dumps(loader))
    assert len(loader) == 7
    assert [m.size for m in loader.micro_batches()] == [3, 3, 4]


class Pairs(Sampler):
    """A sampler that torch does not know."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __len__(self):
        return len(self.passes[0])

    def __iter__(self):
        self.passes = [*self.passes[1:], self.passes[0]]
        return iter(self.passes[-1])


class Endless(Sampler):
    def __iter__(self):
        return cycle(range(10))


class Own(IterableDataset):
    def __iter__(self):
        return iter(X)


SHUFFLES, REPEATS, LEAVES_OUT, DROPS = (
    "shuffles from step to step",
    "repeats samples",
    "leaves samples out",
    "drops the",
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(TEN, shuffle=True), f"RandomSampler {SHUFFLES}.*Use shuffle=False"),
        (lambda: DataLoader(TEN, sampler=SubsetRandomSampler(range(10))), f"{SHUFFLES}.*Use a torch.utils.data.Subset"),
        (lambda: DataLoader(TEN, sampler=WeightedRandomSampler(torch.ones(10), 10)), SHUFFLES),
        (lambda: DataLoader(TEN, batch_sampler=BatchSampler(RandomSampler(TEN), 2, False)), SHUFFLES),
        (lambda: DataLoader(TEN, batch_size=None, shuffle=True), SHUFFLES),
        (lambda: DataLoader(TEN, sampler=DistributedSampler(TEN, 2, 0)), f"DistributedSampler {SHUFFLES}.*no sampler"),
        (lambda: DataLoader(TEN, sampler=DistributedSampler(TEN, 3, 0, shuffle=False)), f"{REPEATS} to give all ranks"),
        (lambda: DataLoader(TEN, sampler=DistributedSampler(TEN, 3, 0, shuffle=False, drop_last=True)), LEAVES_OUT),
        (lambda: DataLoader(TEN, sampler=Pairs(range(10), range(9, -1, -1))), f"Pairs {SHUFFLES}.*Use a fixed order"),
        (lambda: DataLoader(TEN, sampler=Pairs([*range(10), 3])), f"Pairs {REPEATS}"),
        (lambda: DataLoader(TEN, sampler=Pairs(range(9))), f"Pairs {LEAVES_OUT}.*Subset as the dataset"),
        (lambda: DataLoader(TEN, batch_sampler=Pairs([[0, 1], [1, 2]])), f"Pairs {REPEATS}"),
        (lambda: DataLoader(TEN, sampler=Endless()), f"Endless {REPEATS}"),
        (lambda: DataLoader(TEN, batch_size=3, drop_last=True), f"drop_last=True {DROPS}.*Use drop_last=False"),
        (lambda: DataLoader(Own(), batch_size=3, drop_last=True), f"drop_last=True {DROPS}"),
    ],
)
def test_samplers_that_do_not_give_each_sample_once_in_one_order(make, message):
    state = torch.get_rng_state()
    loader = make()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        FullBatchLoader(loader)
    assert torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(TEN, batch_size=5, drop_last=True),  # drops none
        lambda: DataLoader(TEN, sampler=Pairs(range(9, -1, -1)), batch_size=3),  # in an order of its own
        lambda: DataLoader(TEN, batch_sampler=BatchSampler(SequentialSampler(TEN), 4, False)),
        lambda: DataLoader(Own(), batch_size=3),
    ],
)
def test_samplers_that_do(make):
    seen = torch.cat(
        [
            torch.as_tensor(m.data[0] if isinstance(m.data, list) else m.data)
            for m in FullBatchLoader(make()).micro_batches()
        ]
    )
    assert sorted(seen.tolist()) == X.tolist()


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
            (DataLoader(TEN), 5),
            ValueError,
            "micro_batch_size=5 cannot be used with a DataLoader.*set the DataLoader's batch_size",
        ),
        (("digits.csv",), TypeError, "data must be a tensor.*got str"),
        ((3,), TypeError, "got int"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FullBatchLoader(*arguments)


def test_an_iterable_of_batches_takes_no_size():
    class Batches:
        def __iter__(self):
            return iter([X])

    assert [m.size for m in FullBatchLoader(Batches()).micro_batches()] == [10]
    with pytest.raises(ValueError, match="micro_batch_size=5 cannot be used with an iterable of ready batches"):
        FullBatchLoader(Batches(), 5)
