"""Which tensors the fused kernels serve: kernels see nothing but memory, which they read once and write once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor

from lightning_rprop._torch import is_transformed

# Tensors that are nothing but their memory.
PLAIN = frozenset({Tensor, torch.nn.Parameter})

DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

# Triton's own switch: its interpreter runs the kernels for CUDA on tensors of the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}

_dtype, _device, _is_cpu, _shape = map(attrgetter, ("dtype", "device", "is_cpu", "shape"))


def fused_update_of_all(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    take_back: bool | Tensor,
) -> Callable[..., Callable[[], None]] | None:
    """Choose the fused implementation that serves all parameters, if they are alike, as in nearly every model.

    They are if all tensors are plain and contiguous, of one dtype and device, and each parameter's four of one number
    of elements: what :func:`fused_update` asks one after another, in a seventh of the time.

    Args:
        params: real parameters.
        grads: their gradients.
        prevs: their previous gradients.
        step_sizes: their step sizes.
        take_back: as the implementations take it.

    Returns:
        The implementation, or ``None`` if none is found so quickly.
    """
    tensors = [*params, *grads, *prevs, *step_sizes]
    sizes = list(map(Tensor.numel, tensors))
    if not (
        PLAIN.issuperset(map(type, tensors))
        and len(set(map(_dtype, tensors))) == 1
        and (all(map(_is_cpu, tensors)) or len(set(map(_device, tensors))) == 1)
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, [*params, *grads]))
        and sizes == sizes[: len(params)] * 4
    ):
        return None
    chosen = _implementation(params[0], take_back)
    return None if isinstance(chosen, str) else chosen


def fused_update(
    param: Tensor, grad: Tensor, prev: Tensor, step_size: Tensor, take_back: bool | Tensor
) -> Callable[..., Callable[[], None]] | str:
    """Choose the fused implementation that serves one parameter.

    Args:
        param: a real parameter.
        grad: its gradient.
        prev: its previous gradient.
        step_size: its step sizes.
        take_back: as the implementations take it.

    Returns:
        The implementation, or a text that says why none serves.
    """
    four = (param, grad, prev, step_size)
    if not PLAIN.issuperset(map(type, four)):
        return f"only plain tensors are served, not {', '.join(type(t).__name__ for t in four)}"
    for what, get in (("dtype", _dtype), ("device", _device), ("shape", _shape)):
        values = [get(tensor) for tensor in four]
        if values != [values[0]] * 4:
            return f"parameter, gradient, prev and step_size differ in {what}: {', '.join(map(str, values))}"
    if not all(map(Tensor.is_contiguous, four)):
        strides = [tensor.stride() for tensor in four]
        if strides != [strides[0]] * 4:
            return f"parameter, gradient, prev and step_size differ in strides: {', '.join(map(str, strides))}"
        if not is_dense(param):
            return f"its memory has gaps or overlaps: shape {tuple(param.shape)}, strides {strides[0]}"
    if any(map(Tensor.is_neg, four)):
        return "a tensor has its negative bit set, see torch.Tensor.resolve_neg"
    return _implementation(param, take_back)


def _implementation(param: Tensor, take_back: bool | Tensor) -> Callable[..., Callable[[], None]] | str:
    if isinstance(take_back, Tensor) and take_back.numel() != 1:
        return f"loss_rose has {take_back.numel()} values"
    if is_transformed():
        return "it is inside a transformation of torch.func"
    try:
        param.data_ptr()
    except RuntimeError as error:  # a wrapper without memory, as functionalization makes
        return str(error)
    return _load(param.device, param.dtype)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a piece of memory, in whatever order."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != size:
            return False
        size *= length
    return True


@cache
def _load(device: torch.device, dtype: torch.dtype) -> Callable[..., Callable[[], None]] | str:
    """Load the implementation for a device and a dtype, or return why there is none."""
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    try:
        if device.type == "cuda" or (device.type == "cpu" and _INTERPRETED):
            from lightning_rprop.optim import _triton as fused_cuda

            fused_cuda.try_out(dtype, device)
            return fused_cuda.update_fused_cuda
        if device.type == "cpu":
            from lightning_rprop.optim import _numba as fused_cpu

            fused_cpu.load_kernel(dtype)
            return fused_cpu.update_fused_cpu
    except ImportError as error:
        if device.type == "cpu":
            _warn_of_missing_compiler(str(error))
        return f"its compiler cannot be imported: {error}"
    except Exception as error:  # whatever a compiler raises: there is another way to make the step
        warnings.warn(
            f"Rprop works without its fused kernel for {dtype} on {device}, which is faster: {error!r}. "
            "Silence this with fused=False",
            stacklevel=2,
        )
        return f"its kernel failed: {error!r}"
    return f"there is no kernel for the device {device}"


@cache
def _warn_of_missing_compiler(reason: str) -> None:
    """Warn once in a process, for all dtypes."""
    warnings.warn(
        f"Rprop works without its fused kernel, which is faster, because its compiler cannot be imported: {reason}. "
        "Install a Numba that supports the installed NumPy and Python (pip install --upgrade numba), or silence this "
        "with fused=False.",
        stacklevel=2,
    )
