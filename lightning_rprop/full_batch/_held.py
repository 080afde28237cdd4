"""Data that are held in memory; their micro-batches are views."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_rprop._torch import version_of
from lightning_rprop.full_batch._batches import Place, checksum, count_samples, is_movable, leaves, mapped


class Held:
    """A data set that is held in memory.

    Args:
        data: Tensors of shape ``(samples, ...)``, in tuples, lists, dicts or dataclasses; or objects with ``to()``.

    Raises:
        TypeError: If a leaf is neither.
        ValueError: If a tensor has no samples or requires a gradient.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.leaves = dict(leaves("data", data))
        lengths = [_check_leaf(path, leaf) for path, leaf in self.leaves.items()]
        if not lengths:
            raise ValueError(f"data has no tensor in it: {data!r}")
        if 0 in lengths:
            raise ValueError("data has no samples: one of its tensors has length 0")
        self.num_samples: int | None = lengths[0]
        # the reason why it cannot be cut, if any
        self.whole_only = ""
        if len(set(lengths)) > 1 and None not in lengths:
            each = ", ".join(f"{path} {length}" for path, length in zip(self.leaves, lengths, strict=True))
            self.whole_only = f"tensors of different lengths ({each})"
        for path, leaf in self.leaves.items():
            if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
                kind = leaf.layout if isinstance(leaf, Tensor) else f"an object of type {type(leaf).__name__}"
                self.whole_only = f"{path}, {kind},"

    def fingerprint(self) -> dict[str, str]:
        """Return the values that must agree between ranks: the number of samples and a checksum of the data."""
        return {
            "the number of samples": str(self.num_samples),
            "the checksum of the data": checksum(leaf for _, leaf in sorted(self.leaves.items(), key=itemgetter(0))),
        }

    def whole(self, micro_batch_size: int | None) -> HeldPart:
        """Cut all samples into micro-batches."""
        return self.share(0, 1, micro_batch_size, lambda leaf: leaf)

    def share(self, rank: int, num_replicas: int, micro_batch_size: int | None, place: Place) -> HeldPart:
        """Cut one rank's contiguous share, without padding, into the same number of micro-batches on every rank."""
        if self.whole_only:
            if num_replicas > 1 or micro_batch_size is not None:
                ranks = f" or shared among {num_replicas} ranks" if num_replicas > 1 else ""
                raise ValueError(
                    f"{self.whole_only} cannot be cut into micro-batches{ranks}: the gradient would be wrong. Use "
                    "micro_batch_size=None on one device, tensors of the same length (with a column of weights that "
                    "is 0 for padding), or a DataLoader of ready batches"
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
    """One rank's share of the held data.

    Iterating makes one pass over the micro-batches, each with its number of samples. This number is 0 for a sample that
    does not count and only keeps the rank in step with the others, and -1 if the samples cannot be counted.

    Args:
        held: All of the data.
        own: The rank's share.
        cuts: Begin and end of each micro-batch in the share.
        place: Brings the share to the device and dtype of the model.
    """

    def __init__(self, held: Held, own: slice, cuts: list[tuple[int, int]], place: Place) -> None:
        self.single = len(cuts) == 1
        self._held, self._own, self._cuts, self._place = held, own, cuts, place
        self._take()
        self._versions = [*map(_version, self._watched)]

    def _take(self) -> None:
        own = mapped(self._held.data, partial(_cut, part=self._own))
        self.data = mapped(own, self._place)
        self.leaves = [leaf for _, leaf in leaves("data", self.data)]
        views = [leaf for _, leaf in leaves("data", own)]
        copies = [leaf for leaf, view in zip(self.leaves, views, strict=True) if leaf is not view]
        # training_step may write to the copies; a view shares its version with its base
        self._watched = [leaf for leaf in (*self._held.leaves.values(), *copies) if isinstance(leaf, Tensor)]

    def begin_pass(self) -> bool:
        """Refresh the share if the data were written to since the last pass; return whether they were."""
        if [*map(_version, self._watched)] == self._versions:
            return False
        self._take()
        self._versions = [*map(_version, self._watched)]
        return True

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Iterate over the micro-batches of a pass."""
        for low, high in self._cuts:
            part = slice(low, high) if high > low else slice(0, 1)
            if self.single and high != low:
                part = slice(None)  # right for tensors of different lengths too
            # new views, so that training_step cannot change the flags or containers of the next pass
            yield mapped(self.data, partial(_cut, part=part)), high - low

    def end_pass(self) -> None:
        """Raise an error if the data were written to during the pass."""
        if [*map(_version, self._watched)] != self._versions:
            raise RuntimeError(
                "the training data were written to in place during a step: they are held, not copied, and every later "
                "step would see the change. Work on a copy, as in x = x.clone()"
            )

    def close(self) -> None:
        """Do nothing; the counterpart of ``StreamedPart.close()``."""


def _cut(leaf: Any, part: slice) -> Any:
    return leaf[part] if isinstance(leaf, Tensor) and leaf.layout is torch.strided else leaf


def _version(tensor: Tensor) -> tuple[int, int]:
    """Return values that change when a tensor is written to or gets other memory."""
    pointer = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return version_of(tensor), pointer


def _check_leaf(path: str, leaf: Any) -> int | None:
    """Return the number of samples of a leaf, or None for an object, whose samples are unknown."""
    if is_movable(leaf):
        return None
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{path} must be a tensor, got {type(leaf).__name__}: use torch.as_tensor or leave it out, or give a "
            "DataLoader, whose batches may hold anything"
        )
    if leaf.is_nested and leaf.layout is torch.strided:
        raise TypeError(f"{path} is a nested tensor whose samples cannot be counted. Use layout=torch.jagged")
    if leaf.ndim == 0:
        raise ValueError(f"{path} has no dimension of samples, its shape is (). Give a tensor of shape (samples, ...)")
    if leaf.requires_grad:
        raise ValueError(f"{path} requires a gradient, but training data are constants: use detach()")
    return len(leaf)
