"""Where micro-batches come from: tensors that are held, or batches that are read anew at each pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lightning_rprop.full_batch.samplers import check_sampler, share

Place = Callable[[Tensor], Tensor]


def make_source(data: Any, micro_batch_size: int | None) -> Held | Streamed:
    """Find out what the user gave.

    Args:
        data: What :class:`~lightning_rprop.FullBatchLoader` takes.
        micro_batch_size: What it was given, for the errors.

    Returns:
        The source.

    Raises:
        TypeError: If it is none of what the loader takes.
        ValueError: If it cannot be read again and again as the same samples.
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
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not isinstance(data, Collection)):
        return Held(_collated(data))
    if isinstance(data, Tensor | Mapping | list | tuple):
        return Held(data)
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which can be read once only, but every step reads all of it: give an "
            "object whose __iter__ starts anew, such as an IterableDataset"
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


def _collated(dataset: Dataset[Any]) -> Any:
    """Hold all samples of a map-style dataset, collated once as a DataLoader would."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    length = len(dataset)  # type: ignore[arg-type]
    if not length:
        raise ValueError("data has no samples")
    samples = [dataset[i] for i in range(length)]
    first = default_collate(samples[:1])
    if not _same(first, default_collate([dataset[0]])):
        rank_zero_warn(
            f"{type(dataset).__name__} gives another sample 0 at each look: it augments its data. The loader takes "
            "what it gave first, at every step. To augment, do so once and store the result"
        )
    return default_collate(samples)


class Held:
    """Tensors that stay where they are; a micro-batch is a view of them.

    Args:
        data: Tensors of shape ``(samples, ...)``, in tuples, lists or dicts.

    Raises:
        TypeError: If something in it is not a tensor.
        ValueError: If a tensor has no samples or needs a gradient.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        lengths = [_check_leaf(path, leaf) for path, leaf in _leaves("data", data)]
        if not lengths:
            raise ValueError(f"data has no tensor in it: {data!r}")
        self.num_samples: int = lengths[0]
        self.aligned = len(set(lengths)) == 1
        if not self.num_samples or not all(lengths):
            raise ValueError("data has no samples: a tensor of it has length 0")

    def whole(self, micro_batch_size: int | None) -> HeldPart:
        """Cut all samples."""
        return self.share(0, 1, micro_batch_size, lambda tensor: tensor)

    def share(self, rank: int, num_replicas: int, micro_batch_size: int | None, place: Place) -> HeldPart:
        """Cut a contiguous part without padding, in as many micro-batches as every other rank has."""
        n = self.num_samples
        if not self.aligned and (num_replicas > 1 or micro_batch_size is not None):
            lengths = ", ".join(f"{path} {len(leaf)}" for path, leaf in _leaves("data", self.data))
            raise ValueError(
                f"tensors of different lengths ({lengths}) cannot be cut into micro-batches or shared among "
                f"{num_replicas} ranks: only a whole one has the right gradient. Give all of them one length, with a "
                "column of weights where a sample does not count, or use micro_batch_size=None on one device"
            )
        low, high = rank * n // num_replicas, (rank + 1) * n // num_replicas
        largest = -(-n // num_replicas)
        count = -(-largest // (micro_batch_size or largest))
        cuts = [i * (high - low) // count for i in range(count + 1)]
        whole = high - low == n
        end = max(high, low + 1)  # a rank without samples takes one that does not count
        held = apply_to_collection(self.data, Tensor, lambda t: place(t if whole else t[low:end]))
        return HeldPart(held, list(pairwise(cuts)))


class HeldPart:
    """One rank's part of the held tensors: at each pass its micro-batches, each with its number of samples.

    That is 0 for a sample that does not count and only keeps the rank in step with the others.

    Args:
        data: The part, as the user nested it.
        cuts: Where each micro-batch begins and ends in it.
    """

    def __init__(self, data: Any, cuts: list[tuple[int, int]]) -> None:
        self.data = data
        self.cuts = cuts
        self.single = len(cuts) == 1
        self.leaves = [leaf for _, leaf in _leaves("data", data)]
        self.versions: list[int] | None = None  # when the first pass began

    def __getstate__(self) -> dict[str, Any]:
        """A copy has versions of its own."""
        return {**self.__dict__, "versions": None}

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Make a pass."""
        self._check_unchanged()
        for low, high in self.cuts:
            part = slice(low, high) if high > low else slice(0, 1)
            if self.single and high > low:
                part = slice(None)  # of tensors of different lengths, too
            # views made anew: what training_step does to their flags, and to the dict they are in, stays there
            yield apply_to_collection(self.data, Tensor, lambda t, part=part: t[part]), high - low
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        versions = [leaf._version for leaf in self.leaves]
        if self.versions is None:
            self.versions = versions
        elif self.versions != versions:
            raise RuntimeError(
                "the training data were written to in place during a step: they are held, not copied, and every later "
                "step would see the change. Work on a copy, as in x = x.clone()"
            )

    def close(self) -> None:
        """Nothing is to be ended."""


class Streamed:
    """Batches that are read anew at each pass.

    Args:
        batches: A DataLoader, or an iterable of ready batches.
    """

    num_samples: int | None = None

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def whole(self, micro_batch_size: int | None) -> StreamedPart:
        """Take all batches."""
        return StreamedPart(self.batches, None)

    def share(self, rank: int, num_replicas: int, micro_batch_size: int | None, place: Place) -> StreamedPart:
        """Take every ``num_replicas``-th batch; an iterable gives each rank its own."""
        if isinstance(self.batches, DataLoader):
            return StreamedPart(*share(self.batches, rank, num_replicas))
        return StreamedPart(self.batches, None)


class StreamedPart:
    """One rank's batches, each with its number of samples, as in :class:`HeldPart`.

    The first batches of the first two passes are compared: they tell data that are not the same at each step.

    Args:
        batches: What gives the batches of one pass.
        counted: How many of them count; ``None`` for all.
    """

    single = False

    def __init__(self, batches: Any, counted: int | None) -> None:
        self.batches = batches
        self.counted = counted
        self.leaves: list[Tensor] = []
        self.first: Any = None
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Make a pass."""
        self.passes += 1
        for i, batch in enumerate(self.batches):
            if i == 0:
                self._compare(batch)
            yield batch, 0 if self.counted is not None and i >= self.counted else count_samples(batch)

    def close(self) -> None:
        """End the workers of a DataLoader that keeps them, as Lightning does after a fit; torch has no public name."""
        workers = getattr(self.batches, "_iterator", None)
        if isinstance(self.batches, DataLoader) and workers is not None and hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
            self.batches._iterator = None

    def _compare(self, batch: Any) -> None:
        if self.passes == 1:
            self.first = apply_to_collection(batch, Tensor, Tensor.clone)
        elif self.passes == 2:
            if not _same(self.first, batch):
                rank_zero_warn(
                    "the training data are not the same at the second step as at the first: they are shuffled or "
                    "augmented, and the gradient is noisy from step to step, which Rprop cannot average out. Read "
                    "them in a fixed order, and augment once, before training"
                )
            self.first = None


def count_samples(batch: Any) -> int:
    """Count the samples of a batch by its tensors' first dimension; -1 where they do not agree, or there is none."""
    lengths = {len(leaf) for _, leaf in _leaves("batch", batch) if isinstance(leaf, Tensor) and leaf.ndim}
    return lengths.pop() if len(lengths) == 1 else -1


def _leaves(path: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Give each leaf with the expression that finds it."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(f"{path}[{key!r}]", value)
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            yield from _leaves(f"{path}[{i}]", value)
    else:
        yield path, data


def _check_leaf(path: str, leaf: Any) -> int:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{path} must be a tensor, got {type(leaf).__name__}: use torch.as_tensor, or leave it out")
    if leaf.ndim == 0:
        raise ValueError(f"{path} has no dimension of samples, its shape is (): give a tensor of shape (samples, ...)")
    if leaf.requires_grad:
        raise ValueError(f"{path} requires a gradient, but training data are constants: use detach()")
    return len(leaf)


def _same(a: Any, b: Any) -> bool:
    """Whether two batches hold equal tensors; what is not a tensor is not looked at."""
    pairs = zip(_leaves("", a), _leaves("", b), strict=False)
    return all(
        torch.equal(x.nan_to_num(), y.nan_to_num())
        for (_, x), (_, y) in pairs
        if isinstance(x, Tensor) and isinstance(y, Tensor)
    )
