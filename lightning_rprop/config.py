"""Hydra structured configs: plain dataclasses without torch, because Hydra imports this module whenever an app starts.

Any Hydra app finds the entries of ``CONFIGS`` once the package is installed (``hydra_plugins/lightning_rprop``). Apps
with their own structured configs can use the dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional, Tuple  # noqa: UP035 (OmegaConf 2.3 reads these forms on every Python that we support)

from lightning_rprop.monitor._names import DEFAULT

# An Enum, because OmegaConf 2.3 has no Literal: a wrong name is refused at composition, with the list of choices.
Variant = Enum(
    "Variant", {"irprop-": "irprop-", "irprop+": "irprop+", "rprop-": "rprop-", "rprop+": "rprop+"}, type=str
)


@dataclass
class RpropConf:
    """Config of :class:`lightning_rprop.Rprop`: the same names and defaults, without ``params``.

    ``_convert_`` keeps OmegaConf containers out of the optimizer; its checkpoints would not load otherwise.
    """

    _target_: str = "lightning_rprop.Rprop"
    _partial_: bool = True
    _convert_: str = "all"
    lr: float = 1e-2
    etas: Tuple[float, float] = (0.5, 1.2)  # noqa: UP006
    step_sizes: Tuple[float, float] = (1e-6, 50)  # noqa: UP006
    variant: Variant = Variant["irprop-"]
    weight_decay: float = 0.0
    max_iter: int = 1
    maximize: bool = False
    foreach: Optional[bool] = None  # noqa: UP045
    fused: Optional[bool] = None  # noqa: UP045
    capturable: bool = False
    differentiable: bool = False


@dataclass
class StepSizeMonitorConf:
    """Config of :class:`lightning_rprop.StepSizeMonitor`: the same names and defaults."""

    _target_: str = "lightning_rprop.StepSizeMonitor"
    _convert_: str = "all"
    logging_interval: Optional[str] = None  # noqa: UP045
    every_n_steps: Optional[int] = None  # noqa: UP045
    statistics: Tuple[str, ...] = DEFAULT  # noqa: UP006
    per_parameter: Any = False
    per_group: bool = False
    histogram: bool = False
    prog_bar: Tuple[str, ...] = ()  # noqa: UP006
    silence: Tuple[str, ...] = ()  # noqa: UP006


@dataclass
class FullBatchConf:
    """Config of :class:`lightning_rprop.FullBatch`: the same names and defaults."""

    _target_: str = "lightning_rprop.FullBatch"
    _convert_: str = "all"
    reduction: str = "mean"
    weight: Any = None
    log_as: Optional[str] = None  # noqa: UP045
    prog_bar: bool = False
    take_over: bool = False


# Group and name to content. Each callback has its own key, so that an app can list several.
CONFIGS: Mapping[str, Any] = {
    "optimizer/rprop": RpropConf,
    "optimizer/rprop_plus": RpropConf(variant=Variant["rprop+"]),
    "optimizer/rprop_minus": RpropConf(variant=Variant["rprop-"]),
    "optimizer/irprop_plus": RpropConf(variant=Variant["irprop+"]),
    "optimizer/irprop_minus": RpropConf(variant=Variant["irprop-"]),
    "callbacks/full_batch": {"full_batch": FullBatchConf},
    "callbacks/step_size_monitor": {"step_size_monitor": StepSizeMonitorConf},
}
