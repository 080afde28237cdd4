"""A comparison of a compiled kernel with the readable rules of ``_rule.py``, made before the kernel is used.

Compilers, drivers and processors differ more than a test suite can cover, and with a kernel that is wrong in one branch
training still seems to work.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_rprop.optim._rule import Rule, Update, update

# Each tensor has a row for each member. The rows of the first are longer than one Triton block.
_MEMBERS = 2
_COLUMNS = [2053, 0, 9, 1]
_NUMEL = _MEMBERS * sum(_COLUMNS)

# In a buffer, tensors start at multiples of this many elements, which keeps them aligned, and have a gap behind them.
_SPACING = 64

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_KINDS = ("parameter", "gradient", "prev", "step_size")


def check(implementation: Update, dtype: torch.dtype, device: torch.device) -> None:
    """Check that an implementation gives the bits of the readable one in every branch of the rules.

    It runs in its own thread, which the caller's dispatch modes, default device and CUDA stream do not affect. The
    global random state is not used.

    Args:
        implementation: The implementation.
        dtype: float64, float32, float16 or bfloat16.
        device: Where to run it. Its current stream must not be capturing a graph.

    Raises:
        RuntimeError: If a result differs. The message says which one.
        Exception: Whatever the implementation raises.
    """
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if mode:
        torch.cuda.set_sync_debug_mode(0)  # the check waits for the device
    try:
        with ThreadPoolExecutor(1) as thread:
            try:
                done = thread.submit(_check, implementation, dtype, device)
            except RuntimeError:  # no thread can start while the interpreter shuts down
                _check(implementation, dtype, device)
            else:
                done.result()
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


@torch.no_grad()
def _check(implementation: Update, dtype: torch.dtype, device: torch.device) -> None:
    given = _elements(dtype).to(device)
    layouts = [(offset, _layout(offset).to(device)) for offset in (0, 1)]
    buffers = [given.index_select(1, places) for _, places in layouts]
    for rule in _rules(device):
        right = given.clone()
        param, grad, prev, step_size = ([row[:-1].view(_MEMBERS, -1)] for row in right)
        update(param, grad, prev, step_size, rule, scratch={})()
        for (offset, places), actual in zip(layouts, buffers, strict=True):
            torch.index_select(given, 1, places, out=actual)
            params, grads, prevs, step_sizes = (_tensors(row, offset) for row in actual)
            implementation(params, grads, prevs, step_sizes, rule)()
            expected = right.index_select(1, places)
            if not torch.equal(_bits(actual), _bits(expected)):
                raise RuntimeError(_difference(given.index_select(1, places), expected, actual, rule, offset))


def _difference(given: Tensor, expected: Tensor, actual: Tensor, rule: Rule, offset: int) -> str:
    """Describe the first element that differs."""
    kind, place = (_bits(actual) != _bits(expected)).nonzero()[0].tolist()
    values = ", ".join(f"{name} {value}" for name, value in zip(_KINDS, given[:, place].tolist(), strict=True))
    return (
        f"a {_KINDS[kind]} becomes {actual[kind, place].item()} instead of {expected[kind, place].item()}, given "
        f"{values} at {'an unaligned' if offset else 'an aligned'} address, and {rule}"
    )


def _bits(values: Tensor) -> Tensor:
    """Return the bits of floating-point numbers, the same for all NaNs."""
    return values.masked_fill(values != values, torch.nan).view(_INTEGERS[values.itemsize])


def _rules(device: torch.device) -> Iterator[Rule]:
    """Iterate over what all variants do, with flags that are bools or tensors of one element or one per member."""
    off, on = (torch.full((), flag, device=device) for flag in (False, True))
    first, last = (torch.arange(_MEMBERS, device=device) == member for member in (0, _MEMBERS - 1))
    flags: list[bool | Tensor] = [False, True, off, on, first]
    at_flip = [(False, flags[0]), *((True, flag) for flag in flags)]
    gradients = [(0.0, False), (0.1, False), (0.0, True), (0.1, True)]
    for i, (forget, take_back) in enumerate(at_flip):
        for j, retreat in enumerate([*flags, last]):
            weight_decay, maximize = gradients[(i + j) % len(gradients)]
            yield Rule(0.5, 1.2, 1e-6, 50.0, weight_decay, maximize, forget, take_back, retreat)


def _layout(offset: int) -> Tensor:
    """Return the index of the element at each place of a buffer that holds all tensors."""
    places = [torch.full((offset,), _NUMEL, device="cpu")]
    for columns in torch.split(torch.arange(_NUMEL, device="cpu").view(_MEMBERS, -1), _COLUMNS, dim=1):
        places += [columns.flatten(), torch.full((_gap(columns.numel()),), _NUMEL, device="cpu")]
    return torch.cat(places)


def _tensors(buffer: Tensor, offset: int) -> list[Tensor]:
    """Return the tensors in a buffer with this layout."""
    tensors = []
    for columns in _COLUMNS:
        end = offset + _MEMBERS * columns
        tensors.append(buffer[offset:end].view(_MEMBERS, columns))
        offset = end + _gap(_MEMBERS * columns)
    return tensors


def _gap(numel: int) -> int:
    return _SPACING - numel % _SPACING


def _elements(dtype: torch.dtype) -> Tensor:
    """Return parameters, gradients, prevs and step sizes of all elements, and of one more for the gaps.

    They have all combinations of a special or random gradient, prev and step size, with various parameters.
    """
    limits = torch.finfo(dtype)
    sizes = [0.0, limits.tiny * limits.eps, limits.tiny, limits.max, torch.inf]  # the second is the smallest subnormal
    signed = [*sizes, *(-size for size in sizes), torch.nan]
    index, generator = torch.arange(_NUMEL + 1, device="cpu"), torch.Generator().manual_seed(0)

    def pick(special: list[float], random: int, stride: int) -> Tensor:
        values = torch.randn(len(index), generator=generator, dtype=torch.float64, device="cpu")
        which = index // stride % (len(special) + random)
        for i, value in enumerate(special):
            values[which == i] = value
        return values

    gradients, prevs = pick(signed, 5, stride=1), pick(signed, 5, stride=16)
    step_sizes = pick([0.0, 5e-7, 1e-6, 45.0, 50.0, 100.0], 2, stride=16 * 16).abs()
    params = pick(signed, 8, stride=1)
    return torch.stack([params, gradients, prevs, step_sizes]).to(dtype)
