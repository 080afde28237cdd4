"""Memory for the intermediate results of one large parameter at a time, shared by all parameters of a step.

A step that runs out of memory does so when this is reserved, while all parameters are as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Space(NamedTuple):
    """Tensors to compute into by ``out=``; ``None`` stands for a new tensor."""

    sign: Tensor | None = None
    size: Tensor | None = None
    kept: Tensor | None = None
    flipped: Tensor | None = None
    mask: Tensor | None = None
    gradient: Tensor | None = None
    distance: Tensor | None = None


NEW = Space()

_MASKS = ("flipped", "mask")

# What is reserved on a device for a dtype: how many elements, and where.
Scratch: TypeAlias = dict[tuple[torch.device, torch.dtype], tuple[int, Space]]


def reserve(scratch: Scratch, param: Tensor, names: Sequence[str]) -> None:
    """Allocate memory for a parameter, as far as it is not there.

    Args:
        scratch: What is reserved already; modified.
        param: A parameter.
        names: The fields of :class:`Space` that are needed.
    """
    key = param.device, param.dtype
    reserved, space = scratch.pop(key, (0, NEW))
    numel = max(reserved, param.numel())
    for name in Space._fields:
        tensor = getattr(space, name)
        if name in names if tensor is None else reserved < numel:
            del tensor
            space = space._replace(**{name: None})  # free what is there first
            dtype = torch.bool if name in _MASKS else param.dtype
            space = space._replace(**{name: torch.empty(numel, dtype=dtype, device=param.device)})
    scratch[key] = numel, space


def take(scratch: Scratch, param: Tensor) -> Space:
    """Return memory for the intermediate results of a parameter, which take their shapes by being computed."""
    _, space = scratch[param.device, param.dtype]
    for tensor in space:
        if tensor is not None:
            tensor.resize_(0)  # else torch warns when it gives an output another shape
    return space
