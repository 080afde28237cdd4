"""Logs and plots of step sizes.

The public names are imported on first use (PEP 562), because the Hydra configs and the plot command import this package
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rprop.monitor.callback import StepSizeMonitor
    from lightning_rprop.monitor.plot import plot_run

__all__ = ["StepSizeMonitor", "plot_run"]


def __getattr__(name: str) -> Any:
    if name == "StepSizeMonitor":
        from lightning_rprop import StepSizeMonitor  # which explains a missing Lightning

        return StepSizeMonitor
    if name == "plot_run":
        from lightning_rprop.monitor.plot import plot_run

        return plot_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
