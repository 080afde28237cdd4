"""What ``statistics_cpu.py`` counts in float32 tensors, in loops that Numba compiles: one pass over memory each.

Imported only to be compiled, as ``optim/_numba_kernel.py`` is. Tensors come in pieces, which threads take one after
another. A piece has a row of results of its own, so that sums do not depend on which thread took it; of counts by bits
each thread has tables of its own. Numbers that are not negative are ordered as their bits are, read as whole numbers
("keys"), which a processor compares side by side without a thought of NaN.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from lightning_rprop.optim._numba_kernel import take

# Elements that are counted in 32 bits, before they are added to a row.
_BLOCK = 1 << 14

# The bits of infinity without the sign; NaN is above.
_INFINITE = np.uint32(0xFF000000)

_float32s, _uint32s, _int64s, _float64s = map(types.CPointer, (types.float32, types.uint32, types.int64, types.float64))


def compile_kernel(name: str) -> tuple[str, str]:
    """Compile one of the kernels below.

    Args:
        name: ``"step_sizes"``, ``"gradients"``, ``"upper_bits"`` or ``"lower_bits"``.

    Returns:
        The name of the function, and LLVM's text of a module that has it.
    """
    kernel, arguments = _KERNELS[name]
    compiled = numba.cfunc(types.void(*arguments), error_model="numpy")(kernel)
    return compiled.native_name, compiled.inspect_llvm()


@numba.njit(error_model="numpy", fastmath={"reassoc", "contract"})
def _sum_up(keys, first, n, low, high, rows, row):
    """Add a block to a row: sum, smallest and largest key, how many are at either bound."""
    total = np.float64(0)
    smallest, largest = np.uint32(0xFFFFFFFF), np.uint32(0)
    at_low, at_high = np.int32(0), np.int32(0)
    for i in range(first, first + n):
        key = keys[i]
        total += np.float64(np.uint32(key).view(np.float32))
        smallest = key if key < smallest else smallest
        largest = key if key > largest else largest
        at_low += np.int32(key <= low)
        at_high += np.int32(key >= high)
    rows[row] += total
    rows[row + 1] = min(rows[row + 1], np.float64(smallest))
    rows[row + 2] = max(rows[row + 2], np.float64(largest))
    rows[row + 3] += at_low
    rows[row + 4] += at_high


def _step_sizes(addresses, sizes, pieces, taken, bounds, rows):
    """Sum up the pieces that no other thread takes; ``bounds`` are two keys for each piece, ``rows`` five numbers."""
    while True:
        piece = take(taken, np.int64(1))
        if piece >= pieces:
            return
        first = np.int64(0)
        while first < sizes[piece]:
            n = min(np.int64(_BLOCK), sizes[piece] - first)
            _sum_up(addresses[piece], first, n, bounds[2 * piece], bounds[2 * piece + 1], rows, 5 * piece)
            first += n


def _counter(decays: bool) -> Any:
    """Make the function that counts in a block, for parameters with a weight decay or without."""

    @numba.njit(error_model="numpy")
    def count(grads, prevs, params, first, n, flip, decay, rows, row):
        """Add to a row: changes of sign, how many had two signs to compare, exact zeros, and what is not finite."""
        changed, compared, zero, nonfinite = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
        for i in range(first, first + n):
            grad, prev = grads[i], prevs[i]
            size = np.uint32(grad << np.uint32(1))  # without the sign
            zero += np.int32(size == np.uint32(0))
            nonfinite += np.int32(size >= _INFINITE)
            if decays:
                turned, param = np.uint32(grad ^ flip).view(np.float32), np.uint32(params[i]).view(np.float32)
                grad = np.float32(turned + np.float32(param * decay)).view(np.uint32) ^ flip
                size = np.uint32(grad << np.uint32(1))
            signed = np.uint32(size - np.uint32(1)) < _INFINITE  # neither zero nor NaN
            signed &= np.uint32(np.uint32(prev << np.uint32(1)) - np.uint32(1)) < _INFINITE
            compared += np.int32(signed)
            changed += np.int32(signed & (np.uint32(grad ^ prev ^ flip) >= np.uint32(0x80000000)))
        rows[row] += changed
        rows[row + 1] += compared
        rows[row + 2] += zero
        rows[row + 3] += nonfinite

    return count


_count, _count_decayed = _counter(False), _counter(True)


def _gradients(addresses, sizes, pieces, taken, flips, decays, rows):
    """Count in the pieces that no other thread takes.

    Addresses are those of the gradients, of the ones before, and of the parameters. ``flips`` is the bit of the sign
    where the sign of the gradient is to be turned, else 0.
    """
    while True:
        piece = take(taken, np.int64(1))
        if piece >= pieces:
            return
        grads, prevs = addresses[piece], addresses[pieces + piece]
        params = addresses[2 * pieces + piece]
        first = np.int64(0)
        while first < sizes[piece]:
            n = min(np.int64(_BLOCK), sizes[piece] - first)
            if decays[piece] == np.float32(0):
                _count(grads, prevs, params, first, n, flips[piece], decays[piece], rows, 4 * piece)
            else:
                _count_decayed(grads, prevs, params, first, n, flips[piece], decays[piece], rows, 4 * piece)
            first += n


def _upper_bits(addresses, sizes, pieces, taken, tickets, slots, counts):
    """Count the keys in the pieces that no other thread takes by their upper 16 bits; ``slots`` is the number 1."""
    table = take(tickets, np.int64(1)) << 16
    while True:
        piece = take(taken, np.int64(1))
        if piece >= pieces:
            return
        keys = addresses[piece]
        for i in range(sizes[piece]):
            counts[table + (np.int64(keys[i]) >> 16)] += np.uint32(1)


def _lower_bits(addresses, sizes, pieces, taken, tickets, slots, counts):
    """Count keys by their lower 16 bits, in that of a thread's tables that their upper bits have in ``slots``.

    ``slots`` is how many tables a thread has, and then the one of each of the 65,536; those not asked for share one, as
    a branch that nobody can foresee takes longer.
    """
    tables = (take(tickets, np.int64(1)) * slots[0]) << 16
    while True:
        piece = take(taken, np.int64(1))
        if piece >= pieces:
            return
        keys = addresses[piece]
        for i in range(sizes[piece]):
            key = np.int64(keys[i])
            counts[tables + (slots[1 + (key >> 16)] << 16) + (key & 0xFFFF)] += np.uint32(1)


_PIECES = (types.CPointer(_uint32s), _int64s, types.int64, _int64s)
_KERNELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "step_sizes": (_step_sizes, (*_PIECES, _uint32s, _float64s)),
    "gradients": (_gradients, (*_PIECES, _uint32s, _float32s, _float64s)),
    "upper_bits": (_upper_bits, (*_PIECES, _int64s, _int64s, _uint32s)),
    "lower_bits": (_lower_bits, (*_PIECES, _int64s, _int64s, _uint32s)),
}
