"""The loader: what a full batch is, how it is cut, and how often an epoch has it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rprop.full_batch._sources import make_source


class MicroBatch(NamedTuple):
    """A part of a full batch."""

    data: Any
    size: int
    """Samples in it; 0 for one that only keeps a rank in step with the others; -1 where they cannot be counted."""
    is_last: bool
    """Whether the rank's pass ends with it."""


class FullBatchLoader:
    """A training data loader whose batches are optimizer steps over the whole data set.

    Together with :class:`~lightning_rprop.FullBatch`: the Trainer gets ``steps_per_epoch`` batches an epoch, each of
    which is a whole pass over ``data``; progress bar, ``max_steps``, ``limit_train_batches``, ``val_check_interval``
    and callbacks count optimizer steps. It is not a ``DataLoader``, so that Lightning puts no sampler into it: the
    ranks share the samples without repeating or dropping any.

    Without micro-batches it can be iterated without the callback too, as it is for a validation: every rank then sees
    all of the data.

    Args:
        data: The data set, the same on every rank:

            - tensors of shape ``(samples, ...)``, alone or in tuples, lists, dicts or dataclasses, nested if you like;
              they are held, once, and a rank holds only its share. What is written to them between two steps (moved
              collocation points) is seen by the next step, unless it goes past torch's version counter and the data are
              copied to another device or dtype. Sparse tensors, tensors of different lengths, and objects
              with a method ``to()`` (a graph of PyTorch Geometric) are held as a whole, on one device;
            - a map-style ``Dataset``, collated once and then held likewise;
            - a ``DataLoader``, for data that do not fit in memory: its batches are the micro-batches, read again at
              each step and shared among the ranks. A subclass with its own ``__iter__`` is read to the end by every
              rank, which takes every so many batches;
            - an ``IterableDataset`` of samples (of ready batches with ``micro_batch_size=None``) or another iterable of
              ready batches, of any length; under several ranks it gives each rank its own, at least one, and under FSDP
              and DeepSpeed, whose ranks wait for each other at each micro-batch, as many as the others.
        micro_batch_size: Samples of a micro-batch at most; ``None`` takes a rank's whole share at once. The sizes of
            one share differ by no more than one. It bounds the memory of activations and changes the gradient by no
            more than its rounding.
        steps_per_epoch: Optimizer steps of one Lightning epoch. More than one spares the costs of an epoch's end: a
            validation, a checkpoint and the epoch's logs.
        device: Where held tensors lie; ``None`` is the Trainer's device, ``"cpu"`` leaves them in (pinned) host memory
            from which each micro-batch is brought to the device.

    Raises:
        TypeError: If ``data`` is or contains something else.
        ValueError: If an argument is out of its range, ``data`` is a list that may be samples as well as the parts of
            one batch, tensors have no samples, or a DataLoader's sampler shuffles, repeats or leaves out samples.

    Example:
        >>> x = torch.linspace(-1, 1, 10).unsqueeze(1)
        >>> loader = FullBatchLoader((x, x.sin()), micro_batch_size=4, steps_per_epoch=100)
        >>> [micro_batch.size for micro_batch in loader.micro_batches()]
        [3, 3, 4]
    """

    def __init__(
        self,
        data: Any,
        micro_batch_size: int | None = None,
        steps_per_epoch: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        if micro_batch_size is not None and (not _is_int(micro_batch_size) or micro_batch_size < 1):
            raise ValueError(f"micro_batch_size must be a number of samples >= 1, or None, got {micro_batch_size!r}")
        if not _is_int(steps_per_epoch) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be a number of steps >= 1, got {steps_per_epoch!r}")
        self.micro_batch_size = micro_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.device = None if device is None else torch.device(device)
        self._source = make_source(data, micro_batch_size)
        self._serve_nobody()

    def _serve_nobody(self) -> None:
        self._part = self._source.whole(self.micro_batch_size)
        self._served = False  # whether a FullBatch takes care of what the batches leave out
        self._begun: tuple[MicroBatch, Iterator[MicroBatch]] | None = None  # the pass whose first the Trainer has
        self._is_current = True  # whether what the Trainer has is what the next pass would begin with

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is served by nobody."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_part", "_begun")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy."""
        self.__dict__.update(state)
        self._serve_nobody()

    @property
    def num_samples(self) -> int | None:
        """How many samples all ranks have together; ``None`` for what is read again at each pass, and for objects."""
        return self._source.num_samples

    def check_begun(self) -> None:
        """Refuse a Trainer's batch that is not ours, or was written to; called by :class:`~lightning_rprop.FullBatch`.

        Raises:
            RuntimeError: If the batch does not come from here, or Lightning's transfer hooks wrote to the held data.
        """
        if self._begun is None:
            raise RuntimeError("FullBatch found that the Trainer's batch does not come from its FullBatchLoader")
        self._part.end_pass()

    def fingerprint(self) -> dict[str, str]:
        """Return what must be the same on every rank, by name; called by :class:`~lightning_rprop.FullBatch`."""
        kind = type(self._source).__name__.lower()
        return {
            "what is done with the data": kind,
            "micro_batch_size": str(self.micro_batch_size),
            "steps_per_epoch": str(self.steps_per_epoch),
            **self._source.fingerprint(),
        }

    def lies_on(self, device: torch.device) -> bool:
        """Return whether all micro-batches are held on this device."""
        leaves = self._part.leaves
        return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.device == device for leaf in leaves)

    def share(
        self,
        rank: int = 0,
        num_replicas: int = 1,
        device: torch.device | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Take one rank's share of the data from now on; called by :class:`~lightning_rprop.FullBatch`.

        Args:
            rank: Which share.
            num_replicas: How many there are.
            device: The device of the model, to which held tensors are brought unless the loader was given another.
            convert: Brings held tensors to the dtype of the model; ``None`` leaves them as they are.

        Raises:
            ValueError: If the data cannot be cut, or a DistributedSampler is another rank's.
        """
        where, on_gpu = self.device or device, device is not None and device.type == "cuda"

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf if where is None else leaf.to(where)
            leaf = leaf if convert is None else convert(leaf)
            leaf = leaf if where is None else leaf.to(where)
            pinned = on_gpu and leaf.device.type == "cpu" and leaf.layout is torch.strided
            return leaf.pin_memory() if pinned else leaf

        self._part = self._source.share(rank, num_replicas, self.micro_batch_size, place)
        self._served = True

    def release(self) -> None:
        """Give up the share, and a pass that has begun."""
        self._part.close()
        self._serve_nobody()

    def micro_batches(self) -> Generator[MicroBatch, None, None]:
        """Make one pass over this rank's share.

        Yields:
            The micro-batches, one read ahead, so that the last is known as such.

        Raises:
            RuntimeError: If there is none, or if held data were written to in place during the pass.
        """
        self._part.begin_pass()
        ahead = iter(self._part)
        try:
            data, size = next(ahead)
        except StopIteration:
            raise RuntimeError(
                "the training data gave this rank no batch: an iterable must start over at each step, and give every "
                "rank at least one batch"
            ) from None
        for after in ahead:
            yield MicroBatch(data, size, is_last=False)
            data, size = after
        yield MicroBatch(data, size, is_last=True)
        self._part.end_pass()

    def next_pass(self) -> tuple[Generator[MicroBatch, None, None], bool]:
        """Make the pass that the Trainer's batch begins, or another; called by :class:`~lightning_rprop.FullBatch`.

        Returns:
            The micro-batches, and whether the first is what the Trainer's batch was made of.
        """
        if self._part.begin_pass():
            self._begun, self._is_current = None, False
        if self._begun is None:
            return self.micro_batches(), self._is_current
        (first, rest), self._begun = self._begun, None
        return _continued(first, rest), self._is_current

    def __len__(self) -> int:
        """Count the optimizer steps of an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the steps of an epoch: the first micro-batch of each pass, which ``FullBatch`` completes."""
        for _ in range(self.steps_per_epoch):
            if not self._served and not self._part.single:
                raise RuntimeError(
                    "a FullBatchLoader with micro-batches gives only the first of them where it is iterated without "
                    "FullBatch. In fit use Trainer(callbacks=[lightning_rprop.FullBatch()]); for validate, test, "
                    "predict, tuners and finders use micro_batch_size=None or a DataLoader; in your own loop iterate "
                    "over loader.micro_batches()"
                )
            rest = self.micro_batches()
            first = next(rest)
            self._begun, self._is_current = (first, rest), True
            yield first.data

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: nothing, as every step is the same pass; so Lightning need not warn."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""


def _continued(first: MicroBatch, rest: Iterator[MicroBatch]) -> Generator[MicroBatch, None, None]:
    yield first
    yield from rest


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's too
