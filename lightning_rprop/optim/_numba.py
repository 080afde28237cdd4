"""The rules of ``_rule.py`` in one call and one pass over memory for all tensors, on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rprop.optim._rule import Rule, rounded
from lightning_rprop.optim._self_check import check
from lightning_rprop.optim._threads import PROTOTYPE, run

# What all members do, see _actions.
_ONE_ACTION = [array("B", [action]) for action in range(4)]

# The least number of elements that a thread takes at a time: 0.9 MB in float32, about 40 microseconds of work. It takes
# up to eight times as many where it gets 64 chunks, because long pieces of memory are read a little faster.
_CHUNK = 1 << 15


def update_numba(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    rule: Rule,
    kernel: Callable[[int], None] | None = None,
    chunk: int = 0,
) -> Callable[[], None]:
    """Prepare one move of all tensors at once; arguments as in ``lightning_rprop.optim._rule.update()``.

    The tensors have passed the checks of ``_dispatch.py`` and have one dtype. The rules are in ``_numba_kernel.py``.
    ``kernel`` and ``chunk`` are given when a new kernel is checked, with chunks so small that threads share the work.

    Returns:
        A function that makes the move. No memory of a tensor's size is allocated.
    """
    dtype, members = params[0].dtype, rule.members
    sizes = list(map(Tensor.numel, params))
    total = sum(sizes)
    chunk = chunk or max(_CHUNK, min(total // (64 * torch.get_num_threads()), 8 * _CHUNK))
    actions = _actions(rule) if members > 1 else _ONE_ACTION[bool(rule.take_back) + 2 * bool(rule.retreat)]
    numbers = rounded(dtype, rule[:5])
    table = array(
        "q",
        [
            0,  # elements that threads have taken
            len(params),
            members,
            chunk,
            rule.maximize,
            rule.forget,
            actions.buffer_info()[0],
            numbers.buffer_info()[0],
            *map(Tensor.data_ptr, [*params, *grads, *prevs, *step_sizes]),
            *(sizes if members == 1 else [size // members for size in sizes]),
        ],
    )
    # the memory that the kernel works on must live as long as any of its threads
    needed = (params, grads, prevs, step_sizes, actions, numbers, table)
    return partial(_move, kernel or load_kernel(dtype), total // chunk, needed)


def _actions(rule: Rule) -> array[int]:
    """Return for each member the sum of 1 if it takes back at flips and 2 if it retreats."""
    take_back, retreat = (torch.as_tensor(flag, dtype=torch.uint8, device="cpu") for flag in rule[-2:])
    return array("B", take_back.add(retreat, alpha=2).numpy().tobytes())


def _move(kernel: Callable[[int], None], pieces: int, needed: tuple[Any, ...]) -> None:
    run(kernel, needed[-1].buffer_info()[0], pieces, needed)
    torch.autograd.graph.increment_version(needed[0])  # as torch's own in-place operations do


def has_float16() -> bool:
    """Return whether the processor converts float16; else the kernel would call functions that need not exist."""
    import llvmlite.binding as llvm

    is_arm = llvm.get_process_triple().startswith(("aarch64", "arm64"))
    return is_arm or bool(llvm.get_host_cpu_features().get("f16c"))


@cache
def load_kernel(dtype: torch.dtype) -> Callable[[int], None]:
    """Load the kernel for parameters of one dtype, or compile and check it if it is not in the cache.

    Args:
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        The kernel, a C function.

    Raises:
        ImportError: If Numba is not installed.
        RuntimeError: If the compiled kernel gives wrong results.
        Exception: Whatever Numba's compiler raises.
    """
    if find_spec("numba") is None:
        raise ImportError("No module named 'numba'", name="numba")
    from lightning_rprop.optim._machine_code import load

    name = str(dtype).removeprefix("torch.")

    def compile_module() -> tuple[str, str]:
        from lightning_rprop.optim._numba_kernel import compile_kernel

        return compile_kernel(name)

    def check_kernel(address: int) -> None:
        check(partial(update_numba, kernel=PROTOTYPE(address), chunk=1000), dtype, torch.device("cpu"))

    source = Path(__file__).with_name("_numba_kernel.py").read_text()
    return PROTOTYPE(load(f"rprop_{name}", source, compile_module, check_kernel))
