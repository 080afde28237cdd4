"""Whether gradients and step sizes are within a tolerance, over all shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_rprop.optim._sharding import aligned, as_real, is_on_host, is_sharded, is_slice, local, rows, wide_dtype

# How large the values of a process are; the largest of all processes counts.
_ABSENT, _SMALL, _LARGE = 0, 1, 2


def are_small(
    params: Sequence[Any],
    optimizer: Any,
    tolerance_grad: float | None,
    tolerance_step: float | None,
    n: int | None = None,
) -> tuple[Any, Any]:
    """Return whether all gradient entries, and whether all step sizes, are at most their tolerance.

    Args:
        params: At least one parameter. If the first one is on an accelerator, nothing is copied to the host.
        optimizer: The optimizer that has the step sizes; not read if ``tolerance_step`` is ``None``.
        tolerance_grad: For absolute gradient entries; ``None`` skips them.
        tolerance_step: For step sizes; ``None`` skips them.
        n: The number of members, to compare the rows of each; ``None`` compares all entries.

    Returns:
        Two truth values (tensors if on an accelerator; with members always, of shape ``(n,)``), the same on all
        processes: false if skipped, if there are no entries, or if one is NaN.
    """
    grads = [] if tolerance_grad is None else [aligned(p.grad, p) for p in params if p.grad is not None]
    grads.sort(key=Tensor.numel)  # nearly always the smallest one shows that the gradient is large
    step_sizes = [] if tolerance_step is None else _step_sizes(params, optimizer)
    on_host = is_on_host(params[0])
    device = params[0].device
    level: Any = _level if on_host else partial(_level_on_device, device)
    if n is not None:
        level = partial(_levels_of_members, torch.arange(n, device=device))
    levels: list[Any] = [level(grads, tolerance_grad or 0.0), level(step_sizes, tolerance_step or 0.0)]
    if groups := _process_groups(params, optimizer):
        joined = torch.stack(levels) if isinstance(levels[0], Tensor) else torch.tensor(levels)
        if on_host:  # but the processes may communicate from an accelerator, with CPU offload
            joined = joined.to(next((p.device_mesh.device_type for p in params if is_sharded(p)), "cpu"))
        for group in groups:
            dist.all_reduce(joined, dist.ReduceOp.MAX, group)
        levels = joined.tolist() if on_host and n is None else [*joined.to(device)]
    return levels[0] == _SMALL, levels[1] == _SMALL


def _step_sizes(params: Sequence[Tensor], optimizer: Any) -> list[Tensor]:
    """Return the step sizes that exist in this process."""
    state = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer has it inside
    return [state[p]["step_size"] for p in params if "step_size" in state.get(p, ())]


def _entries(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Iterate over the local entries as real tensors, without empty ones."""
    for tensor in tensors:
        part = local(tensor)
        if part.layout is torch.sparse_coo:
            part = part.coalesce().values()
        if part.numel():
            yield as_real(part)


def _level(tensors: Sequence[Tensor], tolerance: float) -> int:
    level = _ABSENT
    for tensor in _entries(tensors):
        low, high = torch.aminmax(tensor)  # the infinity norm takes ten times as long
        if not max(-low.item(), high.item()) <= tolerance:  # also if NaN
            return _LARGE
        level = _SMALL
    return level


def _level_on_device(device: torch.device, tensors: Sequence[Tensor], tolerance: float) -> Tensor:
    parts = [*_entries(tensors)]
    if not parts:
        return torch.full((), _ABSENT, device=device)
    largest = get_total_norm(parts, math.inf).to(device, wide_dtype(parts[0].device))
    return torch.where(largest <= tolerance, _SMALL, _LARGE)


def _levels_of_members(members: Tensor, tensors: Sequence[Tensor], tolerance: float) -> Tensor:
    largest = torch.full_like(members, -1, dtype=wide_dtype(members.device))
    for tensor in tensors:
        part = local(tensor)
        part = as_real(part.to_dense() if part.layout is torch.sparse_coo else part)
        if part.numel():
            most = part.reshape(len(part), -1).abs().amax(1).to(largest)  # aminmax takes four times as long by rows
            here = rows(members, tensor).to(members.device)
            largest[here] = torch.maximum(largest[here], most)
    level = torch.where(largest <= tolerance, _SMALL, _LARGE)  # _LARGE if NaN
    return torch.where(largest < 0, _ABSENT, level)


def _process_groups(params: Sequence[Any], optimizer: Any) -> list[Any]:
    """Return the process groups whose members hold different parts; empty if every process holds everything."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    if hasattr(optimizer, "optim") or any(map(is_slice, params)):
        return [dist.group.WORLD]
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))  # in the same order on all processes
    return [group for mesh in meshes for group in mesh.get_all_groups()]
