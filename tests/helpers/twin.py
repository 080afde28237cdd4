"""The four rules for one weight, in plain Python as in the papers; every implementation must agree with them.

This module does not use torch. A dtype is a function that rounds a float64 to it. A sum or product of two numbers of at
most 24 bits that is computed in float64 and then rounded equals the result of the narrower arithmetic.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def float16(x: float) -> float:
    return struct.unpack("e", struct.pack("e", x))[0]


def bfloat16(x: float) -> float:
    bits = struct.unpack("I", struct.pack("f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    return struct.unpack("f", struct.pack("I", bits & 0xFFFF0000))[0]


ROUND = {"float64": float, "float32": float32, "float16": float16, "bfloat16": bfloat16}


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def twin(
    variant: str,
    evaluate: Callable[[float], tuple[float, float]],
    steps: int,
    w: float,
    lr: float,
    etas: tuple[float, float],
    step_sizes: tuple[float, float],
    rounded: Callable[[float], float] = float,
) -> Iterator[tuple[float, float, float]]:
    """Yield weight, step size and stored gradient after each step; ``evaluate`` maps a weight to gradient and loss."""
    etaminus, etaplus = map(rounded, etas)
    low, high = map(rounded, step_sizes)
    w = rounded(w)
    D = rounded(lr)
    g_before = 0.0
    E_before = math.inf
    last_move = 0.0
    for _ in range(steps):
        g, E = evaluate(w)
        if math.isnan(E):
            E = math.inf
        rose = E > E_before or E == math.inf
        E_before = E
        if math.isnan(g):
            yield w, D, g_before
            continue
        s = sign(g) * sign(g_before)
        if s > 0:
            D = D * etaplus
        elif s < 0:
            D = D * etaminus
        D = min(max(rounded(D), low), high)
        if s < 0 and variant != "rprop-":
            if variant == "rprop+" or (variant == "irprop+" and rose):
                w = rounded(w - last_move)
            g_before = 0.0
        else:
            last_move = -sign(g) * D
            w = rounded(w + last_move)
            g_before = g
        yield w, D, g_before
