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

from lightning_rprop.optim._rule import Rule, on_device, rounded

# Elements per program of the kernel: 8 per thread with 8 warps.
_BLOCK = 2048

# Types in memory. Bfloat16 is converted by hand, because Triton's interpreter (3.7) truncates where hardware rounds.
_STORED = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}

# The kernel's tables by content. Training reuses the same few addresses, hence few tables.
_tables: dict[tuple[bytes, torch.device], Tensor] = {}
_MOST_TABLES = 32

# Memory that captured graphs read, kept because they may be replayed at any time; and spare pinned memory by size.
_captured: list[Tensor] = []
_reserve: dict[int, Tensor] = {}


def update_triton(
    params: list[Tensor], grads: list[Tensor], prevs: list[Tensor], step_sizes: list[Tensor], rule: Rule
) -> Callable[[], None]:
    """Prepare one move of all tensors at once; arguments as in :func:`lightning_rprop.optim._rule.update`.

    The tensors have passed the checks of ``_dispatch.py`` and have one dtype and device. Nothing waits for the device.

    Returns:
        A function that makes the move. No memory of a tensor's size is allocated.
    """
    needed = (params, grads, prevs, step_sizes)  # gradients may be copies that nothing else references
    device, dtype, rows, members = params[0].device, params[0].dtype, len(params), rule.members
    take_back = rule.take_back
    addresses = array("q", list(map(Tensor.data_ptr, [*params, *grads, *prevs, *step_sizes])))
    sizes = list(map(Tensor.numel, params))
    blocks = list(accumulate((-(-size // _BLOCK) for size in sizes), initial=0))
    if blocks[-1]:
        numbers = rounded(dtype, rule[:5])
        contents = addresses.tobytes() + array("q", blocks[:-1] + sizes).tobytes() + numbers.tobytes()
        if isinstance(take_back, Tensor) and take_back.device != device and take_back.is_cpu and take_back.numel() == 1:
            take_back = bool(take_back)
        take_back_at = on_device(take_back, device) if isinstance(take_back, Tensor) else None
        retreat_at = None if rule.retreat is False else on_device(rule.retreat, device)
        if members > 1:  # one flag for each member, also where all have the same
            take_back_at, retreat_at = (
                None if flag is None else flag.reshape(-1).expand(members).contiguous()
                for flag in (take_back_at, retreat_at)
            )
        with torch.cuda.device_of(params[0]):
            table = _table_on_device(contents, device)

    def move() -> None:
        if blocks[-1]:
            with torch.cuda.device_of(params[0]):
                _kernel[(blocks[-1],)](
                    table,
                    rows,
                    members,
                    take_back_at,
                    retreat_at,
                    ROWS=triton.next_power_of_2(rows),
                    BLOCK=_BLOCK,
                    STORED=_STORED[dtype],
                    NUMBER=tl.float64 if dtype == torch.float64 else tl.float32,
                    ALIGNED=not any(address % 16 for address in addresses),
                    DECAY=rule.weight_decay != 0,
                    MAXIMIZE=rule.maximize,
                    FORGET=rule.forget,
                    TAKE_BACK=take_back is True,
                    BY_MEMBER=members > 1,
                    num_warps=8,
                    enable_fp_fusion=False,  # a multiply-add rounds once where the other implementations round twice
                )
        torch.autograd.graph.increment_version(needed[0])  # as torch's own in-place operations do

    return move


def try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Make a step with one element, because Triton may be installed without a C compiler or for another GPU.

    Args:
        dtype: float64, float32, float16 or bfloat16.
        device: Where to make the step.

    Raises:
        Exception: Whatever went wrong.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # the step must not become part of the graph
    params, grads, prevs, step_sizes = ([torch.ones(1, dtype=dtype, device=device)] for _ in range(4))
    rule = Rule(0.5, 1.2, 1e-6, 50, weight_decay=0.0, maximize=False, forget=True, take_back=False)
    update_triton(params, grads, prevs, step_sizes, rule)()


def _table_on_device(contents: bytes, device: torch.device) -> Tensor:
    """Return the kernel's table on the device; it is copied only if no recent step had the same content."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get((contents, device))
    if table is None:
        host = torch.frombuffer(bytearray(contents), dtype=torch.int64)
        if device.type == "cuda":
            # no need to wait: torch reuses pinned memory only after the copy has finished
            host = _pinned(len(contents), capturing).copy_(host)
        table = torch.empty_like(host, device=device).copy_(host, non_blocking=True)
        if capturing:
            _captured.append(host)
        else:
            _tables[contents, device] = table
            if len(_tables) > _MOST_TABLES:
                del _tables[next(iter(_tables))]
    if capturing:
        _captured.append(table)
    return table


def _pinned(size: int, capturing: bool) -> Tensor:
    """Return pinned memory; during a capture, where allocating may be forbidden, what an earlier step set aside."""
    if capturing and size in _reserve:
        return _reserve.pop(size)
    if not capturing and size not in _reserve:
        _reserve[size] = torch.empty(size // 8, dtype=torch.int64, pin_memory=True)
    return torch.empty(size // 8, dtype=torch.int64, pin_memory=True)


@triton.jit(do_not_specialize=["rows", "members"])
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
    ALIGNED: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FORGET: tl.constexpr,
    TAKE_BACK: tl.constexpr,
    BY_MEMBER: tl.constexpr,
):
    # A row is a parameter. The table holds, for all rows, the addresses of params, grads, prevs and step sizes, the
    # first block and the size; then the numbers of the rule. A block belongs to the last row that starts no later.
    block = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, ROWS)
    firsts = tl.load(table + 4 * rows + index, mask=index < rows, other=block + 1)
    row = tl.sum((firsts <= block).to(tl.int32)) - 1
    begin = (block - tl.load(table + 4 * rows + row)) * BLOCK
    size = tl.load(table + 5 * rows + row)
    params = tl.load(table + row).to(tl.pointer_type(STORED))
    grads = tl.load(table + rows + row).to(tl.pointer_type(STORED))
    prevs = tl.load(table + 2 * rows + row).to(tl.pointer_type(STORED))
    step_sizes = tl.load(table + 3 * rows + row).to(tl.pointer_type(STORED))
    if ALIGNED:  # like memory that torch allocates; allows loads of 16 bytes
        params = tl.multiple_of(params, (16,))
        grads = tl.multiple_of(grads, (16,))
        prevs = tl.multiple_of(prevs, (16,))
        step_sizes = tl.multiple_of(step_sizes, (16,))
    numbers = table + 6 * rows
    elements = tl.arange(0, BLOCK)
    offsets = begin + elements
    if BY_MEMBER:
        # the member of each element, which is offset // each; after the block's first element all numbers are small
        each = size // members
        first = begin // each
        left = tl.minimum((first + 1) * each - begin, BLOCK)
        short = tl.minimum(each, BLOCK)
        member = first + (elements + (short - left).to(tl.int32)) // short.to(tl.int32)
        take_back = TAKE_BACK if take_back_at is None else tl.load(take_back_at + member, mask=offsets < size)
        retreat = None if retreat_at is None else tl.load(retreat_at + member, mask=offsets < size)
    else:
        take_back = TAKE_BACK if take_back_at is None else tl.load(take_back_at)
        retreat = None if retreat_at is None else tl.load(retreat_at)

    params += offsets
    grads += offsets
    prevs += offsets
    step_sizes += offsets
    if begin + BLOCK <= size:  # no mask, which would prevent wide loads
        _update(
            params, grads, prevs, step_sizes, None, numbers, take_back, retreat, STORED, NUMBER, DECAY, MAXIMIZE, FORGET
        )
    else:
        mask = offsets < size
        _update(
            params, grads, prevs, step_sizes, mask, numbers, take_back, retreat, STORED, NUMBER, DECAY, MAXIMIZE, FORGET
        )


@triton.jit
def _update(
    params,
    grads,
    prevs,
    step_sizes,
    mask,
    numbers,
    take_back,
    retreat,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FORGET: tl.constexpr,
):
    etaminus = tl.load(numbers).to(tl.float64, bitcast=True).to(NUMBER)
    etaplus = tl.load(numbers + 1).to(tl.float64, bitcast=True).to(NUMBER)
    step_size_min = tl.load(numbers + 2).to(tl.float64, bitcast=True).to(NUMBER)
    step_size_max = tl.load(numbers + 3).to(tl.float64, bitcast=True).to(NUMBER)
    param = _widen(tl.load(params, mask=mask), NUMBER)
    grad = _widen(tl.load(grads, mask=mask), NUMBER)
    prev = _widen(tl.load(prevs, mask=mask), NUMBER)
    step_size = _widen(tl.load(step_sizes, mask=mask), NUMBER)

    # gradient to minimize (the decay rounds twice, see enable_fp_fusion)
    if MAXIMIZE:
        grad = grad * -1.0  # in Triton, -x turns 0 into 0 instead of -0
    if DECAY:
        weight_decay = tl.load(numbers + 4).to(tl.float64, bitcast=True).to(NUMBER)
        decay = _widen(_narrow(param * weight_decay, STORED), NUMBER)
        grad = _widen(_narrow(grad + decay, STORED), NUMBER)

    # compare signs; sign(0) = 0, and sign(NaN) = 0 too
    sign = (grad > 0).to(NUMBER) - (grad < 0).to(NUMBER)
    agreement = sign * ((prev > 0).to(NUMBER) - (prev < 0).to(NUMBER))
    if retreat is not None:
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
    if FORGET:
        sign = tl.where(flipped & (take_back == 0), 0.0, sign)
    if retreat is not None:
        distance = tl.where(retreat, before, distance)
        sign = tl.where(retreat, (prev < 0).to(NUMBER) - (prev > 0).to(NUMBER), sign)
    tl.store(params, _narrow(param - sign * distance, STORED), mask=mask)

    # store the gradient: 0 at a flip, the previous one where this one is NaN
    grad = tl.where(grad == grad, grad, prev)
    if FORGET:
        grad = tl.where(flipped, 0.0, grad)
    if retreat is not None:
        grad = tl.where(retreat, 0.0, grad)
    tl.store(prevs, _narrow(grad, STORED), mask=mask)


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
