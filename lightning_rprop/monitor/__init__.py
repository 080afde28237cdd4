"""What the step sizes are doing."""

from lightning_rprop.monitor.callback import StepSizeMonitor

__all__ = ["StepSizeMonitor"]
