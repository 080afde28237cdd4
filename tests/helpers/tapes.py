"""Tapes of gradients and losses, and the steps that the twin and the optimizer take on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from cases import VARIANTS
from twin import twin

from lightning_rprop import Rprop

Tape = list[tuple[float, float]]
Rows = list[tuple[float, float, float]]

INF, NAN = math.inf, math.nan
OPTIONS = {"lr": 0.5, "etas": (0.5, 1.2), "step_sizes": (0.2, 1.0)}

# Gradients and losses by step. A tape of gradients only has falling losses.
TAPES = {
    "no flip": [1, 2, 3, 4, 5, 6],
    "flips": [1, 1, -1, -1, -1, 1, 1],
    "flip after flip": [1, -1, 1, -1, -1, 1, -1, 1],
    "exact zeros": [0, 1, 0, 1, 1, 0, -1, -1, 0, 0, 1, -1],
    "zero after a flip": [1, 1, -1, 0, -1, 0, 1],
    "at the upper bound": [1] * 7 + [-1, 1, 1, 1, 1, 1, 1],
    "at the lower bound": [1, -1] * 7,
    "negative zero": [-0.0, 1, -0.0, -1, -1, -0.0, 1],
    "infinities": [INF, INF, -INF, 1, 1, -INF, -1],
    "tiny": [1e-7, 1e-7, -1e-7, -1e-7, 1e-7, 1e-7, 1e-7],
    "huge": [3e4, 6e4, -6e4, 6e4, -6e4, -6e4],
    "NaN": [NAN, 1, NAN, 1, -1, NAN, -1, 1, NAN, NAN, -1],
    "NaN between a move and its flip": [1, 1, NAN, -1, -1],
    "loss equal at a flip": [(1, 5), (1, 4), (-1, 4), (-1, 3), (1, 3), (1, 2)],
    "loss risen at every flip": [(1, 5), (1, 4), (-1, 6), (-1, 5), (1, 7), (1, 8), (-1, 9)],
    "loss risen against the one before, not against the first": [(1, 9), (1, 2), (-1, 3), (-1, 1), (1, 2), (1, 3)],
    "loss risen against the best, not against the one before": [(1, 1), (1, 5), (-1, 4), (-1, 6), (1, 5), (1, 2)],
    "loss risen where nothing flips": [(1, 1), (1, 2), (1, 3), (-1, 2), (-1, 3), (-1, 4)],
    "loss NaN": [(1, 3), (1, 2), (-1, NAN), (-1, 1), (1, NAN), (1, NAN), (-1, 5), (-1, 4), (1, NAN)],
    "loss infinite": [(1, INF), (1, INF), (-1, INF), (-1, 1), (1, INF), (-1, 2), (1, -INF), (-1, -INF)],
    "loss at the first step NaN": [(1, NAN), (-1, 5), (-1, 4), (1, 5)],
}
TAPES = {
    name: [row if isinstance(row, tuple) else (row, -i) for i, row in enumerate(tape)] for name, tape in TAPES.items()
}


def twin_rows(
    variant: str,
    tape: Tape,
    rounded: Callable[[float], float] = float,
    rule: Callable[..., Iterator[tuple[float, float, float]]] = twin,
    **options: object,
) -> Rows:
    """Return weight, step size and stored gradient after each step of the twin."""
    rows = iter(tape)
    return list(rule(variant, lambda _: next(rows), len(tape), w=0.0, rounded=rounded, **(OPTIONS | options)))


def rprop_rows(variant: str, tape: Tape, dtype: torch.dtype = torch.float64, **options: object) -> Rows:
    """Return weight, step size and stored gradient after each step of the optimizer."""
    w = torch.zeros((), dtype=dtype, requires_grad=True)
    optimizer = Rprop([w], variant=variant, **(OPTIONS | options))
    rows = []
    for g, loss in tape:
        w.grad = torch.tensor(g, dtype=dtype)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
        state = optimizer.state[w]
        rows.append((w.item(), state["step_size"].item(), state["prev"].item()))
    return rows


def round_gradients(tape: Tape, rounded: Callable[[float], float]) -> Tape:
    return [(rounded(g) if math.isfinite(g) else g, loss) for g, loss in tape]


def comparable(rows: Rows) -> list[list[float | str]]:
    """Return the rows with NaN replaced by a string, which equals itself."""
    return [["NaN" if math.isnan(value) else value for value in row] for row in rows]


def differs_from_twin(rows_of: Callable[[str, Tape], Rows]) -> bool:
    """Return whether the rows differ from the twin's on any tape, for any variant."""
    return any(
        comparable(rows_of(variant, tape)) != comparable(twin_rows(variant, tape))
        for tape in TAPES.values()
        for variant in VARIANTS
    )


def descend(
    variant: str, steps: int = 30, **options: object
) -> tuple[torch.Tensor, Rprop, Callable[[], torch.Tensor], list[float]]:
    """Minimize a coupled quadratic, on which the signs of the weights flip at different times.

    Returns:
        The weights, the optimizer, the closure and the losses.
    """
    torch.manual_seed(0)
    curvature = torch.randn(6, 6, dtype=torch.float64)
    curvature = curvature @ curvature.T
    w = torch.randn(6, dtype=torch.float64).requires_grad_()
    optimizer = Rprop([w], variant=variant, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w @ curvature @ w
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(steps)]
    return w, optimizer, closure, losses
