"""One record: the statistics of all step sizes, of groups and of parameters, with one transfer to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rprop.monitor import _statistics as statistics
from lightning_rprop.monitor._names import quantile_of
from lightning_rprop.monitor._rows import Row, gradients_of, state_of
from lightning_rprop.optim._sharding import is_slice

# Bins of a histogram: at the usual bounds nearly eight to a factor of ten.
_BINS = 60

# What a record is of: all parameters, a group, or one parameter; its name, and "" for all.
Scope = tuple[str, str]
TOTAL: Scope = ("total", "")


class Plan(NamedTuple):
    """What is asked for."""

    statistics: Sequence[str]
    per_group: bool
    parameters: frozenset[str]  # names of those that are shown one by one
    histogram: bool

    @property
    def quantiles(self) -> dict[str, float]:
        """The quantiles among the statistics: share by name."""
        shares = {name: quantile_of(name) for name in self.statistics}
        return {name: share for name, share in shares.items() if share is not None}


class Look(NamedTuple):
    """The gradients just before a step, compared with those of the step before."""

    rows: list[Row]
    counts: Tensor  # a part of a table, on the gradients' device


class Histogram(NamedTuple):
    """How many step sizes have which log10."""

    edges: list[float]  # one more than counts
    counts: list[float]


class Record(NamedTuple):
    """What was measured."""

    statistics: dict[Scope, dict[str, float]]  # by their names, those asked for
    histograms: dict[Scope, Histogram]
    total: dict[str, float]  # all there are, but for quantiles, of all parameters
    zero_in_half: float  # share of exact zeros among the gradients of float16 parameters; NaN without one
    loss: float | None


@torch.no_grad()
def look(rows: Iterable[Row]) -> Look | None:
    """Look at the gradients of some parameters; without a word if there are none."""
    found = [row for row in rows if row.param.grad is not None]
    return Look(found, statistics.gradient_table(gradients_of(found))) if found else None


@torch.no_grad()
def measure(
    rows: Sequence[Row],
    looks: Iterable[Look],
    plan: Plan,
    loss: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Record | None:
    """Measure the step sizes after a step.

    Args:
        rows: All parameters, the same on every process.
        looks: What :func:`look` saw before the step. A look at an optimizer that was replaced since is ignored.
        plan: What is asked for.
        loss: The loss of the step, which is moved to the host with the rest.
        gather: Makes ``(processes, n)`` of every process's ``(n,)``, called once, where the processes hold different
            parts of the step sizes; a parameter then counts where its row says so.

    Returns:
        The record, or ``None`` if there are no step sizes (yet).
    """
    if not rows:
        return None
    here = [i for i, row in enumerate(rows) if row.counts or gather is None]
    states = zip(here, state_of([rows[i] for i in here], "step_size"), strict=True)
    step_sizes = {i: found for i, found in states if found is not None}
    device = next((found.device for found in step_sizes.values()), rows[0].param.device)
    bounds = [row.options["step_sizes"] for row in rows]
    edges = _edges(bounds) if plan.histogram else []
    scopes = _scopes(rows, plan)
    shares = [*plan.quantiles.values()]

    table = statistics.empty_table(len(rows), device)
    if step_sizes:
        logs = "std_log10" in plan.statistics
        sums = statistics.step_size_table([*step_sizes.values()], [bounds[i] for i in step_sizes], logs=logs)
        table[statistics.STEP_SIZES, _columns([*step_sizes], len(rows))] = sums.to(device)
    places = {(id(row.optimizer), id(row.param)): i for i, row in enumerate(rows)}
    for seen in looks:
        found = [places.get((id(row.optimizer), id(row.param))) for row in seen.rows]
        columns = [place for place in found if place is not None]
        if len(columns) == len(found):
            table[statistics.GRADIENTS, _columns(columns, len(rows))] = seen.counts.to(device)

    parts: dict[tuple[str, Scope], Tensor] = {("table", TOTAL): table}
    for scope, members in scopes.items():
        inside = [step_sizes[i] for i in members if i in step_sizes]
        if shares:
            parts["quantiles", scope] = _quantiles(shares, inside, [rows[i] for i in members], gather is not None)
        if plan.histogram:
            parts["histogram", scope] = statistics.histogram(inside, edges[0], edges[-1], _BINS)
    if loss is not None:
        parts["loss", TOTAL] = loss.detach().reshape(1)

    packed = torch.cat([part.to(device, table.dtype).flatten() for part in parts.values()])
    everywhere = (packed.unsqueeze(0) if gather is None else gather(packed)).cpu().double().numpy()
    got, end = {}, 0
    for key, part in parts.items():
        begin, end = end, end + part.numel()
        got[key] = everywhere[:, begin:end].reshape(-1, *part.shape)
    return _read(rows, plan, scopes, edges, got)


def _columns(places: list[int], n: int) -> list[int] | slice:
    """Give an index for some of ``n`` columns, which are in their order; a slice takes less time where it is all."""
    return slice(None) if len(places) == n else places


def _quantiles(
    shares: Sequence[float], step_sizes: Sequence[Tensor], members: Sequence[Row], are_parts: bool
) -> Tensor:
    """Find the quantiles of step sizes; where they are parts, describe them for the other processes."""
    if not are_parts:
        if not any(map(Tensor.numel, step_sizes)):
            return torch.full((len(shares),), torch.nan)
        return statistics.quantiles(step_sizes, shares)
    size = statistics.SKETCH  # the same on all processes, of which none knows how much of a slice the others have
    if not any(is_slice(row.param) for row in members):
        size = min(size, sum(row.param.numel() * (2 if row.param.is_complex() else 1) for row in members))
    return statistics.sketch(step_sizes, size)


def _scopes(rows: Sequence[Row], plan: Plan) -> dict[Scope, list[int]]:
    scopes: dict[Scope, list[int]] = {TOTAL: [*range(len(rows))]}
    for i, row in enumerate(rows):
        if plan.per_group:
            scopes.setdefault(("group", row.group), []).append(i)
    for i, row in enumerate(rows):
        if row.name in plan.parameters:
            scopes["parameter", row.name] = [i]
    return scopes


def _edges(bounds: Sequence[tuple[float, float]]) -> list[float]:
    """Give the ends of a histogram's bins, log10 of step sizes, which stay the same from record to record."""
    lows, highs = zip(*bounds, strict=True)
    low, high = math.log10(max(min(lows), 1e-12)), math.log10(max(*highs, 1e-11))  # 0 has no logarithm
    return [low + (high - low) * i / _BINS for i in range(_BINS + 1)]


def _read(
    rows: Sequence[Row],
    plan: Plan,
    scopes: dict[Scope, list[int]],
    edges: list[float],
    got: dict[tuple[str, Scope], statistics.Array],
) -> Record | None:
    """Put together what the processes have, each a first index of what was got."""
    tables = got["table", TOTAL]
    table = statistics.merge(tables.swapaxes(0, 1)) if len(tables) > 1 else tables[0]
    shares = plan.quantiles
    found: dict[Scope, dict[str, float]] = {}
    histograms = {}
    total: dict[str, float] = {}
    for scope, members in scopes.items():
        values = statistics.read(statistics.merge(table[:, members]) if len(members) > 1 else table[:, members[0]])
        if not values:
            continue
        total = total or values
        if shares:
            parts = got["quantiles", scope]
            if parts.ndim > 2:
                parts = statistics.merged_quantiles(torch.from_numpy(parts), [*shares.values()]).numpy()[None]
            values |= zip(shares, parts[0].tolist(), strict=True)
        found[scope] = {name: values[name] for name in plan.statistics if name in values}
        if plan.histogram:
            histograms[scope] = Histogram(edges, got["histogram", scope].sum(axis=0).tolist())
    if not total:
        return None
    half = [i for i, row in enumerate(rows) if row.param.dtype == torch.float16]
    zero = statistics.read(statistics.merge(table[:, half])).get("zero_gradient", math.nan) if half else math.nan
    loss = float(got["loss", TOTAL][0, 0]) if ("loss", TOTAL) in got else None
    return Record(found, histograms, total, zero, loss)
