"""Rprop for PyTorch Lightning.

The public names are loaded when they are first used (PEP 562): Hydra imports this package at the start of every app on
the machine, so importing it must not cost an import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_rprop.config import FullBatchConf, RpropConf, StepSizeMonitorConf
    from lightning_rprop.full_batch.callback import FullBatch
    from lightning_rprop.full_batch.loader import FullBatchLoader
    from lightning_rprop.hydra_job.ddp import hydra_ddp
    from lightning_rprop.monitor.callback import StepSizeMonitor
    from lightning_rprop.optim.rprop import Rprop

__all__ = [
    "FullBatch",
    "FullBatchConf",
    "FullBatchLoader",
    "Rprop",
    "RpropConf",
    "StepSizeMonitor",
    "StepSizeMonitorConf",
    "__version__",
    "hydra_ddp",
]

_HOME = {
    "FullBatch": "lightning_rprop.full_batch.callback",
    "FullBatchConf": "lightning_rprop.config",
    "FullBatchLoader": "lightning_rprop.full_batch.loader",
    "Rprop": "lightning_rprop.optim.rprop",
    "RpropConf": "lightning_rprop.config",
    "StepSizeMonitor": "lightning_rprop.monitor.callback",
    "StepSizeMonitorConf": "lightning_rprop.config",
    "hydra_ddp": "lightning_rprop.hydra_job.ddp",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
