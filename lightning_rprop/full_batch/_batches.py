"""Batches as trees: containers of tensors and of other leaves."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Brings a tensor, or an object with a to() method, to the device and dtype of the model.
Place = Callable[[Any], Any]


def is_movable(data: Any) -> bool:
    """Return whether this is a batch object that moves as a whole, such as a PyTorch Geometric graph."""
    return callable(getattr(data, "to", None)) and not isinstance(data, Tensor | torch.nn.Module | type)


def is_dataclass(data: Any) -> bool:
    """Return whether this is an instance of a dataclass without its own ``to()``."""
    return dataclasses.is_dataclass(data) and not isinstance(data, type) and not is_movable(data)


def leaves(path: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves of a batch, each with the expression that selects it."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from leaves(f"{path}[{key!r}]", value)
    elif isinstance(data, list | tuple) and not is_movable(data):
        for i, value in enumerate(data):
            yield from leaves(f"{path}[{i}]", value)
    elif is_dataclass(data):
        names = {field.name for field in dataclasses.fields(data)}
        attributes = getattr(data, "__dict__", {}).items()
        if more := [name for name, value in attributes if isinstance(value, Tensor) and name not in names]:
            raise TypeError(f"{path}.{more[0]} is a tensor but not a field of {type(data).__name__}: make it a field")
        for field in dataclasses.fields(data):
            yield from leaves(f"{path}.{field.name}", getattr(data, field.name))
    else:
        yield path, data


def mapped(data: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to each leaf, in new containers."""
    if isinstance(data, Tensor):
        return function(data)
    if type(data) in (tuple, list):
        return type(data)([mapped(value, function) for value in data])
    if isinstance(data, Mapping):
        items = {key: mapped(value, function) for key, value in data.items()}
        if type(data) is dict:
            return items
        if isinstance(data, defaultdict):
            return type(data)(data.default_factory, items)
        rebuild: Any = type(data)
        return rebuild(items)
    if isinstance(data, list | tuple) and not is_movable(data):
        values = [mapped(value, function) for value in data]
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)
    if is_dataclass(data):
        result: Any = copy.copy(data)
        for field in dataclasses.fields(data):  # bypass a frozen class's setter, and __init__
            object.__setattr__(result, field.name, mapped(getattr(data, field.name), function))
        return result
    return function(data)


def copied_containers(batch: Any) -> Any:
    """Return a batch with the same tensors in new containers."""
    return mapped(batch, lambda leaf: leaf)


def count_samples(batch: Any) -> int:
    """Return the number of samples: the first dimension of the tensors, and ``num_graphs`` of graphs.

    Returns:
        The number, or -1 if the leaves disagree or there are none.
    """
    values = [leaf for _, leaf in leaves("batch", batch)]
    graphs = {int(leaf.num_graphs) for leaf in values if hasattr(leaf, "num_graphs")}
    lengths = {len(leaf) for leaf in values if isinstance(leaf, Tensor) and leaf.ndim} | graphs
    return lengths.pop() if len(lengths) == 1 else -1


def checksum(values: Iterable[Any]) -> str:
    """Return a checksum of tensors, numbers and strings; other objects only count by their tensors."""
    result = 0
    for leaf in values:
        data: Any = b""
        if isinstance(leaf, Tensor):
            dense = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
            data = dense.resolve_conj().resolve_neg().cpu().contiguous().flatten()
            data = data.view(torch.uint8).numpy() if data.numel() else b""
        elif isinstance(leaf, int | float | complex | str | bytes):
            data = repr(leaf).encode()
        elif hasattr(leaf, "__dict__"):
            data = checksum(value for _, value in leaves("", vars(leaf)) if isinstance(value, Tensor)).encode()
        result = zlib.crc32(data, result)
    return f"{result:08x}"


def equal(a: Any, b: Any) -> bool:
    """Return whether two batches hold equal tensors; NaN equals NaN, and other leaves are ignored."""
    pairs = zip(leaves("", a), leaves("", b), strict=False)
    return all(
        x.shape == y.shape and checksum([x]) == checksum([y])
        for (_, x), (_, y) in pairs
        if isinstance(x, Tensor) and isinstance(y, Tensor)
    )
