"""Memory for the intermediate results of one large parameter at a time, shared by all parameters of a step.

A step that runs out of memory fails while this is reserved, before any parameter has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_rprop.optim._sharding import PLAIN

# Parameters with at most this many elements get new tensors instead: sharing takes a little longer per parameter.
_FEW = 1 << 12

_dtype = attrgetter("dtype")


class Space(NamedTuple):
    """Output tensors for ``out=``; ``None`` allocates a new tensor."""

    sign: Tensor | None = None
    size: Tensor | None = None
    kept: Tensor | None = None
    flipped: Tensor | None = None
    mask: Tensor | None = None
    gradient: Tensor | None = None
    distance: Tensor | None = None


NEW = Space()

_MASKS = ("flipped", "mask")

# The number of elements and the memory that are reserved for each device and dtype.
Scratch: TypeAlias = dict[tuple[torch.device, torch.dtype], tuple[int, Space]]


def is_sharable(row: Sequence[Tensor]) -> bool:
    """Return whether a parameter is large, and ``out=`` works for it and its state: plain tensors of one dtype."""
    return row[0].numel() > _FEW and PLAIN.issuperset(map(type, row)) and len({*map(_dtype, row)}) == 1


def reserve(scratch: Scratch, param: Tensor, names: Sequence[str]) -> None:
    """Allocate the memory that a parameter needs and that is not reserved yet.

    Args:
        scratch: Memory reserved so far; modified in place.
        param: A parameter.
        names: The fields of ``Space`` that are needed.
    """
    key = param.device, param.dtype
    reserved, space = scratch.pop(key, (0, NEW))
    numel = max(reserved, param.numel())
    for name in Space._fields:
        tensor = getattr(space, name)
        if name in names if tensor is None else reserved < numel:
            del tensor
            space = space._replace(**{name: None})  # frees the old tensor first
            dtype = torch.bool if name in _MASKS else param.dtype
            space = space._replace(**{name: torch.empty(numel, dtype=dtype, device=param.device)})
    scratch[key] = numel, space


def take(scratch: Scratch, param: Tensor) -> Space:
    """Return the memory reserved for a parameter; each tensor takes its shape when it is computed."""
    _, space = scratch[param.device, param.dtype]
    for tensor in space:
        if tensor is not None:
            tensor.resize_(0)  # torch warns when out= resizes a tensor that has elements
    return space
