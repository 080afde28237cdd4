"""Parameters that are spread over processes (DTensor): each process updates the part that it holds, and no other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rprop.optim._fused import PLAIN


def is_sharded(tensor: Any) -> bool:
    """Tell a DTensor, without importing what it takes."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def is_slice(param: Any) -> bool:
    """Tell a parameter of which FullyShardedDataParallel leaves each process a slice, by the mark that torch sets."""
    return hasattr(param, "_fsdp_flattened")


@torch.no_grad()  # in which a part is the memory itself
def local(tensor: Any) -> Any:
    """Give the part of a DTensor that is here, and any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Any:
    """Give all of a DTensor, by a collective, and any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def aligned(grad: Any, param: Any) -> Any:
    """Give a gradient the placement of its parameter, which it nearly always has.

    One that tensor parallelism left as partial sums is added up, by a collective, as it must be somewhere.
    """
    if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def placed(value: Tensor, param: Tensor) -> Tensor:
    """Give a state the placement of its parameter: one that was saved whole is cut, without communication."""
    if is_sharded(param) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return value
