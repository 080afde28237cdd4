"""The rules of ``_rule.py`` in one call and one pass over memory for all tensors, on the CPU."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rprop.optim._rule import Rule, rounded
from lightning_rprop.optim._threads import run

# The C type of a kernel; calls through it release the GIL.
PROTOTYPE = ctypes.CFUNCTYPE(
    None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2, *[ctypes.c_bool] * 2
)

# What all members do, see _actions.
_ONE_ACTION = [array("B", [action]) for action in range(4)]

# Elements that a thread takes at a time: 7 MB in float32, about 0.2 ms of work; waking a thread takes 0.05 ms.
_CHUNK = 1 << 18


def update_numba(
    params: list[Tensor], grads: list[Tensor], prevs: list[Tensor], step_sizes: list[Tensor], rule: Rule
) -> Callable[[], None]:
    """Prepare one move of all tensors at once; arguments as in :func:`lightning_rprop.optim._rule.update`.

    The tensors have passed the checks of ``_dispatch.py`` and have one dtype. The rules are in ``_numba_kernel.py``.

    Returns:
        A function that makes the move. No memory of a tensor's size is allocated.
    """
    dtype = params[0].dtype
    kernel = load_kernel(dtype)
    addresses = array("Q", list(map(Tensor.data_ptr, [*params, *grads, *prevs, *step_sizes])))
    members = rule.members
    actions = _actions(rule) if members > 1 else _ONE_ACTION[bool(rule.take_back) + 2 * bool(rule.retreat)]
    sizes = array("q", map(Tensor.numel, params) if members == 1 else [param.numel() // members for param in params])
    taken = array("q", [0])
    numbers = rounded(dtype, rule[:5])
    arguments = (
        addresses.buffer_info()[0],
        sizes.buffer_info()[0],
        actions.buffer_info()[0],
        len(sizes),
        members,
        _CHUNK,
        taken.buffer_info()[0],
        numbers.buffer_info()[0],
        rule.maximize,
        rule.forget,
    )
    threads = min(torch.get_num_threads(), sum(sizes) * members // _CHUNK)
    # the memory that the kernel works on must live as long as any of its threads
    needed = (addresses, sizes, actions, taken, numbers, params, grads, prevs, step_sizes)
    return partial(_move, kernel, arguments, threads, needed)


def _actions(rule: Rule) -> array[int]:
    """Return for each member the sum of 1 if it takes back at flips and 2 if it retreats."""
    take_back, retreat = (torch.as_tensor(flag, dtype=torch.uint8, device="cpu") for flag in rule[-2:])
    return array("B", take_back.add(retreat, alpha=2).numpy().tobytes())


def _move(kernel: Callable[..., None], arguments: tuple[Any, ...], threads: int, needed: tuple[Any, ...]) -> None:
    run(lambda *_: kernel(*arguments), threads, needed)
    torch.autograd.graph.increment_version(needed[5])  # as torch's own in-place operations do


@cache
def load_kernel(dtype: torch.dtype) -> Callable[..., None]:
    """Load the kernel for parameters of one dtype, or compile it if it is not in the cache.

    Args:
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        The kernel, a C function.

    Raises:
        ImportError: If Numba is not installed.
        Exception: Whatever Numba's compiler raises.
    """
    if find_spec("numba") is None:
        raise ImportError("No module named 'numba'", name="numba")
    from lightning_rprop.optim._machine_code import load

    name = str(dtype).removeprefix("torch.")

    def compile_module() -> tuple[str, str]:
        from lightning_rprop.optim._numba_kernel import compile_kernel

        return compile_kernel(name)

    source = Path(__file__).with_name("_numba_kernel.py").read_text()
    return PROTOTYPE(load(f"rprop_{name}", source, compile_module))
