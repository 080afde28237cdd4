"""FullBatchLoader reads a DataLoader's batches in a fixed order, each sample once."""

from itertools import cycle

import pytest
import torch
from fitting import Doubling, Stream, fit, shares
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from whole_set import Regression, make_data

from lightning_rprop import FullBatchLoader

TEN = TensorDataset(torch.arange(10.0))
X, Y = make_data(20)


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
def test_ranks_share_the_batches(n, world, make):
    found = shares(make(TensorDataset(torch.arange(float(n)))), world)
    counted = sorted(v for rank in found for values, count in rank if count for v in values)
    assert counted == list(range(n))
    assert len({len(rank) for rank in found}) == 1


def test_sharing_keeps_loader_settings():
    loader = DataLoader(TEN, batch_size=2, num_workers=1, collate_fn=len, timeout=9, prefetch_factor=3)
    full = FullBatchLoader(loader)
    full.share(1, 2, torch.device("cpu"))
    own = full._part.batches
    for name in ("num_workers", "collate_fn", "timeout", "prefetch_factor", "persistent_workers", "pin_memory"):
        assert getattr(own, name) == getattr(loader, name)


def test_exact_distributed_sampler_is_kept():
    for rank in range(2):
        loader = DataLoader(TEN, batch_size=3, sampler=DistributedSampler(TEN, 2, rank, shuffle=False))
        full = FullBatchLoader(loader)
        full.share(rank, 2, torch.device("cpu"))
        assert torch.cat([m.data[0] for m in full.micro_batches()]).tolist() == list(range(rank, 10, 2))
        with pytest.raises(
            ValueError, match=f"gives rank {rank} of 2 its share, but this is rank 0 of 1. Use no sampler"
        ):
            full.share(0, 1)


class Passes(Sampler):
    """A custom sampler that cycles through the given passes."""

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


SHUFFLES = "shuffles from step to step"
REPEATS = "repeats samples"
LEAVES_OUT = "leaves samples out"
DROPS = "drops the"


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
        (lambda: DataLoader(TEN, sampler=Passes(range(10), range(9, -1, -1))), f"Passes {SHUFFLES}.*Use a fixed order"),
        (lambda: DataLoader(TEN, sampler=Passes([*range(10), 3])), f"Passes {REPEATS}"),
        (lambda: DataLoader(TEN, sampler=Passes(range(9))), f"Passes {LEAVES_OUT}.*Subset as the dataset"),
        (lambda: DataLoader(TEN, batch_sampler=Passes([[0, 1], [1, 2]])), f"Passes {REPEATS}"),
        (lambda: DataLoader(TEN, sampler=Endless()), f"Endless {REPEATS}"),
        (lambda: DataLoader(TEN, batch_size=3, drop_last=True), f"drop_last=True {DROPS}.*Use drop_last=False"),
        (lambda: DataLoader(Stream(*TEN.tensors), batch_size=3, drop_last=True), f"drop_last=True {DROPS}"),
    ],
)
def test_inexact_sampler_is_refused(make, message):
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
        lambda: DataLoader(TEN, batch_size=5, drop_last=True),  # drops nothing
        lambda: DataLoader(TEN, sampler=Passes(range(9, -1, -1)), batch_size=3),  # a fixed order
        lambda: DataLoader(TEN, batch_sampler=BatchSampler(SequentialSampler(TEN), 4, False)),
        lambda: DataLoader(Stream(*TEN.tensors), batch_size=3),
    ],
)
def test_exact_sampler_is_accepted(make):
    seen = torch.cat([m.data[0] for m in FullBatchLoader(make()).micro_batches()])
    assert sorted(seen.tolist()) == TEN.tensors[0].tolist()


class Ignoring(DataLoader):
    """Ignores its sampler."""

    def __iter__(self):
        for indices in BatchSampler(range(len(self.dataset)), 3, drop_last=False):
            yield self.dataset[indices]


class OwnCollate(DataLoader):
    """Collates with one of its methods, which needs an attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, collate_fn=self.doubled, **kwargs)
        self.factor = 2

    def doubled(self, samples):
        x, y = default_collate(samples)
        return self.factor * x, y


@pytest.mark.parametrize("kind", [Doubling, Ignoring, OwnCollate])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_loader_subclass_keeps_its_behavior(kind, world):
    source = kind(TensorDataset(X, Y), batch_size=3)
    factor = 1 if kind is Ignoring else 2
    shares = []
    for rank in range(world):
        loader = FullBatchLoader(source)
        loader.share(rank, world, torch.device("cpu"))
        for _ in range(2):  # two equal passes
            shares.append(list(loader.micro_batches()))
    assert len({len(share) for share in shares}) == 1
    counted = torch.cat([m.data[0] for share in shares[::2] for m in share if m.size])
    expected = factor * X
    assert torch.equal(counted.sort(dim=0).values, expected.sort(dim=0).values)
    assert all(m.size in (0, len(m.data[0])) for share in shares for m in share)


def test_batch_size_none_reads_ready_batches(tmp_path):
    batches = BatchSampler(SequentialSampler(X), 7, drop_last=False)
    module = Regression()
    fit(tmp_path, module, None, DataLoader(TensorDataset(X, Y), batch_size=None, sampler=batches), steps=5)
    assert torch.equal(torch.cat(module.targets[:3]), Y.flatten())


def test_combined_loader_is_refused():
    with pytest.raises(TypeError, match=r"data is a CombinedLoader.*give one DataLoader"):
        FullBatchLoader(CombinedLoader({"a": DataLoader(X), "b": DataLoader(Y)}))


def test_dataset_with_strings_needs_a_loader(tmp_path):
    class Named(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return X[i], Y[i], f"sample {i}"

    with pytest.raises(TypeError, match=r"data\[2\]\[0\] must be a tensor, got str.*give a DataLoader"):
        FullBatchLoader(Named())

    class OfNamed(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    module = OfNamed()
    fit(tmp_path, module, None, DataLoader(Named(), batch_size=7), steps=4)
    assert torch.equal(torch.cat(module.targets[:3]), Y.flatten())


def test_used_persistent_workers_are_shared():
    source = DataLoader(TensorDataset(X, Y), batch_size=5, num_workers=1, persistent_workers=True)
    next(iter(source))  # starts the workers
    for rank in range(2):
        loader = FullBatchLoader(source)
        loader.share(rank, 2, torch.device("cpu"))
        counted = [m.data[1] for m in loader.micro_batches() if m.size]
        assert torch.equal(torch.cat(counted), torch.cat([Y[i : i + 5] for i in range(5 * rank, 20, 10)]))
        loader._release()
