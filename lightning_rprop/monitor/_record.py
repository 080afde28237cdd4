"""One record: statistics of all step sizes, of groups and of single parameters, with one transfer to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rprop.monitor import _statistics as statistics
from lightning_rprop.monitor._names import quantile_level
from lightning_rprop.monitor._rows import Row, gradients_of, state_of
from lightning_rprop.optim._sharding import is_slice

# Histogram bins: about eight per factor of ten at the default bounds.
_BINS = 60

# What a statistic covers: "total", "group" or "parameter", and the name of the group or parameter.
Scope = tuple[str, str]
TOTAL: Scope = ("total", "")


class Plan(NamedTuple):
    """What a record contains."""

    statistics: Sequence[str]
    per_group: bool
    parameters: frozenset[str]  # names of those with statistics of their own
    histogram: bool

    @property
    def quantiles(self) -> dict[str, float]:
        """The levels of the quantiles among the statistics, by name."""
        levels = {name: quantile_level(name) for name in self.statistics}
        return {name: level for name, level in levels.items() if level is not None}


class GradientSummary(NamedTuple):
    """Counts of gradient signs just before a step."""

    rows: list[Row]
    table: Tensor  # the GRADIENTS rows of a table, on the gradients' device


class Histogram(NamedTuple):
    """Counts of step sizes by log10."""

    edges: list[float]  # one more than counts
    counts: list[float]


class Record(NamedTuple):
    """The measured values."""

    statistics: dict[Scope, dict[str, float]]  # only those in the plan
    histograms: dict[Scope, Histogram]
    total: dict[str, float]  # every statistic of all parameters, without quantiles
    zero_in_half: float  # share of exact zeros among the gradients of float16 parameters; NaN without any
    losses: list[float]  # one, or those of several members, or none


@torch.no_grad()
def summarize_gradients(rows: Iterable[Row]) -> GradientSummary | None:
    """Count the signs of the rows' gradients; return ``None`` if there are no gradients."""
    rows = [row for row in rows if row.param.grad is not None]
    return GradientSummary(rows, statistics.gradient_table(gradients_of(rows))) if rows else None


@torch.no_grad()
def measure(
    rows: Sequence[Row],
    gradients: Iterable[GradientSummary],
    plan: Plan,
    losses: Tensor | None = None,
    retreats: int | Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Record | None:
    """Measure the step sizes after a step.

    Args:
        rows: All parameters, the same on every process.
        gradients: Summaries from before the step. One of an optimizer that has been replaced since is ignored.
        plan: What the record contains.
        losses: The loss of the step, or several of members, which are moved to the host with the rest.
        retreats: The number of retreats in the run so far, likewise.
        gather: All-gathers a tensor ``(n,)`` as ``(processes, n)``. Pass it if the processes hold different parts of
            the step sizes; it is called once, and only rows with ``is_counted`` are measured here.

    Returns:
        The record, or ``None`` if there are no step sizes yet.
    """
    if not rows:
        return None
    counted = [i for i, row in enumerate(rows) if row.is_counted or gather is None]
    states = zip(counted, state_of([rows[i] for i in counted], "step_size"), strict=True)
    step_sizes = {i: state for i, state in states if state is not None}
    device = next((state.device for state in step_sizes.values()), rows[0].param.device)
    edges = _edges([row.options["step_sizes"] for row in rows]) if plan.histogram else []
    levels = [*plan.quantiles.values()]
    scopes = _scopes(rows, plan)

    parts: dict[tuple[str, Scope], Tensor] = {("table", TOTAL): _table(rows, step_sizes, gradients, plan, device)}
    for scope, members in scopes.items():
        tensors = [step_sizes[i] for i in members if i in step_sizes]
        if levels and gather is None:
            parts["quantiles", scope] = statistics.quantiles(tensors, levels)
        elif levels:
            parts["quantiles", scope] = statistics.sketch(tensors, _sketch_size([rows[i].param for i in members]))
        if plan.histogram:
            parts["histogram", scope] = statistics.histogram(tensors, edges[0], edges[-1], _BINS)
    if losses is not None:
        parts["losses", TOTAL] = losses.detach().reshape(-1)
    if retreats is not None and "retreats" in plan.statistics:
        parts["retreats", TOTAL] = torch.as_tensor(retreats).reshape(1)

    dtype = parts["table", TOTAL].dtype
    packed = torch.cat([part.to(device, dtype).flatten() for part in parts.values()])
    gathered = (packed.unsqueeze(0) if gather is None else gather(packed)).cpu().double().numpy()
    arrays, end = {}, 0
    for key, part in parts.items():
        start, end = end, end + part.numel()
        arrays[key] = gathered[:, start:end].reshape(-1, *part.shape)
    return _read(rows, plan, scopes, edges, arrays)


def _table(
    rows: Sequence[Row],
    step_sizes: Mapping[int, Tensor],
    gradients: Iterable[GradientSummary],
    plan: Plan,
    device: torch.device,
) -> Tensor:
    table = statistics.empty_table(len(rows), device)
    if step_sizes:
        bounds = [rows[i].options["step_sizes"] for i in step_sizes]
        sums = statistics.step_size_table([*step_sizes.values()], bounds, logs="std_log10" in plan.statistics)
        table[statistics.STEP_SIZES, [*step_sizes]] = sums.to(device)
    columns = {(id(row.optimizer), id(row.param)): i for i, row in enumerate(rows)}
    for summary in gradients:
        found = [columns.get((id(row.optimizer), id(row.param)), -1) for row in summary.rows]
        if -1 not in found:
            table[statistics.GRADIENTS, found] = summary.table.to(device)
    return table


def _sketch_size(params: Sequence[Tensor]) -> int:
    """Return a sketch size that is the same on all processes: none knows how much of a slice the others hold."""
    if any(map(is_slice, params)):
        return statistics.SKETCH
    return min(statistics.SKETCH, sum(param.numel() * (2 if param.is_complex() else 1) for param in params))


def _scopes(rows: Sequence[Row], plan: Plan) -> dict[Scope, list[int]]:
    """Return the rows of each scope: all, then groups, then parameters."""
    scopes: dict[Scope, list[int]] = {TOTAL: [*range(len(rows))]}
    for i, row in enumerate(rows):
        if plan.per_group:
            scopes.setdefault(("group", row.group), []).append(i)
    for i, row in enumerate(rows):
        if row.name in plan.parameters:
            scopes["parameter", row.name] = [i]
    return scopes


def _edges(bounds: Sequence[tuple[float, float]]) -> list[float]:
    """Return the edges of the histogram bins in log10, which stay the same from record to record."""
    lows, highs = zip(*bounds, strict=True)
    low, high = math.log10(max(min(lows), 1e-12)), math.log10(max(*highs, 1e-11))  # a bound may be 0
    return [low + (high - low) * i / _BINS for i in range(_BINS + 1)]


def _read(
    rows: Sequence[Row],
    plan: Plan,
    scopes: dict[Scope, list[int]],
    edges: list[float],
    arrays: dict[tuple[str, Scope], statistics.Array],
) -> Record | None:
    """Merge the processes' arrays, whose first dimension is the process, into a record."""
    table = statistics.merge(arrays["table", TOTAL].swapaxes(0, 1))
    levels = plan.quantiles
    found: dict[Scope, dict[str, float]] = {}
    histograms = {}
    total: dict[str, float] = {}
    for scope, members in scopes.items():
        values = statistics.read(statistics.merge(table[:, members]))
        if not values:
            continue
        total = total or values
        if levels:
            quantiles = arrays["quantiles", scope]
            if quantiles.ndim > 2:  # sketches
                quantiles = statistics.merged_quantiles(torch.from_numpy(quantiles), [*levels.values()]).numpy()[None]
            values |= zip(levels, quantiles[0].tolist(), strict=True)
        if ("retreats", scope) in arrays:
            values["retreats"] = arrays["retreats", scope].max()  # a process without parameters may count none
        found[scope] = {name: values[name] for name in plan.statistics if name in values}
        if plan.histogram:
            histograms[scope] = Histogram(edges, arrays["histogram", scope].sum(axis=0).tolist())
    if not total:
        return None
    half = [i for i, row in enumerate(rows) if row.param.dtype == torch.float16]
    zero = statistics.read(statistics.merge(table[:, half])).get("zero_gradient", math.nan) if half else math.nan
    losses = arrays["losses", TOTAL][0].tolist() if ("losses", TOTAL) in arrays else []
    return Record(found, histograms, total, zero, losses)
