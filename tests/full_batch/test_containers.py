"""Batches may be lists, dicts, dataclasses, graphs, sparse tensors and other containers."""

import re
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from fitting import DATA, Reiterable, fit, loop
from lit import all_equal
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, default_collate
from whole_set import Regression, exact, make_data, relative_error

from lightning_rprop import FullBatch, FullBatchLoader

X, Y = make_data(20)


def test_nested_batch_may_be_changed_in_a_step(tmp_path):
    class Nested(Regression):
        def training_step(self, batch):  # without batch_idx
            x = batch.pop("inputs")["x"]  # changes the dict of this step only
            (y, weights) = batch["rest"]
            return ((self.net(x) - y).square() * weights).mean()

    module = Nested()
    _, gradient = exact(module.net, DATA)
    data = {"inputs": {"x": DATA[0]}, "rest": [DATA[1], torch.ones(103, 1)]}
    fit(tmp_path, module, 10, data=data, steps=3)
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32 rounding


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
def test_ambiguous_list_names_its_remedies(data, what, remedies, size):
    with pytest.raises(ValueError, match=f"data is a list of {what}, which may be samples, ready batches, or") as error:
        FullBatchLoader(data, size)
    assert len(str(error.value)) < 400
    for remedy in remedies:
        list(FullBatchLoader(remedy(data)).micro_batches())


def test_remedies_train_on_all_samples(tmp_path):
    expected, collated, streamed = Regression(), Regression(), Regression()
    fit(tmp_path, expected, None, (X, Y), steps=5)
    fit(tmp_path, collated, None, tuple(default_collate(SAMPLES)), steps=5)
    assert all_equal(collated.parameters(), expected.parameters())
    fit(tmp_path, streamed, None, DataLoader(BATCHES, batch_size=None), steps=5)
    assert torch.equal(torch.cat(streamed.targets[:2]), Y.flatten())


@pytest.mark.parametrize("data", [[X, Y], [X, (Y, Y)], [X, {"y": Y}]])
def test_unambiguous_list_is_one_batch(data):
    assert FullBatchLoader(data, 7).num_samples == 20


class Graph:
    """Like torch_geometric.data.Data: iterable, with a length and ``to()``, but not a mapping."""

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


def test_object_with_to_is_one_batch(tmp_path):
    expected, module = Regression(), OfGraph()
    fit(tmp_path, expected, None, (X, Y), steps=5)
    fit(tmp_path, module, None, Graph(X, Y), steps=5)
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
    module = OfGraph()
    fit(tmp_path, module, None, source, steps=5, full_batch=FullBatch(weight=lambda graph: len(graph.x)))
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


def test_packed_sequence_is_one_batch():
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
def test_sparse_tensors_train_held_or_streamed(layout, streamed, tmp_path):
    adjacency = getattr(ADJACENCY, layout)()
    data = (adjacency, X, Y)
    module, expected = Gcn(), Regression()
    fit(tmp_path, module, None, Reiterable(data) if streamed else data, steps=5)
    loop(expected, 5, (adjacency @ X, Y))
    assert all_equal(module.parameters(), expected.parameters())
    if not streamed:
        with pytest.raises(ValueError, match=r"data\[0\], torch.sparse_.*, cannot be cut into micro-batches"):
            FullBatchLoader(data, 7)


class AttributeDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


def test_attributes_of_mapping_are_cut():
    for micro_batch in FullBatchLoader(AttributeDict(x=X, y=Y), 7).micro_batches():
        assert len(micro_batch.data.x) == len(micro_batch.data["x"]) == micro_batch.size


@dataclass
class WithMask:
    x: torch.Tensor

    def __post_init__(self):
        self.mask = torch.ones(len(self.x))


def test_tensor_that_is_no_field_is_refused():
    with pytest.raises(TypeError, match=r"data.mask is a tensor but not a field of WithMask: make it a field"):
        FullBatchLoader(WithMask(X), 7)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ([{"x": x} for x in X], "Give torch.utils.data.default_collate(data) for samples"),
        ([X[:3], X[:4], X[:4]], "Give a DataLoader with a collate_fn for samples"),
        ([WithMask(x) for x in X], "item.mask is a tensor but not a field of WithMask"),
    ],
)
def test_remedy_depends_on_the_samples(data, remedy):
    with pytest.raises((ValueError, TypeError)) as error:
        FullBatchLoader(data)
    assert remedy in str(error.value)
    if "default_collate" in remedy:
        FullBatchLoader(default_collate(data), 7)
