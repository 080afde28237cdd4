"""Writing a record to a logger, through the logger's public interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_rprop._lightning import is_called
from lightning_rprop.monitor._record import Histogram


def send(logger: Any, metrics: Mapping[str, float], histograms: Mapping[str, Histogram], step: int) -> None:
    """Log the metrics in one call, and the histograms if the logger supports them (W&B, TensorBoard).

    Args:
        logger: Any Lightning logger.
        metrics: Values by name.
        histograms: Histograms by name.
        step: The step to log them at.
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
            centers, weights = (np.asarray(edges[1:]) + edges[:-1]) / 2, np.asarray(counts)
            occupied = np.flatnonzero(weights)
            writer.add_histogram_raw(
                name,
                min=edges[occupied[0]],
                max=edges[occupied[-1] + 1],
                num=int(weights.sum()),
                sum=float((weights * centers).sum()),
                sum_squares=float((weights * centers**2).sum()),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=step,
            )
