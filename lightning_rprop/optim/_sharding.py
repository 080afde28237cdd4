"""How tensors are stored: on which device, in plain memory or as shards on several processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rprop._torch import FSDP_MARK

# Types whose values are exactly what their memory holds.
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, without importing ``torch.distributed.tensor``."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def is_slice(param: Any) -> bool:
    """Return whether a parameter belongs to FullyShardedDataParallel, which gives each process a slice of it."""
    return hasattr(param, FSDP_MARK)


def local(tensor: Any) -> Any:
    """Return the local shard of a DTensor; other tensors are returned unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # so that the shard is not a copy tracked by autograd
        return tensor.to_local()


def whole(tensor: Any) -> Any:
    """Gather a DTensor with a collective; other tensors are returned unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def stored(tensor: Any) -> Any:
    """Return the slice of a parameter of DeepSpeed ZeRO stage 3; other tensors are returned unchanged."""
    return getattr(tensor, "ds_tensor", tensor)


def fully_sharded(module: nn.Module) -> list[Any]:
    """Return the submodules, also the module itself, that ``fully_shard`` was called with."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # nobody has sharded a module
        return []
    return [each for each in module.modules() if isinstance(each, fsdp.FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Free the whole parameters that an evaluation has gathered, so that the next one gathers the shards again.

    Without a backward pass, ``fully_shard`` keeps those of the root module. DeepSpeed ZeRO stage 3 keeps small ones.
    """
    for each in fully_sharded(module):
        each.reshard()
    param: Any
    for param in module.parameters():
        is_whole = hasattr(param, "ds_tensor") and param.ds_status.name == "AVAILABLE"
        if is_whole and not param.ds_active_sub_modules:  # which a failed evaluation leaves
            param.partition()


def aligned(grad: Any, param: Any) -> Any:
    """Return the gradient with its parameter's placement.

    They nearly always agree. Partial sums, as tensor parallelism leaves them, are added up with a collective.
    """
    if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def placed(value: Tensor, param: Tensor) -> Tensor:
    """Return a state tensor with its parameter's placement; a full tensor is cut without communication."""
    if is_sharded(param) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return value


def replicated(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a value that is the same on every process so that it can be combined with a tensor, sharded or not."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the host can read a tensor without waiting for an accelerator."""
    return tensor.is_cpu


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of the tensor in which a complex number is two real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def rows(values: Tensor, param: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs to the local shard of a parameter with the same first dimension.

    A parameter that is not sharded along its first dimension has all of it.
    """
    if not is_sharded(param):
        return values
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [placement if placement.is_shard(0) else Replicate() for placement in param.placements]  # type: ignore[attr-defined]
    return local(distribute_tensor(whole(values), param.device_mesh, placements, src_data_rank=None))  # type: ignore[attr-defined, no-any-return]
