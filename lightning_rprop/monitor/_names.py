"""What can be logged, and by which names; without torch, as configs and pictures need the names alone."""

from __future__ import annotations

import re
from functools import cache

# What each key begins with.
PREFIX = "step_size/"

# What can be asked for, beside quantiles.
STATISTICS = (
    "mean",
    "min",
    "max",
    "median",
    "std_log10",
    "lower_bound",
    "upper_bound",
    "at_lower_bound",
    "at_upper_bound",
    "sign_changed",
    "zero_gradient",
    "nonfinite_gradient",
)
# Those that one pass over memory gives.
DEFAULT = tuple(name for name in STATISTICS if name not in ("median", "std_log10"))

# The name of a quantile, in per cent.
QUANTILE = re.compile(r"q(\d+(?:\.\d+)?)")


@cache
def quantile_of(statistic: str) -> float | None:
    """Give the share that a name asks the quantile of: 0.5 for ``"median"``, 0.025 for ``"q2.5"``, else ``None``."""
    if statistic == "median":
        return 0.5
    match = QUANTILE.fullmatch(statistic)
    share = float(match[1]) / 100 if match else 2.0
    return share if share <= 1 else None


def key_of(name: str, statistic: str) -> str:
    """Give the key of a statistic.

    Args:
        name: of a parameter or a group, ``""`` for all parameters.
        statistic: its name.
    """
    return f"{PREFIX}{name}/{statistic}" if name else PREFIX + statistic
