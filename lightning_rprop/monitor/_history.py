"""What the monitor remembers for its picture: a bounded number of records, evenly over the whole run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

import torch

from lightning_rprop.monitor._logs import Series

# Records that are kept: more than a picture has room for. When they are twice as many, every other one is forgotten.
LIMIT = 400


class History:
    """Values by name and step; each record may have names of its own."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._values: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Remember a record."""
        self._steps.append(step)
        for column in self._values.values():
            column.append(math.nan)
        for name, value in values.items():
            if name not in self._values:
                self._values[name] = array("d", [math.nan]) * len(self._steps)
            self._values[name][-1] = math.inf if math.isnan(value) else value  # NaN is where there is none
        if len(self._steps) > 2 * LIMIT:  # an odd number: the first and the newest stay
            self._steps = self._steps[::2]
            self._values = {name: column[::2] for name, column in self._values.items()}

    def series(self) -> Series:
        """Give the steps and values of each name; a value that was NaN is infinite, and neither can be drawn."""
        result = {}
        for name, column in self._values.items():
            known = [(step, value) for step, value in zip(self._steps, column, strict=True) if not math.isnan(value)]
            result[name] = ([step for step, _ in known], [value for _, value in known])
        return result

    def state_dict(self) -> dict[str, Any]:
        """Give all of it, for a checkpoint."""
        values = {name: torch.tensor(column, dtype=torch.float64) for name, column in self._values.items()}
        return {"steps": torch.tensor(self._steps, dtype=torch.int64), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it from a checkpoint."""
        self._steps = array("q", state["steps"].tolist())
        self._values = {name: array("d", column.tolist()) for name, column in state["values"].items()}
