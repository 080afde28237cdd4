"""Decide from the user's data whether they are held in memory or read again on each pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lightning_rprop._lightning import is_called
from lightning_rprop.full_batch._batches import equal, is_dataclass, is_movable, leaves
from lightning_rprop.full_batch._held import Held
from lightning_rprop.full_batch._samplers import check_sampler
from lightning_rprop.full_batch._streamed import Streamed


def make_source(data: Any, micro_batch_size: int | None) -> Held | Streamed:
    """Build the source for the data of a ``FullBatchLoader``.

    Args:
        data: The loader's ``data``.
        micro_batch_size: The loader's ``micro_batch_size``.

    Raises:
        TypeError: If the loader does not support this type of data.
        ValueError: If the data are ambiguous, or not the same samples on each pass.
    """
    if isinstance(data, DataLoader):
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} cannot be used with a DataLoader, whose batches are the "
                "micro-batches: leave it None and set the DataLoader's batch_size"
            )
        check_sampler(data)
        return Streamed(data)
    if isinstance(data, IterableDataset):
        return Streamed(DataLoader(data, batch_size=micro_batch_size))
    if isinstance(data, Dataset):
        return Held(_collated(data))
    if isinstance(data, list):
        _check_list(data)
    if isinstance(data, Tensor | Mapping | list | tuple) or is_dataclass(data) or is_movable(data):
        return Held(data)
    if hasattr(data, "__getitem__") and not isinstance(data, Collection):
        return Held(_collated(data))
    if is_called(data, "CombinedLoader"):
        raise TypeError("data is a CombinedLoader, whose batches come from several loaders: give one DataLoader")
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which can be read once only, but every step reads all data. Give an "
            "object whose __iter__ starts over, such as an IterableDataset"
        )
    if isinstance(data, Iterable) and not isinstance(data, str | bytes) and not hasattr(data, "__array__"):
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} cannot be used with an iterable of ready batches, which are the "
                "micro-batches: leave it None"
            )
        return Streamed(data)
    raise TypeError(
        f"data must be a tensor, a tuple, list or dict of tensors (possibly nested), a Dataset or a DataLoader, got "
        f"{type(data).__name__}. For arrays use torch.as_tensor"
    )


def _check_list(data: list[Any]) -> None:
    """Refuse a list whose items could be samples, ready batches or the parts of one batch."""
    if not data:
        return
    samples = "a DataLoader with a collate_fn"
    if all(isinstance(item, Tensor) for item in data):
        shapes = {tuple(item.shape) for item in data}
        if len(shapes) > 1 and len({shape[:1] for shape in shapes}) == 1:
            return  # samples of different shapes cannot be stacked: these are inputs, targets, ...
        if len(shapes) == 1:
            samples = "torch.stack(data)"
    elif len(data) > 1 and len({_structure(item) for item in data}) > 1:
        return
    elif all(isinstance(leaf, Tensor) for _, leaf in leaves("data", data)) and not is_dataclass(data[0]):
        collated = "torch.utils.data.default_collate(data)"
        samples = collated if isinstance(data[0], Mapping) else f"tuple({collated})"
    raise ValueError(
        f"data is a list of {len(data)} {type(data[0]).__name__}, which may be samples, ready batches, or the parts of "
        f"one batch. Give {samples} for samples, DataLoader(data, batch_size=None) for ready batches, tuple(data) for "
        "the parts of one batch"
    )


def _structure(item: Any) -> Any:
    """Return the containers and leaf types of an item, which are the same for all samples of a data set."""
    return type(item), tuple((path, type(leaf)) for path, leaf in leaves("item", item))


def _collated(dataset: Any) -> Any:
    """Return all samples of a map-style dataset, collated as a DataLoader would."""
    if isinstance(dataset, TensorDataset) and all(
        getattr(type(dataset), name, None) is getattr(TensorDataset, name, None)
        for name in ("__getitem__", "__getitems__", "__len__")
    ):
        return dataset.tensors
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{type(dataset).__name__} has no __len__, so its samples are unknown. Add one, or derive the class from "
            "torch.utils.data.IterableDataset"
        )
    length = len(dataset)
    if not length:
        raise ValueError("data has no samples")
    try:
        samples = _fetch(dataset, length)
        if not equal(default_collate(samples[:1]), default_collate(_fetch(dataset, 1))):
            rank_zero_warn(
                f"{type(dataset).__name__} returns a different sample 0 each time, so it augments its data. The loader "
                "uses the first result at every step. To augment, do so once and store the result"
            )
        return default_collate(samples)
    except TypeError as error:
        if "default_collate" not in str(error):
            raise
        raise TypeError(
            f"the samples of {type(dataset).__name__} cannot be collated: {error}. Give a DataLoader with a "
            "collate_fn, FullBatchLoader(DataLoader(dataset, batch_size=..., collate_fn=...))"
        ) from error


def _fetch(dataset: Any, length: int) -> list[Any]:
    """Read the first samples as a DataLoader does."""
    several = getattr(dataset, "__getitems__", None)
    return list(several([*range(length)])) if several else [dataset[i] for i in range(length)]
