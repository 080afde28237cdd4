"""Checks of the monitor's arguments. Each error names the argument, its value and a valid one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lightning_rprop.monitor._names import STATISTICS, quantile_level


def check_interval(logging_interval: Any, every_n_steps: Any) -> int | None:
    """Return ``every_n_steps`` as an ``int``, or ``None`` to follow the Trainer."""
    if logging_interval not in (None, "step", "epoch"):
        raise ValueError(f"logging_interval must be 'step', 'epoch' or None, got {logging_interval!r}")
    if every_n_steps is None:
        return None
    if _as_integer(every_n_steps) < 1:
        raise ValueError(
            f"every_n_steps must be a number of steps >= 1, or None, got {every_n_steps!r}. Pass an integer such as "
            "10, or None to follow Trainer(log_every_n_steps=...)"
        )
    if logging_interval == "epoch":
        raise ValueError(
            f"every_n_steps={every_n_steps} needs logging_interval='step', got 'epoch'. Leave one of them out"
        )
    return _as_integer(every_n_steps)


def check_statistics(value: Any) -> tuple[str, ...]:
    """Return the statistics as a tuple."""
    names = _as_strings(value)
    if not names or not all(map(_is_statistic, names)):
        raise ValueError(
            f"statistics must be a list of some of {', '.join(STATISTICS)}, or quantiles such as 'q10', got {value!r}"
            + (f". Pass [{value!r}]" if isinstance(value, str) and _is_statistic(value) else "")
        )
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"statistics must name each one once, got {value!r}. Remove the second {min(repeated)!r}")
    return names


def check_patterns(value: Any) -> bool | tuple[str, ...]:
    """Return ``per_parameter`` as a bool or a tuple of patterns."""
    if _is_flag(value):
        return bool(value)
    patterns = (value,) if isinstance(value, str) else _as_strings(value)
    if patterns is None or "" in patterns:
        raise ValueError(
            f"per_parameter must be True, False, or patterns of parameters' names, got {value!r}. Pass a pattern such "
            "as 'encoder.*', or a list of patterns"
        )
    return patterns


def check_flag(name: str, value: Any) -> bool:
    """Return a flag as a ``bool``."""
    if not _is_flag(value):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str], origin: str = "") -> tuple[str, ...]:
    """Return a selection of the choices as a tuple; ``origin`` names the argument that lists them."""
    chosen, choices = _as_strings(value), [*choices]
    if chosen is None or not set(chosen) <= set(choices):
        known = f"{origin}={choices}" if origin else ", ".join(choices)
        remedy = f". Pass [{value!r}]" if isinstance(value, str) and value in choices else ""
        raise ValueError(f"{name} must be a list of some of {known}, got {value!r}{remedy}")
    return chosen


def _as_integer(value: Any) -> int:
    """Return an integer of any type (NumPy included) as an ``int``, and 0 for anything else."""
    try:
        return 0 if _is_flag(value) else operator.index(value)
    except TypeError:
        return 0


def _is_statistic(name: str) -> bool:
    return name in STATISTICS or quantile_level(name) is not None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _as_strings(value: Any) -> tuple[str, ...] | None:
    """Return an iterable of strings as a tuple, and ``None`` for anything else."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return None
    strings = tuple(value)
    return strings if all(isinstance(each, str) for each in strings) else None
