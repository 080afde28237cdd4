"""The four rules for one weight in plain Python, written as in the papers; every implementation must equal them.

This module does not use torch, so it shares no bug with it. A narrower dtype is emulated by a function that rounds a
float64: rounding the float64 sum or product of two numbers of at most 24 bits gives the result of the narrower dtype.
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
    bits += 0x7FFF + (bits >> 16 & 1)  # round to nearest, ties to even
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
    retreat: bool = True,
) -> Iterator[tuple[float, float, float]]:
    """Iterate over weight, step size and stored gradient after each step.

    Args:
        variant: Name of the rule.
        evaluate: Returns gradient and loss at a weight.
        steps: Number of steps.
        w: Initial weight.
        lr: Initial step size.
        etas: Factors by which the step size shrinks and grows.
        step_sizes: Smallest and largest step size.
        rounded: Rounds a number to the emulated dtype.
        retreat: Whether a loss of NaN or infinity takes back the last move.
    """
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
        if retreat and E == math.inf:
            w = rounded(w + sign(g_before) * D)
            D = min(max(rounded(D * etaminus), low), high)
            g_before = 0.0
            yield w, D, g_before
            continue
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
