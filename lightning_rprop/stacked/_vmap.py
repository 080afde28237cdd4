"""Evaluates the members by ``torch.vmap``, with clear errors for the modules that it cannot run."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_rprop._torch import tensor_dicts, tree_map, version_of

# What torch's message contains, and the remedy.
_DERIVATIVES = (
    "Compute derivatives inside the module with torch.func.grad or torch.func.jacrev, or outside of it from an input "
    "of forward_each"
)
_REMEDIES = {
    "randomness": "Use Stacked(..., randomness='different') for other random numbers in each member, or 'same'",
    "must only return Tensors": "Return a tensor, or a tuple, list or dict of tensors",
    ".item()": "Keep the value a tensor",
    "data-dependent control flow": "Use torch.where in place of if",
    "requires_grad_()": _DERIVATIVES,
    "does not require grad": _DERIVATIVES,
}
_OTHER = "Replace the operation by one that torch.vmap supports, or train separate modules"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def evaluate(
    base: nn.Module,
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    each: bool,
    randomness: str,
    chunk_size: int | None,
) -> Any:
    """Evaluate members.

    Args:
        base: A member, with any parameters and buffers.
        params: The stacked parameters of the members.
        buffers: Their stacked buffers.
        inputs: Positional arguments of the members' ``forward``.
        kwargs: Keyword arguments.
        each: Whether each member has its own inputs, along the first dimension of the tensors.
        randomness: As in ``torch.vmap``.
        chunk_size: As in ``torch.vmap``.

    Returns:
        The outputs, with the members along their first dimension.

    Raises:
        RuntimeError: If ``torch.vmap`` cannot run the module, or if it writes to a buffer.
    """
    # vmap would lose a new buffer, and could not undo a change in place if it fails later
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    versions = {name: version_of(copy) for name, copy in copies.items()}
    slots = _slots(base)
    replaced: set[str] = set()

    def call(tensors: dict[str, Tensor], inputs: Any, kwargs: Any) -> Any:
        values = {slot: tensors[name] for slot, name in slots.items()}
        outputs = functional_call(base, values, inputs, kwargs, tie_weights=False)
        replaced.update(slot for slot, name in slots.items() if values[slot] is not tensors[name])
        return outputs

    dims = tree_map(lambda x: 0 if each and isinstance(x, Tensor) else None, (inputs, kwargs))
    is_empty = not len(next(iter(params.values())))  # the shard of a process without members
    run = torch.vmap(call, (0, *dims), randomness=randomness, chunk_size=None if is_empty else chunk_size)
    try:
        outputs = run({**params, **copies}, inputs, kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        first = tree_map(lambda x, dim: x if dim is None else x[dim], (inputs, kwargs), dims)
        if not is_empty:  # if the inputs are wrong, this raises the error of the member itself
            call({name: tensor[0] for name, tensor in {**params, **copies}.items()}, *first)
        text = str(error)
        remedy = next((remedy for part, remedy in _REMEDIES.items() if part in text), _OTHER)
        raise _refusal(base, _name_of_failed(error, base), text.rstrip(". "), remedy) from error
    replaced.update(name for name, copy in copies.items() if version_of(copy) != versions[name])
    if replaced:
        name, _, buffer = min(replaced).rpartition(".")
        problem = f"its forward changes the buffer {buffer!r}, but an evaluation must not change the members"
        raise _refusal(base, name, problem, "Return the new value from forward, or compute it outside the module")
    return outputs


def _slots(base: nn.Module) -> dict[str, str]:
    """Return the names of the parameters and buffers by where they are; tied ones have one name and several places.

    With the names of ``named_parameters(remove_duplicate=False)``, functional_call would not restore the parameters of
    a module that has two names (torch 2.13).
    """
    names = {id(tensor): name for name, tensor in [*base.named_parameters(), *base.named_buffers()]}
    return {
        f"{prefix}.{key}".lstrip("."): names[id(tensor)]
        for prefix, home in tensor_dicts(base)
        for key, tensor in home.items()
        if tensor is not None
    }


def _name_of_failed(error: Exception, base: nn.Module) -> str:
    """Return the name of the innermost module in which an error was raised; empty for the base itself."""
    names: dict[int, str] = {id(module): name for name, module in base.named_modules()}
    owners = (id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return ["", *(names[owner] for owner in owners if owner in names)][-1]


def _refusal(base: nn.Module, name: str, problem: str, remedy: str) -> RuntimeError:
    """Return the error for a module that cannot be run."""
    module = base.get_submodule(name)
    kind = type(module).__name__
    if isinstance(module, _BATCH_NORMS):
        remedy = "Use GroupNorm or LayerNorm, track_running_stats=False, or eval()"
    which = f"{name!r} ({kind})" if name else kind
    return RuntimeError(f"Stacked cannot run the module {which}: {problem}. {remedy}.")
