"""Builds the members and stacks their parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_rprop._torch import tensor_dicts, tree_leaves

# Values that decide what a module computes. Objects of other types, such as functions, are compared by their type.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

# What every module has, such as its dicts of hooks.
_INTERNAL = frozenset(vars(nn.Module()))


@torch.no_grad()
def stack(make: Callable[[], nn.Module], n: int) -> nn.Module:
    """Build n modules and stack their parameters and buffers along a new first dimension.

    Args:
        make: Returns a new module.
        n: Number of modules.

    Returns:
        The first module, with the stacked parameters and buffers in place of its own.

    Raises:
        TypeError: If ``make`` returns anything but a module.
        ValueError: If the modules are not new, differ in more than values, have no or lazy parameters, or have
            parameters in other attributes too.
    """
    first = _made(make)
    _check_no_aliases(first)
    own, modules, outline = list(_tensors(first)), {*first.modules()}, _outline(first)
    stacks: dict[int, Tensor] = {}
    for _, tensor in own:
        # member by member, so that only one more of them is in memory
        stacks[id(tensor)] = torch.empty((n, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        stacks[id(tensor)][0].copy_(tensor)
    for i in range(1, n):
        member = _made(make)
        if not modules.isdisjoint(member.modules()):
            raise ValueError(
                f"make returned a module of member 0 again for member {i}. Build all modules inside make, so that each "
                "call returns a new one."
            )
        _check_alike(outline, _outline(member), i)
        for (_, tensor), (_, other) in zip(own, _tensors(member), strict=True):
            stacks[id(tensor)][i].copy_(other)
    stacks |= {id(p): nn.Parameter(stacks[id(p)], p.requires_grad) for p in first.parameters()}
    for _, home in tensor_dicts(first):
        home.update({name: stacks[id(tensor)] for name, tensor in home.items() if tensor is not None})
    return first


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    module = make()
    if not isinstance(module, nn.Module):
        raise TypeError(f"make must return a torch.nn.Module, got {type(module).__name__}. Return the model itself.")
    if lazy := [name for name, tensor in _tensors(module) if is_lazy(tensor)]:
        raise ValueError(
            f"make returned a module whose {lazy[0]!r} is not initialized yet. Call the module once in make before "
            "returning it, or use layers that are not lazy."
        )
    if next(module.parameters(), None) is None:
        raise ValueError(f"make returned a {type(module).__name__} without parameters. Return the model to train.")
    return module


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters and buffers, tied ones once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_no_aliases(module: nn.Module) -> None:
    """Check that the module finds its parameters by their names only, because they are replaced there."""
    known = {id(tensor) for _, tensor in _tensors(module)}
    for name, value in _attributes(module).items():
        if any(id(leaf) in known for leaf in tree_leaves(value)):
            raise ValueError(
                f"make returned a module whose attribute {name!r} holds parameters or buffers, which would not be "
                "replaced there by stacked ones. Let forward find them by their names, or use nn.ParameterList; "
                "recurrent layers of torch.nn are not supported."
            )


def _check_alike(outline: Mapping[str, Any], other: Mapping[str, Any], i: int) -> None:
    """Check that the outline of member i is that of the first one."""
    for what, a in outline.items():
        b = other[what]
        if key := next((key for key in {**a, **b} if not _is_same(a.get(key), b.get(key))), None):
            raise ValueError(
                f"make returned different {what}: {key} is {_shown(b.get(key))} in member {i}, but "
                f"{_shown(a.get(key))} in member 0. Make all members alike; what differs between them must be a "
                "parameter or a buffer."
            )


def _outline(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return all of a module but the values of its parameters and buffers."""
    return {
        "modules": {f"module {name!r}": type(each).__name__ for name, each in module.named_modules()},
        "parameters and buffers": {
            name: (tuple(t.shape), str(t.dtype), str(t.device), t.requires_grad) for name, t in _tensors(module)
        },
        "attributes": _attributes(module),
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, each in module.named_modules()
        for name, value in vars(each).items()
        if name not in _INTERNAL
    }


def _is_same(a: Any, b: Any) -> bool:
    """Return whether two attributes have the same value."""
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b) or (a != a and b != b)  # NaN
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (a.is_meta or torch.equal(a, b))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if hasattr(a, "__array__"):
        return bool(a.shape == b.shape and (a == b).all())
    return True


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() > 1 else repr(value)
