"""Which data FullBatchLoader trains on: subclasses, lists, objects, sparse tensors, points that move."""

import re
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lit import all_equal, trainer
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset, default_collate
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

X, Y = make_data(20)


def fit(folder, data, size=None, module=None, **options):
    module = module or Regression()
    trainer(folder, [FullBatch(**options)], max_epochs=5).fit(module, FullBatchLoader(data, size))
    return module


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
def test_tensor_dataset_subclass_keeps_its_behaviour(kind, tmp_path):
    dataset = kind(X, Y)
    held = fit(tmp_path, dataset, 7)
    streamed = fit(tmp_path, DataLoader(dataset, batch_size=7))
    x, y = next(iter(DataLoader(dataset, batch_size=20)))
    expected = fit(tmp_path, (x, y), 7)
    assert len(x) == len(dataset)
    assert all_equal(held.parameters(), expected.parameters())
    assert torch.equal(torch.cat(streamed.targets[: -(-len(dataset) // 7)]), y.flatten())


class Doubling(DataLoader):
    """It changes the batches, as a prefetcher does."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


class Ignoring(DataLoader):
    """It takes no notice of its sampler."""

    def __iter__(self):
        for indices in BatchSampler(range(len(self.dataset)), 3, drop_last=False):
            yield self.dataset[indices]


class Named(DataLoader):
    """It keeps something of its own, and makes its batches as DataLoader does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, collate_fn=self.doubled, **kwargs)
        self.factor = 2

    def doubled(self, samples):
        x, y = default_collate(samples)
        return self.factor * x, y


@pytest.mark.parametrize("kind", [Doubling, Ignoring, Named])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_data_loader_subclass_keeps_its_behaviour(kind, world):
    source = kind(TensorDataset(X, Y), batch_size=3)
    factor = 1 if kind is Ignoring else 2
    shares = []
    for rank in range(world):
        loader = FullBatchLoader(source)
        loader.share(rank, world, torch.device("cpu"))
        for _ in range(2):  # the second pass is as the first
            shares.append(list(loader.micro_batches()))
    assert len({len(share) for share in shares}) == 1
    counted = torch.cat([m.data[0] for share in shares[::2] for m in share if m.size])
    expected = factor * X
    assert torch.equal(counted.sort(dim=0).values, expected.sort(dim=0).values)
    assert all(m.size in (0, len(m.data[0])) for share in shares for m in share)


SAMPLES = [(x, y) for x, y in zip(X, Y, strict=True)]
BATCHES = [(X[:12], Y[:12]), (X[12:], Y[12:])]


@pytest.mark.parametrize(
    ("data", "what", "remedies"),
    [
        ([X[i] for i in range(20)], "20 Tensor", [torch.stack, lambda d: DataLoader(d, batch_size=None), tuple]),
        ([X[:12], X[12:]], "2 Tensor", [lambda d: DataLoader(d, batch_size=None), tuple]),
        ([X], "1 Tensor", [lambda d: DataLoader(d, batch_size=None), tuple]),
        ([X, X + 1], "2 Tensor", [tuple]),
        (SAMPLES, "20 tuple", [lambda d: tuple(default_collate(d))]),
        ([{"x": x} for x in X], "20 dict", [lambda d: default_collate(d)]),
        (BATCHES, "2 tuple", [lambda d: DataLoader(d, batch_size=None)]),
        ([(x.tolist(), 1) for x in X], "20 tuple", []),
    ],
)
@pytest.mark.parametrize("size", [None, 1])
def test_ambiguous_list_is_refused_with_remedies(data, what, remedies, size):
    with pytest.raises(ValueError, match=f"data is a list of {what}, which may be samples, ready batches, or") as error:
        FullBatchLoader(data, size)
    assert len(str(error.value)) < 400
    for remedy in remedies:
        list(FullBatchLoader(remedy(data)).micro_batches())


def test_remedies_for_lists_train_on_the_samples(tmp_path):
    expected = fit(tmp_path, (X, Y))
    collated = fit(tmp_path, tuple(default_collate(SAMPLES)))
    assert all_equal(collated.parameters(), expected.parameters())
    streamed = fit(tmp_path, DataLoader(BATCHES, batch_size=None))
    assert torch.equal(torch.cat(streamed.targets[:2]), Y.flatten())


@pytest.mark.parametrize("data", [[X, Y], [X, (Y, Y)], [X, {"y": Y}]])
def test_list_that_can_only_be_parts_is_taken(data):
    assert FullBatchLoader(data, 7).num_samples == 20


class Graph:
    """As torch_geometric.data.Data: iterable, with a length, movable, and no mapping."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(vars(self).items())

    def __len__(self):
        return 2

    def __contains__(self, key):
        return key in vars(self)

    def __getitem__(self, key):
        return vars(self)[key]

    def to(self, device, **kwargs):
        return Graph(self.x.to(device), self.y.to(device))


class OfGraph(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


def test_object_that_moves_is_one_whole_batch(tmp_path):
    expected = fit(tmp_path, (X, Y))
    module = fit(tmp_path, Graph(X, Y), module=OfGraph())
    assert all_equal(module.parameters(), expected.parameters())
    with pytest.raises(ValueError, match=r"data, an object of type Graph, cannot be cut into micro-b.*DataLoader"):
        FullBatchLoader(Graph(X, Y), 7)
    with pytest.raises(ValueError, match="or shared among 2 ranks"):
        FullBatchLoader(Graph(X, Y)).share(0, 2)
    with pytest.raises(ValueError, match="data is a list of 2 Graph"):
        FullBatchLoader([Graph(X, Y), Graph(X, Y)])


def test_dataset_of_objects_needs_a_collate_fn(tmp_path):
    class Graphs(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return Graph(X[i], Y[i])

    def collate(graphs):
        return Graph(torch.stack([g.x for g in graphs]), torch.stack([g.y for g in graphs]))

    message = r"samples of Graphs cannot be collated.*FullBatchLoader\(DataLoader\(dataset, .*collate_fn="
    with pytest.raises(TypeError, match=message):
        FullBatchLoader(Graphs())
    source = DataLoader(Graphs(), batch_size=7, collate_fn=collate)
    module = fit(tmp_path, source, module=OfGraph(), weight=lambda graph: len(graph.x))
    assert torch.equal(torch.cat(module.targets[:3]), Y.flatten())


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor


Tuple = namedtuple("Tuple", "x y")


@pytest.mark.parametrize("size", [None, 7])
def test_containers_keep_their_types(size):
    containers = [Pair(X, Y), Tuple(X, Y), OrderedDict(x=X, y=Y), UserDict(x=X, y=Y), {"a": Pair(X, Y)}, (X, [X, Y])]
    for data in containers:
        micro_batches = [m.data for m in FullBatchLoader(data, size).micro_batches()]
        assert {type(m) for m in micro_batches} == {type(data)}
        firsts = [x_of(m) for m in micro_batches]
        assert torch.equal(torch.cat(firsts), X)


def x_of(batch):
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, tuple):
        return batch[0]
    if isinstance(batch, dict | UserDict):
        return x_of(next(iter(batch.values())))
    return batch.x


def test_packed_sequence_is_held_whole():
    packed = pack_sequence([X[:5], X[:3]])
    (batch,) = FullBatchLoader((packed, Y[:2]))
    assert torch.equal(batch[0].data, packed.data)
    with pytest.raises(ValueError, match=re.escape("data[0], an object of type PackedSequence, cannot be cut")):
        FullBatchLoader((packed, Y[:2]), 1)


ADJACENCY = torch.eye(20).roll(1, 0) / 2 + torch.eye(20) / 2


class Gcn(Regression):
    def training_step(self, batch, batch_idx):
        adjacency, x, y = batch
        return super().training_step((adjacency @ x, y), batch_idx)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("streamed", [False, True])
def test_sparse_tensors_are_held_whole_and_streamed(layout, streamed, tmp_path):
    class Batches:
        def __iter__(self):
            return iter([(getattr(ADJACENCY, layout)(), X, Y)])

    data = Batches() if streamed else (getattr(ADJACENCY, layout)(), X, Y)
    module = fit(tmp_path, data, module=Gcn())
    expected = Regression()
    optimizer = expected.configure_optimizers()
    adjacency = getattr(ADJACENCY, layout)()
    for _ in range(5):
        optimizer.zero_grad()
        (expected.net(adjacency @ X) - Y).square().mean().backward()
        optimizer.step()
    assert all_equal(module.parameters(), expected.parameters())
    if not streamed:
        with pytest.raises(ValueError, match=r"data\[0\], torch.sparse_.*, cannot be cut into micro-batches"):
            FullBatchLoader(data, 7)


def points(k):
    return torch.rand(20, 1, generator=torch.Generator().manual_seed(k))


class Pinn(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch, batch_idx):
        x = batch.requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return (slope - x.detach().cos()).square().mean()

    def configure_optimizers(self):
        return Rprop(self.parameters(), max_iter=2)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_may_move_between_steps(hook, size, dtype, tmp_path):
    data = points(0).to(dtype)  # float32 ones are copied, to the module's precision

    class Move(pl.Callback):
        pass

    def move(self, trainer, *args):
        data.copy_(points(trainer.global_step))

    setattr(Move, hook, move)
    module = Pinn()
    fitter = trainer(tmp_path, [FullBatch(), Move()], max_epochs=5, precision="64-true")
    fitter.fit(module, FullBatchLoader(data, size))
    expected = Pinn()
    optimizer = expected.configure_optimizers()
    for step in range(5):
        x = points(step).to(dtype).double()

        def closure(x=x):
            optimizer.zero_grad()
            loss = expected.training_step(x.clone(), 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert all_equal(module.parameters(), expected.parameters())


@pytest.mark.parametrize("size", [None, 20, 7])
@pytest.mark.parametrize("at", ["first", "last"])
def test_points_that_move_in_training_step_are_refused(size, at, tmp_path):
    class Moving(Regression):
        def training_step(self, batch, batch_idx):
            if at == "first" or len(self.targets) == (2 if size == 7 else 0):
                batch[0].mul_(1)
            return super().training_step(batch, batch_idx)

    module = Moving()
    start = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match=r"written to in place during a step.*x = x.clone\(\)"):
        fit(tmp_path, (X.clone(), Y), size, module=module)
    assert all_equal(module.parameters(), start)


def test_data_made_under_inference_mode(tmp_path):
    with torch.inference_mode():
        x = X * 1
    module = fit(tmp_path, (X, Y, x), module=OfThree())
    assert module.trainer.global_step == 5


class OfThree(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def test_sequential_batches_of_a_data_loader_without_collation(tmp_path):
    batches = BatchSampler(SequentialSampler(X), 7, drop_last=False)
    module = fit(tmp_path, DataLoader(TensorDataset(X, Y), batch_size=None, sampler=batches))
    assert torch.equal(torch.cat(module.targets[:3]), Y.flatten())


def test_dataset_without_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, i):
            return X[i % 20]

    with pytest.raises(TypeError, match=r"Endless has no __len__.*IterableDataset"):
        FullBatchLoader(Endless())


def test_combined_loader_is_refused():
    with pytest.raises(TypeError, match=r"data is a CombinedLoader.*give one DataLoader"):
        FullBatchLoader(CombinedLoader({"a": DataLoader(X), "b": DataLoader(Y)}))
