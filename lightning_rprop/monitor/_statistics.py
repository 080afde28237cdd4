"""Statistics of step sizes and gradients: functions of tensors that do not depend on Lightning.

The statistics of each parameter are one column of a table. The table stays on the parameters' device, so that a single
transfer brings it to the host, where columns are merged: those of several parameters, or of one parameter's shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_rprop.optim._sharding import is_on_host, wide_dtype

Array = np.ndarray[Any, Any]

# The rows of a table.
_STEP_SIZES = ("count", "lower", "upper", "sum", "at_lower", "at_upper", "min", "max", "log_mean", "log_squares")
_GRADIENTS = ("gradients", "changed", "compared", "zero", "nonfinite")
_ROWS = (*_STEP_SIZES, *_GRADIENTS)
STEP_SIZES, GRADIENTS = slice(0, len(_STEP_SIZES)), slice(len(_STEP_SIZES), len(_ROWS))

_COUNT, _LOG_MEAN, _LOG_SQUARES = map(_ROWS.index, ("count", "log_mean", "log_squares"))
_MINIMA, _MAXIMA = [_ROWS.index("min"), _ROWS.index("lower")], [_ROWS.index("max"), _ROWS.index("upper")]
_EMPTY = [math.inf if i in _MINIMA else -math.inf if i in _MAXIMA else 0.0 for i in range(len(_ROWS))]

# Step sizes that a process sends to the others for a quantile; larger shards are sampled.
SKETCH = 4096


class Gradients(NamedTuple):
    """Parameters just before a step; each one's tensors are real and share shape, dtype and device."""

    grads: Sequence[Tensor]
    prevs: Sequence[Tensor | None]  # None before the first step
    params: Sequence[Tensor]
    weight_decays: Sequence[float]
    maximize: Sequence[bool]


def empty_table(n: int, device: torch.device) -> Tensor:
    """Return a table of ``n`` empty columns, shape ``(15, n)``; ``STEP_SIZES`` and ``GRADIENTS`` select its rows."""
    return torch.tensor(_EMPTY, dtype=wide_dtype(device), device=device).unsqueeze(1).repeat(1, n)


def step_size_table(
    step_sizes: Sequence[Tensor], bounds: Sequence[tuple[float, float]], *, logs: bool = False
) -> Tensor:
    """Compute the statistics of each tensor of step sizes.

    Args:
        step_sizes: At least one real tensor; shapes, floating-point dtypes and devices may differ, and tensors may be
            empty.
        bounds: The lower and upper bound of each.
        logs: Whether to compute those for ``"std_log10"`` too.

    Returns:
        The ``STEP_SIZES`` rows of a table, shape ``(10, len(step_sizes))``, on the first tensor's device.
    """
    pairs = [*zip(step_sizes, bounds, strict=True)]
    sums = _stacked([_sums(tensor, *limits) for tensor, limits in pairs])
    logarithms = _stacked([*map(_log_moments, step_sizes)]) if logs else torch.zeros_like(sums[:2])
    known = [(tensor.numel(), *limits) if tensor.numel() else (0, torch.inf, -torch.inf) for tensor, limits in pairs]
    return torch.cat([sums.new_tensor(known).T, sums, logarithms.to(sums.dtype)])


def gradient_table(gradients: Gradients) -> Tensor:
    """Count the signs of each gradient that changed since the step before.

    The signs are those that the rule compares: after weight decay, and negated under ``maximize``.

    Args:
        gradients: Of at least one parameter.

    Returns:
        The ``GRADIENTS`` rows of a table, shape ``(5, n)``, on the first tensor's device: the number of entries, of
        changed signs, of entries with two signs to compare, and of zero and nonfinite entries before weight decay.
    """
    counts = _stacked([_counts(*each) for each in zip(*gradients, strict=True)])
    changed, kept, nonzero, nonfinite = counts.to(wide_dtype(counts.device))
    entries = changed.new_tensor([grad.numel() for grad in gradients.grads])
    return torch.stack([entries, changed, changed + kept, entries - nonzero, nonfinite])


def merge(tables: Array) -> Array:
    """Merge ``k`` columns into one, on the host.

    Args:
        tables: Shape ``(15, k, ...)``, float64.

    Returns:
        The merged column, shape ``(15, ...)``.
    """
    if tables.shape[1] == 1:
        return tables[:, 0]
    merged: Array = tables.sum(axis=1)
    merged[_MINIMA] = tables[_MINIMA].min(axis=1)
    merged[_MAXIMA] = tables[_MAXIMA].max(axis=1)
    # the variance within the parts plus the variance of their means (Chan, Golub and LeVeque 1979)
    counts, means = tables[_COUNT], tables[_LOG_MEAN]
    merged[_LOG_MEAN] = (counts * means).sum(axis=0) / np.maximum(merged[_COUNT], 1)
    merged[_LOG_SQUARES] += (counts * (means - merged[_LOG_MEAN]) ** 2).sum(axis=0)
    return merged


def read(column: Array) -> dict[str, float]:
    """Return the statistics in a column of a table, without quantiles.

    Args:
        column: Shape ``(15,)``.

    Returns:
        Values by their names in ``STATISTICS``, and ``"changed_of_compared"``, the share of changed signs among those
        that could be compared. Empty without step sizes, and without gradient statistics if no gradient was counted.
    """
    row = dict(zip(_ROWS, column.tolist(), strict=True))
    count, gradients = row["count"], row["gradients"]
    if count == 0:
        return {}
    values = {
        "mean": min(max(row["sum"] / count, row["min"]), row["max"]),  # rounding must not take it out of the range
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


def quantiles(step_sizes: Sequence[Tensor], levels: Sequence[float]) -> Tensor:
    """Compute quantiles of all elements of some tensors, interpolated linearly as in ``torch.quantile``.

    Args:
        step_sizes: Real tensors of any floating-point dtypes and devices; may be empty.
        levels: From 0 to 1.

    Returns:
        The quantiles, shape ``(len(levels),)``; NaN if there are no elements.
    """
    if not any(map(Tensor.numel, step_sizes)):
        return torch.full((len(levels),), torch.nan)
    elements = _joined(step_sizes)
    places = [level * (elements.numel() - 1) for level in levels]
    indices = [math.floor(place) for place in places] + [math.ceil(place) for place in places]
    if is_on_host(elements):
        found = torch.from_numpy(np.partition(elements.numpy(), indices)[indices])
    else:
        found = elements.sort().values[indices]  # kthvalue() works on one multiprocessor of a GPU
    below, above = found.to(wide_dtype(found.device)).chunk(2)
    return below + (above - below) * below.new_tensor([place % 1 for place in places])


def sketch(step_sizes: Sequence[Tensor], size: int) -> Tensor:
    """Summarize the elements of some tensors as ``size`` weighted numbers, for ``merged_quantiles()``.

    Args:
        step_sizes: Real tensors of any floating-point dtypes and devices; may be empty.
        size: Up to this number of elements the sketch is exact; of more it holds evenly spaced order statistics.

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


def merged_quantiles(sketches: Tensor, levels: Sequence[float]) -> Tensor:
    """Compute quantiles of the elements that several sketches summarize.

    Args:
        sketches: Shape ``(k, 2, size)``.
        levels: From 0 to 1.

    Returns:
        The quantiles, shape ``(len(levels),)``; NaN if the sketches are empty.
    """
    values, weights = sketches.transpose(0, 1).flatten(start_dim=1)
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        return torch.full((len(levels),), torch.nan, dtype=torch.float64)
    order = values.argsort()
    values, ends = values[order], weights[order].cumsum(dim=0)
    places = torch.tensor(levels, dtype=torch.float64) * (ends[-1] - 1).clamp(min=0)
    indices = torch.stack([places.floor(), places.ceil()])
    below, above = values[torch.searchsorted(ends, indices, right=True).clamp(max=len(values) - 1)]
    result: Tensor = below + (above - below) * places.frac()
    return result


def histogram(step_sizes: Sequence[Tensor], low: float, high: float, bins: int) -> Tensor:
    """Count all elements of some tensors by their log10.

    Args:
        step_sizes: Real tensors of any floating-point dtypes and devices; may be empty.
        low: Start of the first bin, a log10. Smaller elements count there too.
        high: End of the last bin. Larger elements count there too.
        bins: Number of bins, all of the same width.

    Returns:
        The counts, shape ``(bins,)``.
    """
    if not step_sizes:
        return torch.zeros(bins)
    logarithms = _joined(step_sizes).log10().clamp(low, high)
    return torch.histc(logarithms, bins, low, high)


def _sums(tensor: Tensor, lower: float, upper: float) -> Tensor:
    """Return sum, number at each bound, minimum and maximum of a tensor."""
    dtype = wide_dtype(tensor.device)
    if not tensor.numel():
        return tensor.new_tensor([0, 0, 0, torch.inf, -torch.inf], dtype=dtype)
    at_lower, at_upper = torch.count_nonzero(tensor <= lower), torch.count_nonzero(tensor >= upper)
    return torch.stack([tensor.sum(dtype=dtype), at_lower, at_upper, *torch.aminmax(tensor)])


def _log_moments(tensor: Tensor) -> Tensor:
    """Return mean and sum of squared deviations of log10 of a tensor."""
    if not tensor.numel():
        return tensor.new_zeros(2)
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    variance, mean = torch.var_mean(tensor.log10(), correction=0)
    return torch.stack([mean, variance * tensor.numel()])


def _counts(grad: Tensor, prev: Tensor | None, param: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    """Count changed signs, kept signs, nonzero and nonfinite entries of a gradient."""
    nonzero = torch.count_nonzero(grad)
    nonfinite = torch.count_nonzero(grad - grad)  # 0 if finite, else NaN; isfinite() is several passes over memory
    if prev is None:
        return torch.stack([torch.zeros_like(nonzero), torch.zeros_like(nonzero), nonzero, nonfinite])
    signed = (-grad if maximize else grad).add(param, alpha=weight_decay) if weight_decay or maximize else grad
    agreement = signed.sign().mul_(prev.sign())  # a product of gradients would underflow
    return torch.stack([torch.count_nonzero(agreement < 0), torch.count_nonzero(agreement > 0), nonzero, nonfinite])


def _stacked(columns: Sequence[Tensor]) -> Tensor:
    device = columns[0].device
    return torch.stack([column.to(device) for column in columns], dim=1)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements as one vector, in a dtype that can be sorted and has logarithms."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.cat([tensor.detach().flatten().to(tensors[0].device, dtype) for tensor in tensors])
