"""Step sizes in, numbers out: knows tensors, knows nothing of Lightning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

STATISTICS = ("mean", "min", "max")


def summarize(step_sizes: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Compute each of ``STATISTICS`` over all step sizes and for every tensor of them.

    Args:
        step_sizes: Tensors of any shape and floating-point or complex dtype by name; a complex element is two step
            sizes, an empty tensor is left out.

    Returns:
        ``{statistic: value}`` over all elements of all tensors (empty if there are none), and
        ``{name: {statistic: value}}``, in the step sizes' unit. One synchronisation a device, however many tensors.
    """
    names: dict[torch.device, list[str]] = defaultdict(list)
    rows: dict[torch.device, list[Tensor]] = defaultdict(list)
    for name, step_size in step_sizes.items():
        if step_size.numel() == 0:
            continue
        real = torch.view_as_real(step_size) if step_size.is_complex() else step_size
        wide = torch.float32 if real.device.type == "mps" else torch.float64  # else a mean may leave [min, max]
        low, high = torch.aminmax(real)
        names[real.device].append(name)
        rows[real.device].append(torch.stack([real.mean(dtype=wide), low.to(wide), high.to(wide)]))

    values = {name: row for on in rows for name, row in zip(names[on], torch.stack(rows[on]).tolist(), strict=True)}
    each = {name: dict(zip(STATISTICS, values[name], strict=True)) for name in step_sizes if name in values}
    if not each:
        return {}, {}
    sizes = {name: step_sizes[name].numel() * (2 if step_sizes[name].is_complex() else 1) for name in each}
    overall = {
        "mean": sum(sizes[name] * row["mean"] for name, row in each.items()) / sum(sizes.values()),
        "min": min(row["min"] for row in each.values()),
        "max": max(row["max"] for row in each.values()),
    }
    return overall, each
