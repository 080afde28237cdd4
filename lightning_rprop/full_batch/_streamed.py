"""Batches that are read again on each pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_convert

from lightning_rprop._torch import shut_down_workers
from lightning_rprop.full_batch._batches import Place, checksum, count_samples, equal, leaves, mapped
from lightning_rprop.full_batch._samplers import batch_sizes, order_of, share


class Streamed:
    """A data set that is read again on each pass.

    Args:
        batches: A DataLoader, or an iterable of ready batches.
    """

    num_samples: int | None = None

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def fingerprint(self) -> dict[str, str]:
        """Return the values that must agree between ranks, among them the checksum of three samples of a data set."""
        if not isinstance(self.batches, DataLoader) or isinstance(self.batches.dataset, IterableDataset):
            return {}  # each rank has its own data
        dataset: Any = self.batches.dataset
        length = len(dataset)
        found = {"the number of samples": str(length), "the batch size": str(self.batches.batch_size)}
        found["the order of the samples"] = order_of(self.batches)
        with suppress(Exception):  # the sampler may yield indices of another kind
            indices = sorted({0, length // 2, length - 1})
            reads = [default_convert([dataset[i] for i in indices]) for _ in range(2)]  # type: ignore[no-untyped-call]
            if equal(*reads):
                found["the checksum of the data"] = checksum(leaf for _, leaf in leaves("", reads[0]))
        return found

    def whole(self, micro_batch_size: int | None) -> StreamedPart:
        """Take all batches."""
        return StreamedPart(self.batches, sizes=self._sizes())

    def share(self, rank: int, num_replicas: int, micro_batch_size: int | None, place: Place) -> StreamedPart:
        """Take every ``num_replicas``-th batch of a DataLoader, or all batches of another iterable."""
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
    """One rank's batches, each with its number of samples as in ``HeldPart``.

    Compares the first batches of the first two passes and warns if the data change from pass to pass.

    Args:
        batches: Yields the batches of one pass.
        counted: The number of batches that count; ``None`` for all.
        every: ``(rank, num_replicas)`` to take every ``num_replicas``-th batch only.
        sizes: The DataLoader's number of samples per batch, as a list or an upper bound; ``None`` if unknown.
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
        self.leaves: list[Tensor] = []
        self._counted = counted
        self._every = every
        self._sizes = sizes
        self._first: Any = None
        self._passes = 0

    def begin_pass(self) -> bool:
        """Return False: a batch that was read never becomes stale."""
        return False

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Iterate over the micro-batches of a pass."""
        self._passes += 1
        is_over = False  # only a stream's last batch may be short; with workers, each worker's last
        for i, (batch, counts) in enumerate(self._own()):
            if i == 0:
                self._compare(batch)
            size = self._size(i, batch) if counts else 0
            yield batch, -1 if is_over else size
            if isinstance(self._sizes, int) and not self.batches.num_workers:
                is_over = size < self._sizes

    def _own(self) -> Iterator[tuple[Any, bool]]:
        """Iterate over this rank's batches and whether each counts; every rank has the same number."""
        if self._every is None:
            for i, batch in enumerate(self.batches):
                yield batch, self._counted is None or i < self._counted
            return
        rank, num_replicas = self._every
        first, total = None, 0
        for total, batch in enumerate(self.batches, start=1):
            first = batch if total == 1 else first
            if (total - 1) % num_replicas == rank:
                yield batch, True
        if 0 < total % num_replicas <= rank:
            yield first, False

    def _size(self, i: int, batch: Any) -> int:
        size = count_samples(batch)
        if isinstance(self._sizes, int):
            return size if size <= self._sizes else -1
        # a length other than the DataLoader's may be that of a time axis
        return size if self._sizes is None or self._sizes[i : i + 1] == [size] else -1

    def end_pass(self) -> None:
        """Do nothing; the counterpart of ``HeldPart.end_pass()``."""

    def close(self) -> None:
        """Shut down persistent workers, as Lightning does after a fit."""
        if isinstance(self.batches, DataLoader):
            shut_down_workers(self.batches)

    def _compare(self, batch: Any) -> None:
        if self._passes == 1:
            self._first = mapped(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        elif self._passes == 2:
            if not equal(self._first, batch):
                rank_zero_warn(
                    "the training data are not the same at the second step as at the first: they are shuffled or "
                    "augmented. The gradient is then noisy from step to step, which Rprop cannot average out. Read "
                    "them in a fixed order, and augment once before training"
                )
            self._first = None
