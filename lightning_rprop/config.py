"""Structured configs for Hydra.

Every Hydra app can use the entries of ``CONFIGS`` once the package is installed (see ``hydra_plugins``), and the
dataclasses in its own structured configs. Hydra imports this module whenever an app starts, so it imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional, Tuple  # OmegaConf 2.3 reads these forms on all supported versions of Python

from lightning_rprop.monitor._names import DEFAULT

# An Enum, because OmegaConf 2.3 has no Literal. An invalid name is an error at composition that lists the choices.
Variant = Enum(
    "Variant", {"irprop-": "irprop-", "irprop+": "irprop+", "rprop-": "rprop-", "rprop+": "rprop+"}, type=str
)


@dataclass
class RpropConf:
    """Config of ``Rprop``, with the same names and defaults, without ``params``.

    ``_convert_`` turns OmegaConf containers into plain ones, so that checkpoints load with ``weights_only=True``.
    """

    _target_: str = "lightning_rprop.Rprop"
    _partial_: bool = True
    _convert_: str = "all"
    lr: float = 1e-2
    etas: Tuple[float, float] = (0.5, 1.2)
    step_sizes: Tuple[float, float] = (1e-6, 50)
    variant: Variant = Variant["irprop-"]
    weight_decay: float = 0.0
    max_iter: int = 1
    retreat: Optional[bool] = None
    maximize: bool = False
    foreach: Optional[bool] = None
    fused: Optional[bool] = None
    capturable: bool = False
    differentiable: bool = False


@dataclass
class StepSizeMonitorConf:
    """Config of ``StepSizeMonitor``, with the same names and defaults."""

    _target_: str = "lightning_rprop.StepSizeMonitor"
    _convert_: str = "all"
    logging_interval: Optional[str] = None
    every_n_steps: Optional[int] = None
    statistics: Tuple[str, ...] = DEFAULT
    per_parameter: Any = False
    per_group: bool = False
    histogram: bool = False
    prog_bar: Tuple[str, ...] = ()
    silence: Tuple[str, ...] = ()


@dataclass
class FullBatchConf:
    """Config of ``FullBatch``, with the same names and defaults."""

    _target_: str = "lightning_rprop.FullBatch"
    _convert_: str = "all"
    reduction: str = "mean"
    weight: Any = None
    log_as: Optional[str] = None
    prog_bar: bool = False
    take_over: bool = False


@dataclass
class KeepBestConf:
    """Config of ``KeepBest``, with the same names and defaults."""

    _target_: str = "lightning_rprop.KeepBest"
    _convert_: str = "all"
    restore: bool = True


@dataclass
class ConvergedConf:
    """Config of ``Converged``, with the same names and defaults."""

    _target_: str = "lightning_rprop.Converged"
    _convert_: str = "all"
    tolerance_change: Optional[float] = 1e-9
    tolerance_grad: Optional[float] = 1e-7
    tolerance_step: Optional[float] = None
    patience: int = 10
    every_n_steps: int = 10
    members: str = "all"


# Group and name -> content. Each callback has its own key, so that an app can use several.
CONFIGS: Mapping[str, Any] = {
    "optimizer/rprop": RpropConf,
    "optimizer/rprop_plus": RpropConf(variant=Variant["rprop+"]),
    "optimizer/rprop_minus": RpropConf(variant=Variant["rprop-"]),
    "optimizer/irprop_plus": RpropConf(variant=Variant["irprop+"]),
    "optimizer/irprop_minus": RpropConf(variant=Variant["irprop-"]),
    "callbacks/full_batch": {"full_batch": FullBatchConf},
    "callbacks/keep_best": {"keep_best": KeepBestConf},
    "callbacks/converged": {"converged": ConvergedConf},
    "callbacks/step_size_monitor": {"step_size_monitor": StepSizeMonitorConf},
}
