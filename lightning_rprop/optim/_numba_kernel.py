"""The rules of ``_rule.py`` for one element after another, in a loop that Numba compiles: one pass over memory.

Imported only to compile the kernels, which ``_machine_code.py`` caches: importing Numba takes longer than 10,000 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# The types in memory and for computation. As in torch, float16 and bfloat16 use float32 and round each result.
_STORED = {"float64": types.float64, "float32": types.float32, "float16": types.uint16, "bfloat16": types.uint16}
_COMPUTED = {"float64": np.float64, "float32": np.float32, "float16": np.float32, "bfloat16": np.float32}


def compile_kernel(dtype: str) -> tuple[str, str]:
    """Compile the rules for parameters of one dtype.

    Args:
        dtype: ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Returns:
        The symbol of the function ``kernel`` below, and the LLVM IR of a module with it.
    """
    signature = types.void(types.CPointer(types.int64))
    kernel = _kernel(_COMPUTED[dtype], pointer_to(_STORED[dtype]), *_CONVERSIONS.get(dtype, (_same, _same)))
    compiled = numba.cfunc(signature, error_model="numpy")(kernel)
    return compiled.native_name, compiled.inspect_llvm()


@intrinsic
def take(typing_context, counter, chunk):
    """Add to a counter that threads share, and return its previous value."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", *arguments, "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), generate


def pointer_to(kind: Any) -> Any:
    """Return a function that converts an address to a pointer to values of this type."""

    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


def _kernel(number: Any, pointer: Any, widen: Callable[[Any], Any], narrow: Callable[[Any], Any]) -> Any:
    """Build the kernel for one computation type; ``widen`` converts to it from memory, ``narrow`` back."""
    zero, one = number(0), number(1)
    to_actions, to_numbers = pointer_to(types.uint8), pointer_to(types.float64)

    @numba.njit(error_model="numpy")
    def sign_of(x):
        return one if x > zero else -one if x < zero else zero

    @numba.njit(error_model="numpy")
    def clamped(x, low, high):
        x = low if x < low else x
        return high if x > high else x

    @numba.njit(error_model="numpy")
    def update(
        params,
        grads,
        prevs,
        step_sizes,
        first,
        last,
        etaminus,
        etaplus,
        step_size_min,
        step_size_max,
        weight_decay,
        maximize,
        forget,
        take_back,
    ):
        """Move the elements ``first`` to ``last - 1`` of one parameter."""
        for i in range(first, last):
            param = widen(params[i])
            grad = widen(grads[i])
            prev = widen(prevs[i])
            step_size = widen(step_sizes[i])

            # gradient to minimize (the decay rounds twice: Numba does not contract a multiply-add)
            if maximize:
                grad = -grad
            if weight_decay != zero:
                grad = widen(narrow(grad + widen(narrow(param * weight_decay))))

            # compare signs; sign(0) = 0, and sign(NaN) = 0 too
            sign = sign_of(grad)
            agreement = sign * sign_of(prev)
            flipped = agreement < zero

            # adapt the step size
            factor = etaplus if agreement > zero else etaminus if flipped else one
            before = step_size
            step_size = clamped(widen(narrow(step_size * factor)), step_size_min, step_size_max)
            step_sizes[i] = narrow(step_size)

            # move; at a flip move back by the last step size, or not at all
            distance = before if flipped and take_back else step_size
            if flipped and forget and not take_back:
                sign = zero
            params[i] = narrow(param - sign * distance)

            # store the gradient: 0 at a flip, the previous one where this one is NaN
            grad = grad if grad == grad else prev
            prevs[i] = narrow(zero if flipped and forget else grad)

    @numba.njit(error_model="numpy")
    def retreat(params, prevs, step_sizes, first, last, etaminus, step_size_min, step_size_max):
        """Take back the last move of the elements ``first`` to ``last - 1`` of one parameter."""
        for i in range(first, last):
            step_size = widen(step_sizes[i])
            params[i] = narrow(widen(params[i]) - sign_of(-widen(prevs[i])) * step_size)
            step_sizes[i] = narrow(clamped(widen(narrow(step_size * etaminus)), step_size_min, step_size_max))
            prevs[i] = narrow(zero)

    def kernel(table):
        """Move chunk after chunk until none is left.

        A row is a parameter. The table holds the numbers that are read below and then, for all rows, the addresses of
        params, grads, prevs and step sizes, and how many elements each member has. ``actions`` says whether a member
        takes back its last move at flips (1) or everywhere (2). Chunks are counted over the elements of all rows.
        Threads share the counter at the table's start, so that they finish together even if one of them is slow.
        """
        rows, members, chunk, maximize, forget = table[1], table[2], table[3], table[4] != 0, table[5] != 0
        actions, numbers = to_actions(table[6]), to_numbers(table[7])
        etaminus, etaplus = number(numbers[0]), number(numbers[1])
        step_size_min, step_size_max, weight_decay = number(numbers[2]), number(numbers[3]), number(numbers[4])
        row, member, start = 0, 0, 0
        while row < rows:
            begin = take(table, chunk)
            end = begin + chunk
            while row < rows and start < end:
                # members that do the same are moved together, because one of them may have very few elements
                action, after = actions[member], member + 1
                while after < members and actions[after] == action:
                    after += 1
                each = table[8 + 4 * rows + row]
                size = (after - member) * each
                first = member * each + max(begin - start, 0)
                last = member * each + min(end - start, size)
                params = pointer(table[8 + row])
                grads = pointer(table[8 + rows + row])
                prevs = pointer(table[8 + 2 * rows + row])
                step_sizes = pointer(table[8 + 3 * rows + row])
                if action & 2:
                    retreat(params, prevs, step_sizes, first, last, etaminus, step_size_min, step_size_max)
                else:
                    update(
                        params,
                        grads,
                        prevs,
                        step_sizes,
                        first,
                        last,
                        etaminus,
                        etaplus,
                        step_size_min,
                        step_size_max,
                        weight_decay,
                        maximize,
                        forget,
                        action != 0,
                    )
                if start + size > end:
                    break  # the next chunk continues these members
                start += size
                member = after
                if member == members:
                    member = 0
                    row += 1

    return kernel


@numba.njit(inline="always")
def _same(x):
    return x


@numba.njit(error_model="numpy")
def _bfloat16_to_float32(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(error_model="numpy")
def _float32_to_bfloat16(x):
    bits = np.float32(x).view(np.uint32)
    to_nearest_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(bits + to_nearest_even) >> np.uint32(16)
    return np.uint16(rounded if x == x else np.uint32(0x7FC0))


@intrinsic
def _float16_to_float32(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _float32_to_float16(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


_CONVERSIONS: dict[str, Any] = {
    "bfloat16": (_bfloat16_to_float32, _float32_to_bfloat16),
    "float16": (_float16_to_float32, _float32_to_float16),
}
