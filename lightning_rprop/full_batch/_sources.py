"""Where micro-batches come from: data that are held, or batches that are read again at each pass."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate, default_convert

from lightning_rprop._lightning import is_called
from lightning_rprop._torch import shut_down_workers, version_of
from lightning_rprop.full_batch._samplers import batch_sizes, check_sampler, order_of, share

# Brings a tensor, or an object with the method to(), to the device and dtype of the model.
Place = Callable[[Any], Any]


def make_source(data: Any, micro_batch_size: int | None) -> Held | Streamed:
    """Find out what the user gave.

    Args:
        data: What :class:`~lightning_rprop.FullBatchLoader` takes.
        micro_batch_size: What it was given, for the errors.

    Returns:
        The source.

    Raises:
        TypeError: If it is none of what the loader takes.
        ValueError: If it is ambiguous, or cannot be read again and again as the same samples.
    """
    if isinstance(data, DataLoader):
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} beside a DataLoader, whose batches are the micro-batches: "
                "leave it None and set the DataLoader's batch_size"
            )
        check_sampler(data)
        return Streamed(data)
    if isinstance(data, IterableDataset):
        return Streamed(DataLoader(data, batch_size=micro_batch_size))
    if isinstance(data, Dataset):
        return Held(_collated(data))
    if isinstance(data, list):
        _check_list(data)
    if isinstance(data, Tensor | Mapping | list | tuple) or _is_dataclass(data) or _is_movable(data):
        return Held(data)
    if hasattr(data, "__getitem__") and not isinstance(data, Collection):
        return Held(_collated(data))
    if is_called(data, "CombinedLoader"):
        raise TypeError("data is a CombinedLoader, whose batches are of several loaders: give one DataLoader")
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which can be read once only, but every step reads all of it: give an "
            "object whose __iter__ starts over, such as an IterableDataset"
        )
    if isinstance(data, Iterable) and not isinstance(data, str | bytes) and not hasattr(data, "__array__"):
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} beside an iterable of ready batches, which are the "
                "micro-batches: leave it None"
            )
        return Streamed(data)
    raise TypeError(
        f"data must be a tensor, a tuple, list or dict of tensors (nested if you like), a Dataset or a DataLoader, got "
        f"{type(data).__name__}. For arrays use torch.as_tensor"
    )


def _check_list(data: list[Any]) -> None:
    """Refuse a list that may be samples or ready batches as well as the parts of one batch."""
    if not data:
        return
    samples = "a DataLoader with a collate_fn"
    if all(isinstance(item, Tensor) for item in data):
        shapes = {tuple(item.shape) for item in data}
        if len(shapes) > 1 and len({shape[:1] for shape in shapes}) == 1:
            return  # samples of different shapes make no batch: these are inputs, targets, ...
        if len(shapes) == 1:
            samples = "torch.stack(data)"
    elif len(data) > 1 and len({_structure(item) for item in data}) > 1:
        return
    elif all(isinstance(leaf, Tensor) for _, leaf in _leaves("", data)) and not _is_dataclass(data[0]):
        collated = "torch.utils.data.default_collate(data)"
        samples = collated if isinstance(data[0], Mapping) else f"tuple({collated})"
    raise ValueError(
        f"data is a list of {len(data)} {type(data[0]).__name__}, which may be samples, ready batches, or the parts of "
        f"one batch. Give {samples} for samples, DataLoader(data, batch_size=None) for ready batches, tuple(data) for "
        "the parts of one batch"
    )


def _structure(item: Any) -> Any:
    """Return what is alike in two samples of a data set: the containers and types in it."""
    return type(item), tuple((path, type(leaf)) for path, leaf in _leaves("", item))


def _collated(dataset: Any) -> Any:
    """Hold all samples of a map-style dataset, collated once as a DataLoader would."""
    if isinstance(dataset, TensorDataset) and all(
        getattr(type(dataset), name, None) is getattr(TensorDataset, name, None)
        for name in ("__getitem__", "__getitems__", "__len__")
    ):
        return dataset.tensors
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{type(dataset).__name__} has no __len__, so it is not known which samples it has: add one, or derive it "
            "from torch.utils.data.IterableDataset"
        )
    length = len(dataset)
    if not length:
        raise ValueError("data has no samples")
    try:
        samples = _fetch(dataset, length)
        if not _same(default_collate(samples[:1]), default_collate(_fetch(dataset, 1))):
            rank_zero_warn(
                f"{type(dataset).__name__} gives another sample 0 at each look: it augments its data. The loader takes "
                "what it gave first, at every step. To augment, do so once and store the result"
            )
        return default_collate(samples)
    except TypeError as error:
        if "default_collate" not in str(error):
            raise
        raise TypeError(
            f"the samples of {type(dataset).__name__} cannot be put together: {error}. Give a DataLoader that can, "
            "FullBatchLoader(DataLoader(dataset, batch_size=..., collate_fn=...))"
        ) from error


def _fetch(dataset: Any, length: int) -> list[Any]:
    """Read the first samples as a DataLoader does."""
    several = getattr(dataset, "__getitems__", None)
    return list(several([*range(length)])) if several else [dataset[i] for i in range(length)]


class Held:
    """Data that stay where they are; a micro-batch is a view of their tensors.

    Args:
        data: Tensors of shape ``(samples, ...)``, in tuples, lists, dicts or dataclasses; or objects with ``to()``.

    Raises:
        TypeError: If something in it is neither.
        ValueError: If a tensor has no samples or needs a gradient.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.leaves = dict(_leaves("data", data))
        lengths = [_check_leaf(path, leaf) for path, leaf in self.leaves.items()]
        if not lengths:
            raise ValueError(f"data has no tensor in it: {data!r}")
        if 0 in lengths:
            raise ValueError("data has no samples: a tensor of it has length 0")
        self.num_samples: int | None = lengths[0]
        # why it cannot be cut, if it cannot
        self.whole_only = ""
        if len(set(lengths)) > 1 and None not in lengths:
            each = ", ".join(f"{path} {length}" for path, length in zip(self.leaves, lengths, strict=True))
            self.whole_only = f"tensors of different lengths ({each})"
        for path, leaf in self.leaves.items():
            if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
                kind = leaf.layout if isinstance(leaf, Tensor) else f"an object of type {type(leaf).__name__}"
                self.whole_only = f"{path}, {kind},"

    def fingerprint(self) -> dict[str, str]:
        """Return what must be the same on every rank: how many samples there are, and a checksum of them."""
        return {
            "the number of samples": str(self.num_samples),
            "the checksum of the data": _checksum(leaf for _, leaf in sorted(self.leaves.items(), key=itemgetter(0))),
        }

    def whole(self, micro_batch_size: int | None) -> HeldPart:
        """Cut all samples."""
        return self.share(0, 1, micro_batch_size, lambda leaf: leaf)

    def share(self, rank: int, num_replicas: int, micro_batch_size: int | None, place: Place) -> HeldPart:
        """Cut a contiguous part without padding, in as many micro-batches as every other rank has."""
        if self.whole_only:
            if num_replicas > 1 or micro_batch_size is not None:
                ranks = f" or shared among {num_replicas} ranks" if num_replicas > 1 else ""
                raise ValueError(
                    f"{self.whole_only} cannot be cut into micro-batches{ranks}: only a whole one has the right "
                    "gradient. Use micro_batch_size=None on one device, tensors of one length (with a column of "
                    "weights where a sample does not count), or a DataLoader of ready batches"
                )
            return HeldPart(self, slice(None), [(0, count_samples(self.data))], place)
        n = self.num_samples
        assert n is not None
        low, high = rank * n // num_replicas, (rank + 1) * n // num_replicas
        largest = -(-n // num_replicas)
        count = -(-largest // (micro_batch_size or largest))
        cuts = [i * (high - low) // count for i in range(count + 1)]
        own = slice(None) if high - low == n else slice(low, max(high, low + 1))  # a rank without samples takes one
        return HeldPart(self, own, list(pairwise(cuts)), place)


class HeldPart:
    """One rank's part of the held data: at each pass its micro-batches, each with its number of samples.

    That is 0 for a sample that does not count and only keeps the rank in step with the others, and -1 where samples
    cannot be counted.

    Args:
        held: All of the data.
        own: The part.
        cuts: Where each micro-batch begins and ends in the part.
        place: Brings the part to where it is needed.
    """

    def __init__(self, held: Held, own: slice, cuts: list[tuple[int, int]], place: Place) -> None:
        self.single = len(cuts) == 1
        self._held, self._own, self._cuts, self._place = held, own, cuts, place
        self._take()
        self._versions = [*map(_state, self._watched)]

    def _take(self) -> None:
        own = _mapped(self._held.data, partial(_cut, part=self._own))
        self.data = _mapped(own, self._place)
        self.leaves = [leaf for _, leaf in _leaves("data", self.data)]
        views = [leaf for _, leaf in _leaves("data", own)]
        copies = [leaf for leaf, view in zip(self.leaves, views, strict=True) if leaf is not view]
        # training_step may write to copies; a view counts with what it is of
        self._watched = [leaf for leaf in (*self._held.leaves.values(), *copies) if isinstance(leaf, Tensor)]

    def begin_pass(self) -> bool:
        """See what was written to the data since the last pass; return whether micro-batches of before are outdated."""
        if [*map(_state, self._watched)] == self._versions:
            return False
        self._take()
        self._versions = [*map(_state, self._watched)]
        return True

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Iterate over the micro-batches of a pass."""
        for low, high in self._cuts:
            part = slice(low, high) if high > low else slice(0, 1)
            if self.single and high != low:
                part = slice(None)  # of tensors of different lengths, too
            # views made again: what training_step does to their flags, and to the dict they are in, stays there
            yield _mapped(self.data, partial(_cut, part=part)), high - low

    def end_pass(self) -> None:
        """Refuse data that were written to during the pass."""
        if [*map(_state, self._watched)] != self._versions:
            raise RuntimeError(
                "the training data were written to in place during a step: they are held, not copied, and every later "
                "step would see the change. Work on a copy, as in x = x.clone()"
            )

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


class Streamed:
    """Batches that are read again at each pass.

    Args:
        batches: A DataLoader, or an iterable of ready batches.
    """

    num_samples: int | None = None

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def fingerprint(self) -> dict[str, str]:
        """Return what must be the same on every rank: of a data set its length and a checksum of three samples."""
        if not isinstance(self.batches, DataLoader) or isinstance(self.batches.dataset, IterableDataset):
            return {}  # each rank has its own
        dataset: Any = self.batches.dataset
        length = len(dataset)
        found = {"the number of samples": str(length), "the batch size": str(self.batches.batch_size)}
        found["the order of the samples"] = order_of(self.batches)
        with suppress(Exception):  # a data set may know other indices, which its sampler gives
            indices = sorted({0, length // 2, length - 1})
            looks = [default_convert([dataset[i] for i in indices]) for _ in range(2)]  # type: ignore[no-untyped-call]
            if _same(*looks):
                found["the checksum of the data"] = _checksum(leaf for _, leaf in _leaves("", looks[0]))
        return found

    def whole(self, micro_batch_size: int | None) -> StreamedPart:
        """Take all batches."""
        return StreamedPart(self.batches, sizes=self._sizes())

    def share(self, rank: int, num_replicas: int, micro_batch_size: int | None, place: Place) -> StreamedPart:
        """Take every ``num_replicas``-th batch; an iterable gives each rank its own."""
        if not isinstance(self.batches, DataLoader):
            return StreamedPart(self.batches)
        sizes = self._sizes()
        batches, counted, every = share(self.batches, rank, num_replicas)
        if batches is not self.batches and isinstance(sizes, list):
            sizes = sizes[rank::num_replicas]
        return StreamedPart(batches, counted, every, sizes)

    def _sizes(self) -> list[int] | int | None:
        return batch_sizes(self.batches) if isinstance(self.batches, DataLoader) else None


class StreamedPart:
    """One rank's batches, each with its number of samples, as in :class:`HeldPart`.

    The first batches of the first two passes are compared: they tell data that are not the same at each step.

    Args:
        batches: What gives the batches of one pass.
        counted: How many of them count; ``None`` for all.
        every: ``(rank, num_replicas)`` to take every ``num_replicas``-th batch only.
        sizes: How many samples a DataLoader puts into each, or a number at most; ``None`` if that is unknown.
    """

    single = False

    def __init__(
        self,
        batches: Any,
        counted: int | None = None,
        every: tuple[int, int] | None = None,
        sizes: list[int] | int | None = None,
    ) -> None:
        self.batches = batches
        self.counted = counted
        self.every = every
        self.sizes = sizes
        self.leaves: list[Tensor] = []
        self.first: Any = None
        self.passes = 0

    def begin_pass(self) -> bool:
        """Return that micro-batches of before are not outdated."""
        return False

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Iterate over the micro-batches of a pass."""
        self.passes += 1
        is_over = False  # a stream's last batch may be smaller than batch_size; with workers, that of each
        for i, (batch, counts) in enumerate(self._own()):
            if i == 0:
                self._compare(batch)
            size = self._size(i, batch) if counts else 0
            yield batch, -1 if is_over else size
            if isinstance(self.sizes, int) and not self.batches.num_workers:
                is_over = size < self.sizes

    def _own(self) -> Iterator[tuple[Any, bool]]:
        """Iterate over this rank's batches, and whether each counts; equally many on all ranks."""
        if self.every is None:
            for i, batch in enumerate(self.batches):
                yield batch, self.counted is None or i < self.counted
            return
        rank, num_replicas = self.every
        first, total = None, 0
        for total, batch in enumerate(self.batches, start=1):
            first = batch if total == 1 else first
            if (total - 1) % num_replicas == rank:
                yield batch, True
        if 0 < total % num_replicas <= rank:
            yield first, False

    def _size(self, i: int, batch: Any) -> int:
        size = count_samples(batch)
        if isinstance(self.sizes, int):
            return size if size <= self.sizes else -1
        # another length than the DataLoader's may be that of a time axis
        return size if self.sizes is None or self.sizes[i : i + 1] == [size] else -1

    def end_pass(self) -> None:
        """Do nothing: what is read again cannot be spoiled."""

    def close(self) -> None:
        """End the workers of a DataLoader that keeps them, as Lightning does after a fit; torch has no public name."""
        if isinstance(self.batches, DataLoader):
            shut_down_workers(self.batches)

    def _compare(self, batch: Any) -> None:
        if self.passes == 1:
            self.first = _mapped(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        elif self.passes == 2:
            if not _same(self.first, batch):
                rank_zero_warn(
                    "the training data are not the same at the second step as at the first: they are shuffled or "
                    "augmented, and the gradient is noisy from step to step, which Rprop cannot average out. Read "
                    "them in a fixed order, and augment once, before training"
                )
            self.first = None


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: the first dimension of its tensors, and ``num_graphs`` of graphs.

    Returns:
        The number; -1 where they do not agree, or there is none.
    """
    leaves = [leaf for _, leaf in _leaves("batch", batch)]
    graphs = {int(leaf.num_graphs) for leaf in leaves if hasattr(leaf, "num_graphs")}
    lengths = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim} | graphs
    return lengths.pop() if len(lengths) == 1 else -1


def renewed(batch: Any) -> Any:
    """Return a batch in containers of its own, with the same tensors in them."""
    return _mapped(batch, lambda leaf: leaf)


def _is_movable(data: Any) -> bool:
    """Return whether this is a batch object, such as a graph of PyTorch Geometric, that moves as a whole."""
    return callable(getattr(data, "to", None)) and not isinstance(data, Tensor | torch.nn.Module | type)


def _is_dataclass(data: Any) -> bool:
    return dataclasses.is_dataclass(data) and not isinstance(data, type) and not _is_movable(data)


def _leaves(path: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves, with the expression that finds each."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(f"{path}[{key!r}]", value)
    elif isinstance(data, list | tuple) and not _is_movable(data):
        for i, value in enumerate(data):
            yield from _leaves(f"{path}[{i}]", value)
    elif _is_dataclass(data):
        names = {field.name for field in dataclasses.fields(data)}
        found = getattr(data, "__dict__", {}).items()
        if more := [name for name, value in found if isinstance(value, Tensor) and name not in names]:
            raise TypeError(f"{path}.{more[0]} is a tensor beside the fields of {type(data).__name__}: make it a field")
        for field in dataclasses.fields(data):
            yield from _leaves(f"{path}.{field.name}", getattr(data, field.name))
    else:
        yield path, data


def _mapped(data: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to each leaf; containers are made again."""
    if isinstance(data, Tensor):
        return function(data)
    if type(data) in (tuple, list):
        return type(data)([_mapped(value, function) for value in data])
    if isinstance(data, Mapping):
        items = {key: _mapped(value, function) for key, value in data.items()}
        if type(data) is dict:
            return items
        if isinstance(data, defaultdict):
            return type(data)(data.default_factory, items)
        rebuild: Any = type(data)
        return rebuild(items)
    if isinstance(data, list | tuple) and not _is_movable(data):
        values = [_mapped(value, function) for value in data]
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)
    if _is_dataclass(data):
        result: Any = copy.copy(data)
        for field in dataclasses.fields(data):  # past a frozen class's own setter, and without __init__
            object.__setattr__(result, field.name, _mapped(getattr(data, field.name), function))
        return result
    return function(data)


def _cut(leaf: Any, part: slice) -> Any:
    return leaf[part] if isinstance(leaf, Tensor) and leaf.layout is torch.strided else leaf


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written to, or given other memory."""
    pointer = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return version_of(tensor), pointer


def _check_leaf(path: str, leaf: Any) -> int | None:
    """Return how many samples a leaf has; None for an object, of which nobody knows."""
    if _is_movable(leaf):
        return None
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{path} must be a tensor, got {type(leaf).__name__}: use torch.as_tensor, or leave it out; or give a "
            "DataLoader, whose batches may hold anything"
        )
    if leaf.is_nested and leaf.layout is torch.strided:
        raise TypeError(f"{path} is a nested tensor, whose samples cannot be told: use layout=torch.jagged")
    if leaf.ndim == 0:
        raise ValueError(f"{path} has no dimension of samples, its shape is (): give a tensor of shape (samples, ...)")
    if leaf.requires_grad:
        raise ValueError(f"{path} requires a gradient, but training data are constants: use detach()")
    return len(leaf)


def _checksum(leaves: Iterable[Any]) -> str:
    """Return a checksum of tensors, numbers and texts; other objects are not looked at."""
    checksum = 0
    for leaf in leaves:
        data: Any = b""
        if isinstance(leaf, Tensor):
            data = _dense(leaf.detach()).resolve_conj().resolve_neg().cpu().contiguous().flatten()
            data = data.view(torch.uint8).numpy() if data.numel() else b""
        elif isinstance(leaf, int | float | complex | str | bytes):
            data = repr(leaf).encode()
        elif hasattr(leaf, "__dict__"):
            data = _checksum(value for _, value in _leaves("", vars(leaf)) if isinstance(value, Tensor)).encode()
        checksum = zlib.crc32(data, checksum)
    return f"{checksum:08x}"


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _same(a: Any, b: Any) -> bool:
    """Return whether two batches hold equal tensors; what is not a tensor is not looked at."""
    pairs = zip(_leaves("", a), _leaves("", b), strict=False)
    return all(
        x.shape == y.shape and _checksum([x]) == _checksum([y])  # NaN is NaN, in every dtype and layout
        for (_, x), (_, y) in pairs
        if isinstance(x, Tensor) and isinstance(y, Tensor)
    )
