"""DataLoaders as sources of micro-batches: every sample once per pass, in a fixed order, on one rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_rprop._torch import copy_with_sampler, has_own_iteration

_SHUFFLES = "shuffles from step to step, which changes the rounding of the gradient"
_NO_SAMPLER = "no sampler, because the FullBatchLoader splits the data"
_SHUFFLING = {
    RandomSampler: "shuffle=False",
    SubsetRandomSampler: "a torch.utils.data.Subset as the dataset, with shuffle=False",
    WeightedRandomSampler: "shuffle=False, and weigh the samples in the loss",
}


def check_sampler(loader: DataLoader[Any]) -> None:
    """Check that a DataLoader yields each sample of its dataset once per pass, in a fixed order.

    Args:
        loader: The user's DataLoader. All indices of a custom sampler are read, twice.

    Raises:
        ValueError: If it does not; names the sampler, what it does, and the remedy.
    """
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            raise _refusal("drop_last=True", "drops the samples of an incomplete batch", "drop_last=False")
        return
    batches = loader.batch_sampler
    plain = batches is None or type(batches) is BatchSampler
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    name = type(sampler if plain else batches).__name__

    for kind, remedy in _SHUFFLING.items():
        if plain and isinstance(sampler, kind):
            raise _refusal(name, _SHUFFLES, remedy)
    if plain and isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        length = len(loader.dataset)  # type: ignore[arg-type]
        if sampler.shuffle:
            raise _refusal(name, _SHUFFLES, _NO_SAMPLER)
        if sampler.total_size > length:
            raise _refusal(name, "repeats samples to give all ranks the same number", _NO_SAMPLER)
        missing = sampler.total_size < length
    elif plain and type(sampler) is SequentialSampler:
        missing = False
    else:
        missing = _check_indices(name, loader)
    if missing:
        remedy = "a sampler of all indices, or a torch.utils.data.Subset as the dataset"
        raise _refusal(name, "leaves samples out", remedy)
    if isinstance(batches, BatchSampler) and batches.drop_last and len(sampler) % batches.batch_size:  # type: ignore[arg-type]
        raise _refusal("drop_last=True", "drops the samples of the incomplete batch", "drop_last=False")


def _check_indices(name: str, loader: DataLoader[Any]) -> bool:
    """Read all indices of a custom sampler twice; return whether some samples are missing."""
    with torch.random.fork_rng(devices=[]):  # so that the check does not change the user's random numbers
        passes = [_indices(loader) for _ in range(2)]
    if passes[0] != passes[1]:
        raise _refusal(name, _SHUFFLES, "a fixed order")
    if len(set(passes[0])) < len(passes[0]):
        raise _refusal(name, "repeats samples", "a sampler that yields each one once, and weigh the loss instead")
    return len(passes[0]) < len(loader.dataset) and not loader.drop_last  # type: ignore[arg-type]


def _indices(loader: DataLoader[Any]) -> list[Any]:
    """Return the indices of a pass, up to one more than there are samples."""
    if loader.batch_sampler is not None:
        indices = chain.from_iterable(loader.batch_sampler)
    else:
        indices = chain.from_iterable(
            i if isinstance(i, Iterable) and not isinstance(i, str) else [i] for i in loader.sampler
        )
    return list(islice(indices, len(loader.dataset) + 1))  # type: ignore[arg-type]


def _refusal(what: str, does: str, remedy: str) -> ValueError:
    return ValueError(
        f"a full-batch step takes every sample once, in a fixed order, but the DataLoader's {what} {does}. Use {remedy}"
    )


class Share(Sampler[Any]):
    """Every ``num_replicas``-th item of another sampler, starting at item ``rank``.

    All shares have the same length, so that collectives in training_step match between ranks. A share that is one item
    short repeats the very first item at its end; that one must not be counted.

    Args:
        items: The sampler of samples or batches to split.
        rank: The index of this share.
        num_replicas: The number of shares.
    """

    def __init__(self, items: Any, rank: int, num_replicas: int) -> None:
        self.items = items
        self.rank = rank
        self.num_replicas = num_replicas
        total = sum(1 for _ in items) if not hasattr(items, "__len__") else len(items)
        self.counted = len(range(rank, total, num_replicas))
        self.length = len(range(0, total, num_replicas))

    def __len__(self) -> int:
        """Return the number of items, including one that must not be counted."""
        return self.length

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items of this share."""
        yield from islice(self.items, self.rank, None, self.num_replicas)
        if self.counted < self.length:
            yield from islice(self.items, 1)


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a DataLoader that reads the same samples unshuffled; one that does not shuffle is returned unchanged."""
    dataset, batches, sampler = loader.dataset, loader.batch_sampler, loader.sampler
    if isinstance(dataset, IterableDataset):
        return loader

    def shuffles(sampler: Any) -> bool:
        if type(sampler) is RandomSampler:
            return not sampler.replacement and sampler.num_samples == len(dataset)  # type: ignore[arg-type]
        return type(sampler) is DistributedSampler and sampler.shuffle

    ordered = SequentialSampler(dataset)  # type: ignore[arg-type]
    for name, given in (("batch_sampler", batches), ("sampler", sampler if batches is None else None)):
        if type(given) is BatchSampler and shuffles(given.sampler):
            return copy_with_sampler(loader, name, BatchSampler(ordered, given.batch_size, given.drop_last))
        if shuffles(given):
            return copy_with_sampler(loader, name, ordered)
    return loader


def order_of(loader: DataLoader[Any]) -> str:
    """Return a checksum of the indices of all batches; empty for a DistributedSampler, whose indices differ by rank."""
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(getattr(batches, "sampler", batches), DistributedSampler):
        return ""
    checksum = 0
    with torch.random.fork_rng(devices=[]):
        for batch in batches:
            checksum = zlib.crc32(repr(batch).encode(), checksum)
    return f"{checksum:08x}"


def batch_sizes(loader: DataLoader[Any]) -> list[int] | int | None:
    """Return the number of samples in each batch, an upper bound for a stream, or None if it is unknown."""
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler or has_own_iteration(loader):
        return None
    if isinstance(loader.dataset, IterableDataset):
        return batches.batch_size
    full, rest = divmod(len(batches.sampler), batches.batch_size)  # type: ignore[arg-type]
    return [batches.batch_size] * full + [rest] * (rest > 0)


def share(
    loader: DataLoader[Any], rank: int, num_replicas: int
) -> tuple[DataLoader[Any], int | None, tuple[int, int] | None]:
    """Build the DataLoader of one rank's share of the batches.

    An IterableDataset and a DistributedSampler are left unchanged: they already yield only the rank's own samples.

    Args:
        loader: The DataLoader of all samples.
        rank: The rank whose share to take.
        num_replicas: The number of ranks.

    Returns:
        The DataLoader; the number of its batches that count, or ``None`` for all; and ``(rank, num_replicas)`` if it
        yields all batches and the rank has to pick its own.

    Raises:
        ValueError: If a DistributedSampler yields the share of another rank.
    """
    batches = loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        if (sampler.rank, sampler.num_replicas) != (rank, num_replicas):
            raise ValueError(
                f"the DataLoader's {type(sampler).__name__} gives rank {sampler.rank} of {sampler.num_replicas} its "
                f"share, but this is rank {rank} of {num_replicas}. Use no sampler: the FullBatchLoader splits the data"
            )
        return loader, None, None
    if num_replicas == 1 or isinstance(loader.dataset, IterableDataset):
        return loader, None, None
    if has_own_iteration(loader):
        return loader, None, (rank, num_replicas)
    part = Share(loader.sampler if batches is None else batches, rank, num_replicas)
    return copy_with_sampler(loader, "sampler" if batches is None else "batch_sampler", part), part.counted, None
