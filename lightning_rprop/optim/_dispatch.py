"""The choice of an implementation for each parameter, made at each step from the tensors and never stored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_rprop._torch import is_simulated, is_simulating, is_transformed, is_watched
from lightning_rprop.optim._foreach import update_foreach
from lightning_rprop.optim._rule import Rule, Update, update
from lightning_rprop.optim._scratch import Scratch
from lightning_rprop.optim._self_check import check
from lightning_rprop.optim._sharding import PLAIN, aligned, as_real, is_sharded, local, rows

DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

# Devices on which a foreach call is one launch for many tensors; elsewhere it is a loop that needs more memory.
_FOREACH_DEVICES = frozenset({"cuda", "xpu", "mtia"})

# Triton's own switch: its interpreter runs the CUDA kernels on CPU tensors.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}

_dtype, _device, _is_cpu, _shape = map(attrgetter, ("dtype", "device", "is_cpu", "shape"))

# The implementation for each device and dtype, or why there is none.
_loaded: dict[tuple[torch.device, torch.dtype], Update | str] = {}

# Parameters, gradients, previous gradients and step sizes.
Lists: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def prepare(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    rule: Rule,
    *,
    foreach: bool | None,
    fused: bool | None,
    scratch: Scratch,
    differentiable: bool = False,
) -> list[Callable[[], None]]:
    """Prepare one move, each parameter with the implementation that suits it.

    Args:
        params: Parameters, real or complex.
        grads: Their gradients.
        prevs: Their previous gradients.
        step_sizes: Their step sizes.
        rule: Numbers and switches of the step.
        foreach: Whether to use the foreach implementation. ``None`` uses it for plain tensors on devices with foreach
            kernels if no fused kernel supports them.
        fused: Whether to use fused kernels. ``True`` requires one for every parameter. ``None`` uses them where they
            are supported, unless ``foreach`` is given or a ``TorchDispatchMode`` is active. Simulated and traced steps
            never use them, because the simulation would not see what a kernel does.
        scratch: Memory for the intermediate results of large parameters.
        differentiable: Use the plain loop, which autograd can differentiate.

    Returns:
        Functions that make the move.

    Raises:
        RuntimeError: If ``fused`` is ``True`` and no kernel supports one of the parameters.
        TypeError: If there is no arithmetic for a parameter's dtype.
        ValueError: If elements of a parameter share memory.
    """
    if fused is None and (foreach is not None or differentiable or is_watched()):
        fused = False
    if fused and is_simulating():
        fused = False
    if fused is not False and (kernel := _fused_for_all(params, grads, prevs, step_sizes, rule.members)):
        return [kernel(params, grads, prevs, step_sizes, rule)]
    if not differentiable and any(map(is_sharded, params)):
        grads = [*map(aligned, grads, params)]
        parts = local_parts((params, grads, prevs, step_sizes), rule)
        options: Any = {"foreach": foreach, "fused": fused, "scratch": scratch}
        return [move for lists, each in parts for move in prepare(*lists, each, **options)]
    if any(map(is_simulated, params)):
        fused = False

    plain_loop = partial(update, scratch=scratch, differentiable=differentiable)
    batches: dict[tuple[Update, torch.device, torch.dtype], Lists] = {}
    for i, row in enumerate(zip(params, grads, prevs, step_sizes, strict=True)):
        check_parameter(f"parameter {i}", row[0])  # its dtype may have changed since its state was created
        param, grad, prev, step_size = map(as_real, row)
        chosen = "" if fused is False else fused_for(param, grad, prev, step_size, rule.members)
        if isinstance(chosen, str):
            if fused:
                _refuse(f"parameter {i}", chosen)
            is_plain = type(param) in PLAIN and not differentiable
            by_list = is_plain and param.device.type in _FOREACH_DEVICES if foreach is None else foreach
            chosen = update_foreach if by_list else plain_loop
        batch = batches.setdefault((chosen, param.device, param.dtype), ([], [], [], []))
        for tensors, tensor in zip(batch, (param, grad, prev, step_size), strict=True):
            tensors.append(tensor)
    return [chosen(*batch, rule) for (chosen, _, _), batch in batches.items()]


def local_parts(lists: Lists, rule: Rule) -> Iterator[tuple[Lists, Rule]]:
    """Iterate over the local shards of tensors, and the rule with the flags of the members that are here.

    Parameters with the same placement are together; all of them are if members are not judged separately.
    """
    by_placement: dict[Any, list[int]] = {}
    is_separate = rule.members > 1
    for i, param in enumerate(lists[0]):
        placement: Any = None
        if is_separate and is_sharded(param):
            placement = param.device_mesh, param.placements  # type: ignore[attr-defined]
        by_placement.setdefault(placement, []).append(i)
    for indices in by_placement.values():
        take_back, retreat = (_here(flag, lists[0][indices[0]]) for flag in rule[-2:])
        params, grads, prevs, step_sizes = ([local(tensors[i]) for i in indices] for tensors in lists)
        yield (params, grads, prevs, step_sizes), rule._replace(take_back=take_back, retreat=retreat)


def _here(flag: bool | Tensor, param: Tensor) -> bool | Tensor:
    """Return the values of a flag for the members whose part of the parameter is on this process."""
    if not isinstance(flag, Tensor) or flag.numel() == 1:
        return flag
    flag = rows(flag, param)
    return flag if flag.numel() else False


def check_fused(
    names: Sequence[str], rows: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], by_member: bool = False
) -> None:
    """Check that fused kernels support all parameters, as ``fused=True`` requires.

    Args:
        names: Names for the error message.
        rows: Parameter, gradient, previous gradient and step size of each, or tensors like them. Parameters without
            values, such as lazy ones or those on the meta device, pass.
        by_member: Whether the members of stacked parameters are judged separately.

    Raises:
        RuntimeError: If a parameter is not supported.
    """
    names = [name for name, row in zip(names, rows, strict=True) if not is_lazy(row[0])]
    rows = [row for row in rows if not is_lazy(row[0])]
    rows = [(local(param), local(aligned(grad, param)), local(prev), local(size)) for param, grad, prev, size in rows]
    params, grads, prevs, step_sizes = ([row[i] for row in rows] for i in range(4))
    if not rows or (not by_member and _fused_for_all(params, grads, prevs, step_sizes, members=1)):
        return
    for name, row in zip(names, rows, strict=True):
        if not is_simulated(row[0]):
            param, grad, prev, step_size = map(as_real, row)
            members = len(param) if by_member else 1  # of this process
            _refuse(name, fused_for(param, grad, prev, step_size, members))


def check_parameter(name: str, param: Tensor) -> None:
    """Check that a parameter can be updated in place.

    Args:
        name: Name for the error message.
        param: The parameter.

    Raises:
        TypeError: If there is no arithmetic for its dtype, as for integers and float8.
        ValueError: If some of its elements share memory, as in an expanded tensor.
    """
    if param.dtype not in DTYPES and not param.is_complex():
        raise TypeError(
            f"Rprop cannot update {name}: its dtype is {param.dtype}. Convert it to float64, float32, bfloat16, "
            "float16 or a complex dtype, or do not pass it to the optimizer."
        )
    is_plain = type(param) in PLAIN and param.layout is torch.strided
    if is_plain and any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(
            f"Rprop cannot update {name}: elements share memory, its shape is {tuple(param.shape)} and its strides are "
            f"{param.stride()}. Create the parameter from a copy: torch.nn.Parameter(param.detach().contiguous())"
        )


def _refuse(name: str, chosen: Update | str) -> None:
    if isinstance(chosen, str):
        raise RuntimeError(
            f"fused=True, but no fused kernel supports {name}: {chosen}. Use fused=None to fall back where necessary."
        )


def _fused_for_all(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    members: int,
) -> Update | None:
    """Return the fused implementation for all parameters at once, or ``None`` to check them one by one.

    It succeeds for nearly every model: all tensors are plain, contiguous, and have one dtype and device. That takes a
    seventh of the time of ``fused_for()`` for each parameter.
    """
    tensors = [*params, *grads, *prevs, *step_sizes]
    sizes = list(map(Tensor.numel, tensors))
    if not (
        PLAIN.issuperset(map(type, tensors))
        and [*map(_dtype, tensors)].count(params[0].dtype) == len(tensors)
        and (all(map(_is_cpu, tensors)) or len(set(map(_device, tensors))) == 1)
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, [*params, *grads]))
        and sizes == sizes[: len(params)] * 4
        and (members == 1 or not any(_scattered(param, members) for param in params))
    ):
        return None
    chosen = _implementation(params[0])
    return None if isinstance(chosen, str) else chosen


def fused_for(param: Tensor, grad: Tensor, prev: Tensor, step_size: Tensor, members: int = 1) -> Update | str:
    """Return the fused implementation for one parameter.

    Args:
        param: A real parameter.
        grad: Its gradient.
        prev: Its previous gradient.
        step_size: Its step sizes.
        members: How many members are judged separately.

    Returns:
        The implementation, or a text that says why there is none.
    """
    four = (param, grad, prev, step_size)
    if not PLAIN.issuperset(map(type, four)):
        return f"only plain tensors are supported, not {', '.join(type(t).__name__ for t in four)}"
    for what, get in (("dtype", _dtype), ("device", _device), ("shape", _shape)):
        values = [get(tensor) for tensor in four]
        if values != [values[0]] * 4:
            return f"parameter, gradient, prev and step_size differ in {what}: {', '.join(map(str, values))}"
    if not all(map(Tensor.is_contiguous, four)):
        strides = [tensor.stride() for tensor in four]
        if strides != [strides[0]] * 4:
            return f"parameter, gradient, prev and step_size differ in strides: {', '.join(map(str, strides))}"
        if not _is_dense(param):
            return f"its memory has gaps or overlaps: shape {tuple(param.shape)}, strides {strides[0]}"
    if members > 1 and (reason := _scattered(param, members)):
        return reason
    if any(map(Tensor.is_neg, four)):
        return "a tensor has its negative bit set, see torch.Tensor.resolve_neg"
    return _implementation(param)


def _scattered(param: Tensor, members: int) -> str:
    """Return why the elements of a member are not one piece of memory, or an empty string if they are."""
    shape, strides = tuple(param.shape), param.stride()
    if shape[:1] != (members,):
        return f"it has the shape {shape}, but {members} members are judged"
    if param.numel() and strides[0] * members != param.numel():
        return f"its members are not in one piece of memory each: shape {shape}, strides {strides}"
    return ""


def _implementation(param: Tensor) -> Update | str:
    if is_transformed():
        return "it is inside a transformation of torch.func"
    try:
        param.data_ptr()
    except RuntimeError as error:  # a wrapper without memory, as functionalization creates
        return str(error)
    key = param.device, param.dtype
    chosen = _loaded.get(key)
    if chosen is None:
        if param.is_cuda and torch.cuda.is_current_stream_capturing():
            return "it cannot be checked while a graph is captured; make a step before the capture"
        chosen = _loaded[key] = _load(*key)
    return chosen


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a contiguous piece of memory, in any order."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != size:
            return False
        size *= length
    return True


def _load(device: torch.device, dtype: torch.dtype) -> Update | str:
    """Load the implementation for a device and a dtype, or return why there is none.

    Triton's kernel is checked here, Numba's when it is compiled.
    """
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    try:
        if device.type == "cuda" or (device.type == "cpu" and _INTERPRETED):
            from lightning_rprop.optim import _triton

            check(_triton.update_triton, dtype, device)
            return _triton.update_triton
        if device.type == "cpu":
            from lightning_rprop.optim import _numba

            if dtype == torch.float16 and not _numba.has_float16():
                return "this processor has no instructions that convert float16"
            _numba.load_kernel(dtype)
            return _numba.update_numba
    except ImportError as error:
        if device.type == "cpu":
            _warn_of_missing_compiler(str(error))
        return f"its compiler cannot be imported: {error}"
    except Exception as error:  # compilers raise anything, and the other implementations still work
        other = "foreach implementation" if device.type in _FOREACH_DEVICES else "plain loop"
        warnings.warn(
            f"Rprop cannot use its fused kernel for {dtype} on {device}: {error!r}. It uses its {other} unless "
            "fused=True. Report this to lightning_rprop, and set fused=False to silence this warning.",
            stacklevel=2,
        )
        return f"its kernel failed: {error!r}"
    return f"there is no kernel for the device {device}"


@cache
def _warn_of_missing_compiler(reason: str) -> None:
    """Warn once per process, not once per dtype."""
    warnings.warn(
        f"Rprop cannot use its faster fused kernel, because the compiler cannot be imported: {reason}. "
        "Install a Numba version that supports your NumPy and Python (pip install --upgrade numba), or set "
        "fused=False to silence this warning.",
        stacklevel=2,
    )
