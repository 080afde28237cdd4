"""The data loader whose batches are passes over the whole data set.

``FullBatch`` drives it: ``_fingerprint`` and ``share`` at the start of a fit, ``_check_batch`` and ``_next_pass`` in
each step, and ``_release`` at the end.
"""

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
    """The number of samples; 0 if it only keeps a rank in step with the others; -1 if they cannot be counted."""
    is_last: bool
    """Whether it is the last one of the rank's pass."""


class FullBatchLoader:
    """A training data loader whose batches are optimizer steps over the whole data set.

    Together with ``FullBatch``, the Trainer gets ``steps_per_epoch`` batches per epoch, and each
    batch is one pass over ``data``. So the progress bar, ``max_steps``, ``limit_train_batches``, ``val_check_interval``
    and callbacks count optimizer steps. It is not a ``DataLoader``, so Lightning inserts no sampler: the ranks share
    the samples without repeating or dropping any.

    Without micro-batches it can also be iterated without the callback, for example for validation. Every rank then sees
    all of the data. In your own loop, iterate over ``micro_batches()``.

    Args:
        data: The data set, the same on every rank:

            - Tensors of shape ``(samples, ...)``, possibly nested in tuples, lists, dicts or dataclasses. They are held
              in memory, and each rank holds only its share. Values written to them between two steps (moved collocation
              points) are seen by the next step; a write that bypasses torch's version counter is missed if the data are
              copied to another device or dtype. Sparse tensors, tensors of different lengths, and objects with a
              ``to()`` method (a PyTorch Geometric graph) are held as a whole, on one device.
            - A map-style ``Dataset``, which is collated once and then held in the same way.
            - A ``DataLoader``, for data that do not fit in memory. Its batches are the micro-batches, read again at
              each step and shared among the ranks. If a subclass overrides ``__iter__``, every rank reads all batches
              and uses its share.
            - An ``IterableDataset`` of samples (of ready batches with ``micro_batch_size=None``), or another iterable
              of ready batches. It must yield each rank's own data, at least one batch. Under FSDP and DeepSpeed, whose
              ranks wait for each other at each micro-batch, all ranks need the same number of batches.
        micro_batch_size: Maximum number of samples per micro-batch; ``None`` takes a rank's whole share at once. The
            sizes within a share differ by at most one. It bounds the memory for activations, and changes the gradient
            only by rounding.
        steps_per_epoch: Optimizer steps per Lightning epoch. More than one saves the cost of ending an epoch:
            validation, checkpoint and epoch-level logs.
        device: Where held tensors are kept; ``None`` is the Trainer's device. ``"cpu"`` keeps them in (pinned) host
            memory, and each micro-batch is copied to the device.

    Raises:
        TypeError: If ``data`` is or contains anything else.
        ValueError: If an argument is out of range, ``data`` is a list that could be samples as well as the parts of one
            batch, tensors have no samples, or a DataLoader's sampler shuffles, repeats or leaves out samples.

    Examples:
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
        self._reset()

    def _reset(self) -> None:
        self._part = self._source.whole(self.micro_batch_size)
        self._served = False  # whether a FullBatch evaluates the micro-batches that __iter__ leaves out
        self._open_pass: Generator[MicroBatch, None, None] | None = None  # the one whose first the Trainer has
        self._is_current = True  # whether the Trainer's batch is the first micro-batch of the next pass

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which takes no part in a running fit."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_part", "_open_pass")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
        self._reset()

    @property
    def num_samples(self) -> int | None:
        """The number of samples on all ranks together; ``None`` for streamed data and for objects."""
        return self._source.num_samples

    def share(
        self,
        rank: int = 0,
        num_replicas: int = 1,
        device: torch.device | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Take one rank's share of the data, for your own loop on several processes; ``FullBatch`` does it in ``fit``.

        Args:
            rank: The index of this rank.
            num_replicas: The number of ranks.
            device: The model's device, to which held tensors are moved unless the loader has a ``device``.
            convert: Brings held tensors to the dtype of the model; ``None`` leaves them unchanged.

        Raises:
            ValueError: If the data cannot be cut, or a DistributedSampler belongs to another rank.
        """
        target, on_gpu = self.device or device, device is not None and device.type == "cuda"

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf if target is None else leaf.to(target)
            leaf = leaf if convert is None else convert(leaf)
            leaf = leaf if target is None else leaf.to(target)
            pinned = on_gpu and leaf.device.type == "cpu" and leaf.layout is torch.strided
            return leaf.pin_memory() if pinned else leaf

        self._part = self._source.share(rank, num_replicas, self.micro_batch_size, place)
        self._served = True

    def micro_batches(self) -> Generator[MicroBatch, None, None]:
        """Iterate once over this rank's share.

        Yields:
            The micro-batches. One is read ahead, to know which is the last.

        Raises:
            RuntimeError: If there are none, or if held data were written to in place during the pass.
        """
        self._part.begin_pass()
        ahead = iter(self._part)
        try:
            data, size = next(ahead)
        except StopIteration:
            raise RuntimeError(
                "the training data yielded no batch on this rank. An iterable must restart on every iteration and "
                "yield at least one batch per rank"
            ) from None
        for following in ahead:
            yield MicroBatch(data, size, is_last=False)
            data, size = following
        yield MicroBatch(data, size, is_last=True)
        self._part.end_pass()

    def __len__(self) -> int:
        """Return the number of optimizer steps per epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the steps of an epoch; yields each pass's first micro-batch, ``FullBatch`` adds the others."""
        for _ in range(self.steps_per_epoch):
            if not self._served and not self._part.single:
                raise RuntimeError(
                    "a FullBatchLoader with micro-batches gives only the first of them when it is iterated without "
                    "FullBatch. In fit use Trainer(callbacks=[lightning_rprop.FullBatch()]); for validate, test, "
                    "predict, tuners and finders use micro_batch_size=None or a DataLoader; in your own loop iterate "
                    "over loader.micro_batches()"
                )
            rest = self.micro_batches()
            first = next(rest)
            self._open_pass, self._is_current = _prepend(first, rest), True
            yield first.data

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: every step is the same pass. With this method, Lightning does not warn on resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept the empty state of ``state_dict()``."""

    def _release(self) -> None:
        """Release the share, and drop an open pass."""
        self._part.close()
        self._reset()

    def _check_batch(self) -> None:
        """Raise an error if the Trainer's batch is not this loader's, or if transfer hooks wrote to the held data."""
        if self._open_pass is None:
            raise RuntimeError("FullBatch found that the Trainer's batch does not come from its FullBatchLoader")
        self._part.end_pass()

    def _next_pass(self) -> tuple[Generator[MicroBatch, None, None], bool]:
        """Return the micro-batches of the next pass, and whether the Trainer's batch was made from the first one."""
        if self._part.begin_pass():
            self._open_pass, self._is_current = None, False
        next_pass, self._open_pass = self._open_pass or self.micro_batches(), None
        return next_pass, self._is_current

    def _fingerprint(self) -> dict[str, str]:
        """Return the values that must agree between ranks, by name."""
        kind = type(self._source).__name__.lower()
        return {
            "what is done with the data": kind,
            "micro_batch_size": str(self.micro_batch_size),
            "steps_per_epoch": str(self.steps_per_epoch),
            **self._source.fingerprint(),
        }

    def _is_on(self, device: torch.device) -> bool:
        """Return whether all micro-batches are held on this device."""
        leaves = self._part.leaves
        return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.device == device for leaf in leaves)


def _prepend(first: MicroBatch, rest: Iterator[MicroBatch]) -> Generator[MicroBatch, None, None]:
    yield first
    yield from rest


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # accepts NumPy integers too
