"""Rprop for PyTorch Lightning.

Public names are imported on first use (PEP 562). Hydra imports this package whenever an app starts, and that must not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_rprop._hydra_ddp.ddp import hydra_ddp
    from lightning_rprop.best.callback import KeepBest
    from lightning_rprop.best.weights import BestWeights
    from lightning_rprop.config import ConvergedConf, FullBatchConf, KeepBestConf, RpropConf, StepSizeMonitorConf
    from lightning_rprop.convergence.callback import Converged
    from lightning_rprop.convergence.criteria import Convergence
    from lightning_rprop.full_batch.callback import FullBatch
    from lightning_rprop.full_batch.loader import FullBatchLoader
    from lightning_rprop.monitor.callback import StepSizeMonitor
    from lightning_rprop.optim.rprop import Rprop
    from lightning_rprop.stacked.module import Stacked

__all__ = [
    "BestWeights",
    "Converged",
    "ConvergedConf",
    "Convergence",
    "FullBatch",
    "FullBatchConf",
    "FullBatchLoader",
    "KeepBest",
    "KeepBestConf",
    "Rprop",
    "RpropConf",
    "Stacked",
    "StepSizeMonitor",
    "StepSizeMonitorConf",
    "__version__",
    "hydra_ddp",
]

_MODULE_OF = {
    "BestWeights": "lightning_rprop.best.weights",
    "Converged": "lightning_rprop.convergence.callback",
    "ConvergedConf": "lightning_rprop.config",
    "Convergence": "lightning_rprop.convergence.criteria",
    "FullBatch": "lightning_rprop.full_batch.callback",
    "FullBatchConf": "lightning_rprop.config",
    "FullBatchLoader": "lightning_rprop.full_batch.loader",
    "KeepBest": "lightning_rprop.best.callback",
    "KeepBestConf": "lightning_rprop.config",
    "Rprop": "lightning_rprop.optim.rprop",
    "RpropConf": "lightning_rprop.config",
    "Stacked": "lightning_rprop.stacked.module",
    "StepSizeMonitor": "lightning_rprop.monitor.callback",
    "StepSizeMonitorConf": "lightning_rprop.config",
    "hydra_ddp": "lightning_rprop._hydra_ddp.ddp",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULE_OF[name])
    except ModuleNotFoundError as error:
        if error.name != "lightning":
            raise
        message = (
            f"lightning_rprop.{name} needs Lightning, which is not installed: pip install lightning. "
            "Rprop, BestWeights, Convergence, Stacked and the Hydra configs work without it."
        )
        raise ModuleNotFoundError(message, name=error.name) from error
    value = getattr(module, name)
    globals()[name] = value  # so that later lookups skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
