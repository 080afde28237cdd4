"""The rules of ``update.py`` in one launch and one pass over memory for all tensors, on CUDA.

Imported only where there are CUDA tensors, or where Triton's interpreter is asked for (TRITON_INTERPRET=1), which runs
the kernel on tensors of the CPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rprop.optim._rounding import rounded
from lightning_rprop.optim._scratch import Scratch

# Elements that a program of the kernel moves, with eight warps: eight a thread.
_BLOCK = 2048

# What is stored. Bfloat16 is converted bit by bit, as Triton's interpreter (3.7) cuts off where the hardware rounds.
_STORED = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}

# The kernel's tables by what they hold: memory is given anew from step to step, so that few are in use in a training.
_tables: dict[tuple[bytes, torch.device], Tensor] = {}
_MOST_TABLES = 32

# What captured graphs read, which may be replayed as long as the process lives; and memory for such, by its bytes.
_captured: list[Tensor] = []
_reserve: dict[int, Tensor] = {}


def update_fused_cuda(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    *,
    etaminus: float,
    etaplus: float,
    step_size_min: float,
    step_size_max: float,
    weight_decay: float,
    maximize: bool,
    forget: bool,
    take_back: bool | Tensor,
    differentiable: bool,
    scratch: Scratch,
) -> Callable[[], None]:
    """Prepare one move of all tensors at once; arguments as in :func:`lightning_rprop.optim._rule.update`.

    The tensors are such as ``fused.py`` lets pass, of one dtype and device. No memory of a tensor's size is allocated,
    and nothing waits for the device.

    Returns:
        A function that makes the move.
    """
    del differentiable  # dispatch.py never sends a differentiable step here: autograd does not see what a kernel does
    del scratch
    needed = (params, grads, prevs, step_sizes)  # gradients may be copies that nothing else holds
    device, dtype, rows = params[0].device, params[0].dtype, len(params)
    addresses = array("q", list(map(Tensor.data_ptr, [*params, *grads, *prevs, *step_sizes])))
    sizes = list(map(Tensor.numel, params))
    blocks = list(accumulate((-(-size // _BLOCK) for size in sizes), initial=0))
    numbers = rounded(dtype, etaminus, etaplus, step_size_min, step_size_max, weight_decay)
    if blocks[-1]:
        contents = addresses.tobytes() + array("q", blocks[:-1] + sizes).tobytes() + numbers.tobytes()
        if isinstance(take_back, Tensor) and take_back.device != device:
            take_back = bool(take_back) if take_back.is_cpu else take_back.to(device)
        with torch.cuda.device_of(params[0]):
            table = _table_on_device(contents, device)

    def move() -> None:
        if blocks[-1]:
            with torch.cuda.device_of(params[0]):
                _kernel[(blocks[-1],)](
                    table,
                    rows,
                    take_back if isinstance(take_back, Tensor) else None,
                    ROWS=triton.next_power_of_2(rows),
                    BLOCK=_BLOCK,
                    STORED=_STORED[dtype],
                    NUMBER=tl.float64 if dtype == torch.float64 else tl.float32,
                    ALIGNED=not any(address % 16 for address in addresses),
                    DECAY=weight_decay != 0,
                    MAXIMIZE=maximize,
                    FORGET=forget,
                    TAKE_BACK=take_back is True,
                    num_warps=8,
                    enable_fp_fusion=False,  # a multiply-add rounds once where the other implementations round twice
                )
        torch.autograd.graph.increment_version(needed[0])  # as torch's own in-place operations tell autograd

    return move


def try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Make a step with one element: Triton may be there without what it needs, a C compiler or a GPU that it knows.

    Args:
        dtype: float64, float32, float16 or bfloat16.
        device: where to make it.

    Raises:
        Exception: Whatever went wrong.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # a graph must not have it
    update_fused_cuda(
        *([torch.ones(1, dtype=dtype, device=device)] for _ in range(4)),
        etaminus=0.5,
        etaplus=1.2,
        step_size_min=1e-6,
        step_size_max=50,
        weight_decay=0.0,
        maximize=False,
        forget=True,
        take_back=False,
        differentiable=False,
        scratch={},
    )()


def _table_on_device(contents: bytes, device: torch.device) -> Tensor:
    """Give the kernel's table, which is copied only if none of the last steps had the same."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get((contents, device))
    if table is None:
        host = torch.frombuffer(bytearray(contents), dtype=torch.int64)
        if device.type == "cuda":
            # not waited for: pinned memory is given away again only when it has been copied
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
    """Give pinned memory, in a capture such as a step before set aside: to allocate it then may be forbidden."""
    if capturing and size in _reserve:
        return _reserve.pop(size)
    if not capturing and size not in _reserve:
        _reserve[size] = torch.empty(size // 8, dtype=torch.int64, pin_memory=True)
    return torch.empty(size // 8, dtype=torch.int64, pin_memory=True)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    table,
    rows,
    take_back_at,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STORED: tl.constexpr,
    NUMBER: tl.constexpr,
    ALIGNED: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FORGET: tl.constexpr,
    TAKE_BACK: tl.constexpr,
):
    # The table: for each row, which is a parameter, the addresses of its four tensors, its first block and its size;
    # then the numbers of the rule. This block belongs to the last row that begins with it or before it.
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
    if ALIGNED:  # as memory of torch's own is: then 16 bytes are loaded at once
        params = tl.multiple_of(params, (16,))
        grads = tl.multiple_of(grads, (16,))
        prevs = tl.multiple_of(prevs, (16,))
        step_sizes = tl.multiple_of(step_sizes, (16,))
    numbers = table + 6 * rows
    take_back = TAKE_BACK if take_back_at is None else tl.load(take_back_at)

    offsets = begin + tl.arange(0, BLOCK)
    params += offsets
    grads += offsets
    prevs += offsets
    step_sizes += offsets
    if begin + BLOCK <= size:  # a mask keeps loads from being joined
        _update(params, grads, prevs, step_sizes, None, numbers, take_back, STORED, NUMBER, DECAY, MAXIMIZE, FORGET)
    else:
        inside = offsets < size
        _update(params, grads, prevs, step_sizes, inside, numbers, take_back, STORED, NUMBER, DECAY, MAXIMIZE, FORGET)


@triton.jit
def _update(
    params,
    grads,
    prevs,
    step_sizes,
    mask,
    numbers,
    take_back,
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

    # the gradient of what is minimised (two roundings for the decay, see enable_fp_fusion)
    if MAXIMIZE:
        grad = grad * -1.0  # Triton's minus makes 0 of 0, not -0
    if DECAY:
        weight_decay = tl.load(numbers + 4).to(tl.float64, bitcast=True).to(NUMBER)
        decay = _widen(_narrow(param * weight_decay, STORED), NUMBER)
        grad = _widen(_narrow(grad + decay, STORED), NUMBER)

    # compare signs; sign(0) = 0, and sign(NaN) = 0 too
    sign = (grad > 0).to(NUMBER) - (grad < 0).to(NUMBER)
    agreement = sign * ((prev > 0).to(NUMBER) - (prev < 0).to(NUMBER))
    flipped = agreement < 0

    # adapt the step size
    factor = tl.where(agreement > 0, etaplus, tl.where(flipped, etaminus, 1.0))
    before = step_size
    step_size = _widen(_narrow(step_size * factor, STORED), NUMBER)
    step_size = tl.where(step_size < step_size_min, step_size_min, step_size)
    step_size = tl.where(step_size > step_size_max, step_size_max, step_size)
    tl.store(step_sizes, _narrow(step_size, STORED), mask=mask)

    # move; where the sign changed back by the last step size, or not at all
    distance = tl.where(flipped & take_back, before, step_size)
    if FORGET:
        sign = tl.where(flipped & (take_back == 0), 0.0, sign)
    tl.store(params, _narrow(param - sign * distance, STORED), mask=mask)

    # remember the gradient: 0 where the sign changed, the one before where this one is NaN
    grad = tl.where(grad == grad, grad, prev)
    if FORGET:
        grad = tl.where(flipped, 0.0, grad)
    tl.store(prevs, _narrow(grad, STORED), mask=mask)


@triton.jit
def _widen(stored, NUMBER: tl.constexpr):
    """Bring what is stored to the type that torch calculates with: float32 for the halves."""
    if stored.dtype == tl.uint16:
        number = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        number = stored.to(NUMBER)
    return number


@triton.jit
def _narrow(number, STORED: tl.constexpr):
    """Round to what is stored."""
    if STORED == tl.uint16:
        bits = number.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(number == number, rounded, 0x7FC0).to(tl.uint16)
    else:
        stored = number.to(STORED)
    return stored
