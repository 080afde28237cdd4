"""Names of the statistics and of logged values; imports no torch, because configs and plots need only the names."""

from __future__ import annotations

import re
from functools import cache

# The start of every key.
PREFIX = "step_size/"

# The start of the keys of the members' losses in the history; the rest is the member's number.
MEMBER_LOSS = "member_loss/"

# All statistics except quantiles.
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
    "retreats",
)
# Those that need neither a sort nor logarithms.
DEFAULT = tuple(name for name in STATISTICS if name not in ("median", "std_log10"))

# The name of a quantile, in per cent.
QUANTILE = re.compile(r"q(\d+(?:\.\d+)?)")


@cache
def quantile_level(statistic: str) -> float | None:
    """Return the level of a quantile: 0.5 for ``"median"``, 0.025 for ``"q2.5"``, ``None`` for other statistics."""
    if statistic == "median":
        return 0.5
    match = QUANTILE.fullmatch(statistic)
    level = float(match[1]) / 100 if match else 2.0
    return level if level <= 1 else None


def key_of(name: str, statistic: str) -> str:
    """Return the key of a logged value.

    Args:
        name: Name of a parameter or group, ``""`` for all parameters.
        statistic: Name of the statistic.
    """
    return f"{PREFIX}{name}/{statistic}" if name else PREFIX + statistic
