"""The rules of ``_rule.py`` in one launch and one pass over memory for all tensors, on CUDA.

Imported only for CUDA tensors, or if TRITON_INTERPRET=1 asks Triton's interpreter to run the kernel on CPU tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rprop.optim._rule import Rule, rounded

# Elements per program of the kernel: 8 per thread with 8 warps.
_BLOCK = 2048

# Types in memory. Bfloat16 is converted by hand, because Triton's interpreter (3.7) truncates where hardware rounds.
_STORED = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}

# The kernel's tables by content, each with views of its last two entries, which are False and True. Training reuses the
# same few addresses, hence few tables.
_tables: dict[tuple[bytes, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
_MOST_TABLES = 32

# Memory that captured graphs read, kept because they may be replayed at any time; and spare pinned memory by size.
_captured: list[Tensor] = []
_reserve: dict[int, Tensor] = {}


def update_triton(
    params: list[Tensor], grads: list[Tensor], prevs: list[Tensor], step_sizes: list[Tensor], rule: Rule
) -> Callable[[], None]:
    """Prepare one move of all tensors at once; arguments as in ``lightning_rprop.optim._rule.update()``.

    The tensors have passed the checks of ``_dispatch.py`` and have one dtype and device. Nothing waits for the device.

    Returns:
        A function that makes the move. No memory of a tensor's size is allocated.
    """
    needed = (params, grads, prevs, step_sizes)  # gradients may be copies that nothing else references
    device, dtype, rows, members = params[0].device, params[0].dtype, len(params), rule.members
    addresses = array("q", list(map(Tensor.data_ptr, [*params, *grads, *prevs, *step_sizes])))
    sizes = list(map(Tensor.numel, params))
    blocks = list(accumulate((-(-size // _BLOCK) for size in sizes), initial=0))
    if blocks[-1]:
        flags = [_on_device(flag, device) for flag in (rule.take_back, rule.retreat)]
        strides = [flag.stride(0) if isinstance(flag, Tensor) and flag.numel() > 1 else 0 for flag in flags]
        integers = array("q", [*blocks[:-1], *sizes, rule.maximize, rule.forget, *strides, False, True])
        contents = addresses.tobytes() + rounded(dtype, rule[:5]).tobytes() + integers.tobytes()
        with torch.cuda.device_of(params[0]):
            table, *known = _table_on_device(contents, device)
        take_back_at, retreat_at = (flag if isinstance(flag, Tensor) else known[flag] for flag in flags)

    def move() -> None:
        if blocks[-1]:
            with torch.cuda.device_of(params[0]):
                _kernel[(blocks[-1],)](
                    table,
                    rows,
                    members,
                    take_back_at,
                    retreat_at,
                    ROWS=max(256, triton.next_power_of_2(rows)),
                    BLOCK=_BLOCK,
                    STORED=_STORED[dtype],
                    NUMBER=tl.float64 if dtype == torch.float64 else tl.float32,
                    BY_MEMBER=members > 1,
                    num_warps=8,
                    enable_fp_fusion=False,  # a multiply-add rounds once where the other implementations round twice
                )
        torch.autograd.graph.increment_version(needed[0])  # as torch's own in-place operations do

    return move


def _on_device(flag: bool | Tensor, device: torch.device) -> bool | Tensor:
    """Return a flag of a rule as a bool, or as a tensor on the device."""
    if not isinstance(flag, Tensor):
        return flag
    if flag.is_cpu and flag.device != device and flag.numel() == 1:
        return bool(flag)
    return flag.to(device)


def _table_on_device(contents: bytes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return an entry of ``_tables``; it is copied to the device only if no recent step had the same content."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    entry = _tables.get((contents, device))
    if entry is None:
        host = torch.frombuffer(bytearray(contents), dtype=torch.int64)
        if device.type == "cuda":
            # no need to wait: torch reuses pinned memory only after the copy has finished
            host = _pinned(len(contents), capturing).copy_(host)
        table = torch.empty_like(host, device=device).copy_(host, non_blocking=True)
        entry = table, table[-2:].view(torch.bool), table[-1:].view(torch.bool)
        if capturing:
            _captured.append(host)
        else:
            _tables[contents, device] = entry
            if len(_tables) > _MOST_TABLES:
                del _tables[next(iter(_tables))]
    if capturing:
        _captured.append(entry[0])
    return entry


def _pinned(size: int, capturing: bool) -> Tensor:
    """Return pinned memory; during a capture, where allocating may be forbidden, what an earlier step set aside."""
    if capturing and size in _reserve:
        return _reserve.pop(size)
    if not capturing and size not in _reserve:
        _reserve[size] = torch.empty(size // 8, dtype=torch.int64, pin_memory=True)
    return torch.empty(size // 8, dtype=torch.int64, pin_memory=True)


@triton.jit(do_not_specialize=["rows", "members", "take_back_at", "retreat_at"])
def _kernel(
    table,
    rows,
    members,
    take_back_at,
    retreat_at,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
    BY_MEMBER: tl.constexpr,
):
    # A row is a parameter. The table holds, for all rows, the addresses of params, grads, prevs and step sizes; the
    # numbers of the rule; for all rows, the first block and the size; and the rule's switches. A block belongs to the
    # last row that starts no later. One compiled kernel serves all rules and up to 256 rows, so that the check runs the
    # code that models run.
    numbers = table + 4 * rows
    shape = numbers + 5
    switches = shape + 2 * rows
    block = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, ROWS)
    firsts = tl.load(shape + index, mask=index < rows, other=block + 1)
    row = tl.sum((firsts <= block).to(tl.int32)) - 1
    begin = (block - tl.load(shape + row)) * BLOCK
    size = tl.load(shape + rows + row)
    param = tl.load(table + row)
    grad = tl.load(table + rows + row)
    prev = tl.load(table + 2 * rows + row)
    step_size = tl.load(table + 3 * rows + row)
    elements = tl.arange(0, BLOCK)
    offsets = begin + elements
    if BY_MEMBER:
        # the member of each element, which is offset // each; after the block's first element all numbers are small
        each = size // members
        first = begin // each
        left = tl.minimum((first + 1) * each - begin, BLOCK)
        short = tl.minimum(each, BLOCK)
        member = first + (elements + (short - left).to(tl.int32)) // short.to(tl.int32)
        take_back = tl.load(take_back_at + member * tl.load(switches + 2), mask=offsets < size)
        retreat = tl.load(retreat_at + member * tl.load(switches + 3), mask=offsets < size)
    else:
        take_back = tl.load(take_back_at)
        retreat = tl.load(retreat_at)

    # whole blocks of memory as torch allocates it need no mask, and are loaded 16 bytes at a time
    if (begin + BLOCK <= size) & ((param | grad | prev | step_size) % 16 == 0):
        _update(param, grad, prev, step_size, offsets, None, numbers, switches, take_back, retreat, STORED, NUMBER)
    else:
        mask = offsets < size
        _update(param, grad, prev, step_size, offsets, mask, numbers, switches, take_back, retreat, STORED, NUMBER)


@triton.jit
def _update(
    params,
    grads,
    prevs,
    step_sizes,
    offsets,
    mask,
    numbers,
    switches,
    take_back,
    retreat,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
):
    params = _pointers(params, offsets, mask, STORED)
    grads = _pointers(grads, offsets, mask, STORED)
    prevs = _pointers(prevs, offsets, mask, STORED)
    step_sizes = _pointers(step_sizes, offsets, mask, STORED)
    etaminus = tl.load(numbers).to(tl.float64, bitcast=True).to(NUMBER)
    etaplus = tl.load(numbers + 1).to(tl.float64, bitcast=True).to(NUMBER)
    step_size_min = tl.load(numbers + 2).to(tl.float64, bitcast=True).to(NUMBER)
    step_size_max = tl.load(numbers + 3).to(tl.float64, bitcast=True).to(NUMBER)
    weight_decay = tl.load(numbers + 4).to(tl.float64, bitcast=True).to(NUMBER)
    maximize = tl.load(switches).to(tl.int1)
    forget = tl.load(switches + 1).to(tl.int1)
    param = _widen(tl.load(params, mask=mask), NUMBER)
    grad = _widen(tl.load(grads, mask=mask), NUMBER)
    prev = _widen(tl.load(prevs, mask=mask), NUMBER)
    step_size = _widen(tl.load(step_sizes, mask=mask), NUMBER)

    # gradient to minimize (the decay rounds twice, see enable_fp_fusion)
    grad = tl.where(maximize, grad * -1.0, grad)  # in Triton, -x turns 0 into 0 instead of -0
    decay = _widen(_narrow(param * weight_decay, STORED), NUMBER)
    grad = tl.where(weight_decay != 0, _widen(_narrow(grad + decay, STORED), NUMBER), grad)

    # compare signs; sign(0) = 0, and sign(NaN) = 0 too
    sign = (grad > 0).to(NUMBER) - (grad < 0).to(NUMBER)
    agreement = sign * ((prev > 0).to(NUMBER) - (prev < 0).to(NUMBER))
    agreement = tl.where(retreat, -1.0, agreement)
    flipped = agreement < 0

    # adapt the step size
    factor = tl.where(agreement > 0, etaplus, tl.where(flipped, etaminus, 1.0))
    before = step_size
    step_size = _widen(_narrow(step_size * factor, STORED), NUMBER)
    step_size = tl.where(step_size < step_size_min, step_size_min, step_size)
    step_size = tl.where(step_size > step_size_max, step_size_max, step_size)
    tl.store(step_sizes, _narrow(step_size, STORED), mask=mask)

    # move; at a flip move back by the last step size, or not at all
    distance = tl.where(flipped & take_back, before, step_size)
    sign = tl.where(forget & flipped & (take_back == 0), 0.0, sign)
    distance = tl.where(retreat, before, distance)
    sign = tl.where(retreat, (prev < 0).to(NUMBER) - (prev > 0).to(NUMBER), sign)
    tl.store(params, _narrow(param - sign * distance, STORED), mask=mask)

    # store the gradient: 0 at a flip, the previous one where this one is NaN
    grad = tl.where(grad == grad, grad, prev)
    grad = tl.where(forget & flipped, 0.0, grad)
    grad = tl.where(retreat, 0.0, grad)
    tl.store(prevs, _narrow(grad, STORED), mask=mask)


@triton.jit
def _pointers(address, offsets, mask, STORED: tl.constexpr):
    """Return pointers to the elements of a tensor; without a mask its address is a multiple of 16."""
    pointer = address.to(tl.pointer_type(STORED))
    if mask is None:
        pointer = tl.multiple_of(pointer, (16,))
    return pointer + offsets


@triton.jit
def _widen(stored, NUMBER: tl.constexpr):
    """Convert to the type that torch computes in, which is float32 for float16 and bfloat16."""
    if stored.dtype == tl.uint16:
        number = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        number = stored.to(NUMBER)
    return number


@triton.jit
def _narrow(number, STORED: tl.constexpr):
    """Round to the type in memory."""
    if STORED == tl.uint16:
        bits = number.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(number == number, rounded, 0x7FC0).to(tl.uint16)
    else:
        stored = number.to(STORED)
    return stored
