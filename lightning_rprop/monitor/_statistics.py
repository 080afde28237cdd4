"""Step sizes and gradients in, numbers out: knows tensors, knows nothing of Lightning.

The figures of a parameter are a column of a table, which stays on the parameters' device, so that one transfer brings
all of them to the host. Columns merge: those of several parameters, and those of the shards of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_rprop.monitor import _statistics_cpu as statistics_cpu

Array = np.ndarray[Any, Any]

# The rows of a table: what is known of the step sizes, and of the gradients, of each parameter.
_STEP_SIZES = ("count", "sum", "at_lower", "at_upper", "min", "max", "lower", "upper", "log_mean", "log_squares")
_GRADIENTS = ("gradients", "changed", "compared", "zero", "nonfinite")
_ROWS = (*_STEP_SIZES, *_GRADIENTS)
STEP_SIZES, GRADIENTS = slice(0, len(_STEP_SIZES)), slice(len(_STEP_SIZES), len(_ROWS))

_COUNT, _LOG_MEAN, _LOG_SQUARES = map(_ROWS.index, ("count", "log_mean", "log_squares"))
_LEAST, _MOST = [_ROWS.index("min"), _ROWS.index("lower")], [_ROWS.index("max"), _ROWS.index("upper")]

# How many step sizes a process tells the others of, to find a quantile: those of a larger shard are thinned out.
SKETCH = 4096


class Gradients(NamedTuple):
    """Parameters just before a step, in lists; of each the tensors are real, of one shape, dtype and device."""

    grads: Sequence[Tensor]
    prevs: Sequence[Tensor | None]  # none before the first step
    params: Sequence[Tensor]
    weight_decays: Sequence[float]
    maximize: Sequence[bool]


def empty_table(n: int, device: torch.device) -> Tensor:
    """Make a table of nothing, of shape ``(15, n)``: ``STEP_SIZES`` and ``GRADIENTS`` are its parts."""
    return _empty_table(n, device).clone()


def step_size_table(
    step_sizes: Sequence[Tensor], bounds: Sequence[tuple[float, float]], *, logs: bool = False
) -> Tensor:
    """Sum up step sizes, tensor by tensor.

    Args:
        step_sizes: real tensors of any shape, floating-point dtype and device, one at least; an empty one counts for
            nothing.
        bounds: the lower and the upper bound of each, in the step sizes' unit.
        logs: whether to look at their logarithms too, for ``"std_log10"``.

    Returns:
        The upper part of a table, of shape ``(10, len(step_sizes))``, on the first tensor's device.
    """
    sums = statistics_cpu.sum_up(step_sizes, bounds)
    if sums is None:
        sums = _stacked([_sum_up(tensor, *both) for tensor, both in zip(step_sizes, bounds, strict=True)])
    logarithms = _stacked([*map(_log_moments, step_sizes)]) if logs else torch.zeros_like(sums[:2])
    return torch.cat([sums, logarithms])


def gradient_table(gradients: Gradients) -> Tensor:
    """Compare gradients with those of the step before, parameter by parameter.

    The signs are those that the rule compares: with the weight decay added, and turned where it maximizes.

    Args:
        gradients: of one parameter at least.

    Returns:
        The lower part of a table, of shape ``(5, n)``, on the first tensor's device: how many entries, how
        many changed their sign, how many had two signs to compare, and how many are exactly zero or not finite (before
        the weight decay).
    """
    counts = statistics_cpu.compare(gradients)
    return _stacked([_compare(*each) for each in zip(*gradients, strict=True)]) if counts is None else counts


def merge(tables: Array) -> Array:
    """Make one column of many, on the host.

    Args:
        tables: shape ``(15, k, ...)``, float64.

    Returns:
        What the ``k`` come to together, of shape ``(15, ...)``.
    """
    merged: Array = tables.sum(axis=1)
    merged[_LEAST] = tables[_LEAST].min(axis=1)
    merged[_MOST] = tables[_MOST].max(axis=1)
    # the variance of all is that within the parts and that of their means (Chan, Golub and LeVeque 1979)
    counts, means = tables[_COUNT], tables[_LOG_MEAN]
    merged[_LOG_MEAN] = (counts * means).sum(axis=0) / np.maximum(merged[_COUNT], 1)
    merged[_LOG_SQUARES] += (counts * (means - merged[_LOG_MEAN]) ** 2).sum(axis=0)
    return merged


def read(column: Array) -> dict[str, float]:
    """Read the statistics off a column of a table, but for the quantiles.

    Args:
        column: shape ``(15,)``.

    Returns:
        Values by the names in ``STATISTICS``, and ``"changed_of_compared"``, the share of changed signs where there
        were two; without those of gradients that nobody looked at, and empty if there is no step size.
    """
    row = dict(zip(_ROWS, column.tolist(), strict=True))
    count, gradients = row["count"], row["gradients"]
    if count == 0:
        return {}
    values = {
        "mean": min(max(row["sum"] / count, row["min"]), row["max"]),  # rounding may lead out of them
        "min": row["min"],
        "max": row["max"],
        "std_log10": (row["log_squares"] / count) ** 0.5,
        "lower_bound": row["lower"],
        "upper_bound": row["upper"],
        "at_lower_bound": row["at_lower"] / count,
        "at_upper_bound": row["at_upper"] / count,
    }
    if gradients:
        values["sign_changed"] = row["changed"] / gradients
        values["zero_gradient"] = row["zero"] / gradients
        values["nonfinite_gradient"] = row["nonfinite"]
    if row["compared"]:
        values["changed_of_compared"] = row["changed"] / row["compared"]
    return values


def quantiles(step_sizes: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Find quantiles of all elements of some tensors, between two of them on the line that joins them.

    Args:
        step_sizes: real tensors of any floating-point dtype and device, with one element at least.
        shares: which quantiles, from 0 to 1.

    Returns:
        The quantiles, shape ``(len(shares),)``, as ``torch.quantile`` has them, but for any number of elements.
    """
    places = [share * (sum(map(Tensor.numel, step_sizes)) - 1) for share in shares]
    indices = [math.floor(place) for place in places] + [math.ceil(place) for place in places]
    found = statistics_cpu.order_statistics(step_sizes, indices)
    if found is None:
        ordered = _joined(step_sizes).sort().values[indices]
        found = ordered.to(_wide_dtype(ordered.device))
    below, above = found.chunk(2)
    return below + (above - below) * below.new_tensor([place % 1 for place in places])


def sketch(step_sizes: Sequence[Tensor], size: int) -> Tensor:
    """Describe the elements of some tensors by a few numbers with weights, for :func:`merged_quantiles`.

    Args:
        step_sizes: real tensors of any floating-point dtype and device; there may be none.
        size: of how many numbers. No more elements than that are described exactly; of more, as many are taken at equal
            distances in their order.

    Returns:
        Numbers and weights, shape ``(2, size)``, float64.
    """
    ordered = _joined(step_sizes).sort().values if step_sizes else torch.zeros(0)
    n, result = len(ordered), torch.zeros(2, size, dtype=torch.float64, device=ordered.device)
    taken = min(n, size)
    if taken:
        middles = (torch.arange(taken, dtype=torch.float64, device=ordered.device) + 0.5) * (n / taken)
        result[0, :taken] = ordered[middles.long()]
        result[1, :taken] = n / taken
    return result


def merged_quantiles(sketches: Tensor, shares: Sequence[float]) -> Tensor:
    """Find quantiles of what several sketches describe.

    Args:
        sketches: shape ``(k, 2, size)``.
        shares: which quantiles, from 0 to 1.

    Returns:
        The quantiles, shape ``(len(shares),)``; NaN if nothing is described.
    """
    values, weights = sketches.transpose(0, 1).flatten(start_dim=1)
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        return torch.full((len(shares),), torch.nan, dtype=torch.float64)
    order = values.argsort()
    values, ends = values[order], weights[order].cumsum(dim=0)
    places = torch.tensor(shares, dtype=torch.float64) * (ends[-1] - 1).clamp(min=0)
    indices = torch.stack([places.floor(), places.ceil()])
    below, above = values[torch.searchsorted(ends, indices, right=True).clamp(max=len(values) - 1)]
    result: Tensor = below + (above - below) * places.frac()
    return result


def histogram(step_sizes: Sequence[Tensor], low: float, high: float, bins: int) -> Tensor:
    """Count all elements by their log10.

    Args:
        step_sizes: real tensors of any floating-point dtype and device; there may be none.
        low: log10 where the first bin begins, which takes what is less, too.
        high: log10 where the last bin ends, which takes what is more, too.
        bins: how many bins, all of one width.

    Returns:
        The counts, shape ``(bins,)``.
    """
    if not step_sizes:
        return torch.zeros(bins)
    logarithms = _joined(step_sizes).log10().clamp(low, high)
    return torch.histc(logarithms, bins, low, high)


@lru_cache(maxsize=8)
def _empty_table(n: int, device: torch.device) -> Tensor:
    table = torch.zeros(len(_ROWS), n, dtype=_wide_dtype(device), device=device)
    table[_LEAST], table[_MOST] = torch.inf, -torch.inf
    return table


def _sum_up(tensor: Tensor, lower: float, upper: float) -> Tensor:
    if not tensor.numel():
        return _column(tensor, 0, 0, 0, 0, torch.inf, -torch.inf, torch.inf, -torch.inf)
    total = tensor.sum(dtype=_wide_dtype(tensor.device))
    at_lower, at_upper = (tensor <= lower).sum(), (tensor >= upper).sum()
    return _column(tensor, tensor.numel(), total, at_lower, at_upper, *torch.aminmax(tensor), lower, upper)


def _log_moments(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return _column(tensor, 0, 0)
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    variance, mean = torch.var_mean(tensor.log10(), correction=0)
    return _column(tensor, mean, variance * tensor.numel())


def _compare(grad: Tensor, prev: Tensor | None, param: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    zero, nonfinite = (grad == 0).sum(), (~grad.isfinite()).sum()
    changed: Tensor | int = 0
    compared: Tensor | int = 0
    if prev is not None:
        signed = (-grad if maximize else grad).add(param, alpha=weight_decay) if weight_decay or maximize else grad
        agreement = signed.sign() * prev.sign()  # NaN where the gradient is NaN
        changed, compared = (agreement < 0).sum(), ((agreement < 0) | (agreement > 0)).sum()
    return _column(grad, grad.numel(), changed, compared, zero, nonfinite)


def _column(like: Tensor, *values: Tensor | float) -> Tensor:
    """Put numbers and tensors of one element together, on their device, without bringing one to the host."""
    dtype = _wide_dtype(like.device)
    return torch.stack([torch.as_tensor(value, dtype=dtype, device=like.device) for value in values])


def _stacked(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack([column.to(columns[0].device) for column in columns], dim=1)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Give all elements of some tensors in one vector, in a dtype that torch can sort and take logarithms of."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.cat([tensor.detach().flatten().to(tensors[0].device, dtype) for tensor in tensors])


def _wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs do not have
