"""A DataLoader as a source of micro-batches: each sample once a pass, in the same order, on one rank only."""

from __future__ import annotations

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

_SHUFFLES = "shuffles from step to step, and so changes the rounding of the gradient"
_SHUFFLING = {
    RandomSampler: "shuffle=False",
    SubsetRandomSampler: "a torch.utils.data.Subset as the dataset, with shuffle=False",
    WeightedRandomSampler: "shuffle=False, and weigh the samples in the loss",
}


def check_sampler(loader: DataLoader[Any]) -> None:
    """Refuse a DataLoader that does not give each sample of its dataset once a pass, in the same order.

    Args:
        loader: As the user made it. A sampler that is not one of torch's is asked for all its indices, twice.

    Raises:
        ValueError: Naming the sampler, what it does, and the remedy.
    """
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            raise ValueError(_refusal("drop_last=True", "drops the samples of an incomplete batch", "drop_last=False"))
        return
    batches = loader.batch_sampler
    plain = batches is None or type(batches) is BatchSampler
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    name = type(sampler if plain else batches).__name__

    for kind, remedy in _SHUFFLING.items():
        if plain and isinstance(sampler, kind):
            raise ValueError(_refusal(name, _SHUFFLES, remedy))
    if plain and isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        if sampler.shuffle:
            raise ValueError(_refusal(name, _SHUFFLES, "no sampler: the loader shares the data out"))
        if sampler.total_size > len(loader.dataset):  # type: ignore[arg-type]
            raise ValueError(
                _refusal(
                    name, "repeats samples to give all ranks as many", "no sampler: the loader shares the data out"
                )
            )
        missing = sampler.total_size < len(loader.dataset)  # type: ignore[arg-type]
    elif plain and type(sampler) is SequentialSampler:
        missing = False
    else:
        missing = _check_indices(name, loader)
    if missing:
        raise ValueError(
            _refusal(
                name, "leaves samples out", "a sampler of all indices, or a torch.utils.data.Subset as the dataset"
            )
        )
    if isinstance(batches, BatchSampler) and batches.drop_last and len(sampler) % batches.batch_size:  # type: ignore[arg-type]
        raise ValueError(_refusal("drop_last=True", "drops the samples of the incomplete batch", "drop_last=False"))


def _check_indices(name: str, loader: DataLoader[Any]) -> bool:
    """Read all indices of a sampler that is not known, twice; tell whether some of the dataset are missing."""
    with torch.random.fork_rng(devices=[]):  # so that looking changes no one's random numbers
        passes = [_indices(loader) for _ in range(2)]
    if passes[0] != passes[1]:
        raise ValueError(_refusal(name, _SHUFFLES, "a fixed order"))
    if len(set(passes[0])) < len(passes[0]):
        raise ValueError(_refusal(name, "repeats samples", "a sampler that gives each once; weigh the loss instead"))
    return len(passes[0]) < len(loader.dataset) and not loader.drop_last  # type: ignore[arg-type]


def _indices(loader: DataLoader[Any]) -> list[Any]:
    """Read the indices of a pass; no more than show that some are repeated."""
    if loader.batch_sampler is not None:
        indices = chain.from_iterable(loader.batch_sampler)
    else:
        indices = chain.from_iterable(
            i if isinstance(i, Iterable) and not isinstance(i, str) else [i] for i in loader.sampler
        )
    return list(islice(indices, len(loader.dataset) + 1))  # type: ignore[arg-type]


def _refusal(what: str, does: str, remedy: str) -> str:
    return (
        f"a full-batch step takes every sample once, in the same order, but the DataLoader's {what} {does}. "
        f"Use {remedy}"
    )


class Share(Sampler[Any]):
    """Every ``num_replicas``-th item of another sampler, from the ``rank``-th on.

    All ranks give equally many, so that collectives in training_step find each other: where a share is one short, the
    first item of all is given at its end, and is not to be counted.

    Args:
        items: The sampler of samples, or of batches, to share out.
        rank: Which share this is.
        num_replicas: How many shares there are.
    """

    def __init__(self, items: Any, rank: int, num_replicas: int) -> None:
        self.items = items
        self.rank = rank
        self.num_replicas = num_replicas
        total = sum(1 for _ in items) if not hasattr(items, "__len__") else len(items)
        self.counted = len(range(rank, total, num_replicas))
        self.length = len(range(0, total, num_replicas))

    def __len__(self) -> int:
        """Count the items of this share, the one not to be counted included."""
        return self.length

    def __iter__(self) -> Iterator[Any]:
        """Give the items of this share."""
        yield from islice(self.items, self.rank, None, self.num_replicas)
        if self.counted < self.length:
            yield from islice(self.items, 1)


def share(loader: DataLoader[Any], rank: int, num_replicas: int) -> tuple[DataLoader[Any], int | None]:
    """Make the DataLoader of one rank's share of the batches.

    An IterableDataset, and a DistributedSampler that :func:`check_sampler` let pass, give each rank its own already.

    Args:
        loader: The DataLoader of all samples.
        rank: Which rank's share.
        num_replicas: How many ranks share the batches.

    Returns:
        The DataLoader, and how many of its batches count; ``None`` for all.

    Raises:
        ValueError: If a DistributedSampler gives the share of another rank.
    """
    batches = loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        if (sampler.rank, sampler.num_replicas) != (rank, num_replicas):
            raise ValueError(
                f"the DataLoader's {type(sampler).__name__} gives rank {sampler.rank} of {sampler.num_replicas} its "
                f"share, but this is rank {rank} of {num_replicas}. Use no sampler: the loader shares the data out"
            )
        return loader, None
    if num_replicas == 1 or isinstance(loader.dataset, IterableDataset):
        return loader, None
    part = Share(loader.sampler if batches is None else batches, rank, num_replicas)
    cut: dict[str, Any] = {"batch_size": None, "sampler": part} if batches is None else {"batch_sampler": part}
    same = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    return DataLoader(loader.dataset, **cut, **same), part.counted
