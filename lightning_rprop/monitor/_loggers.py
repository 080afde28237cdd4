"""A record for a logger, by the logger's public interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_rprop._lightning import is_called
from lightning_rprop.monitor._record import Histogram


def send(logger: Any, metrics: Mapping[str, float], histograms: Mapping[str, Histogram], step: int) -> None:
    """Log the metrics in one call, and histograms if the logger has them.

    Args:
        logger: any of Lightning's.
        metrics: values by name.
        histograms: by name.
        step: to log them at.
    """
    values: dict[str, Any] = dict(metrics)
    if histograms and is_called(logger, "WandbLogger"):
        import wandb

        for name, (edges, counts) in histograms.items():
            values[name] = wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
    logger.log_metrics(values, step=step)
    writer: Any = getattr(logger, "experiment", None) if histograms else None
    if hasattr(writer, "add_histogram_raw"):  # TensorBoard
        for name, (edges, counts) in histograms.items():
            middles, weights = (np.asarray(edges[1:]) + edges[:-1]) / 2, np.asarray(counts)
            occupied = np.flatnonzero(weights)
            writer.add_histogram_raw(
                name,
                min=edges[occupied[0]],
                max=edges[occupied[-1] + 1],
                num=int(weights.sum()),
                sum=float((weights * middles).sum()),
                sum_squares=float((weights * middles**2).sum()),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=step,
            )
