"""The records that ``StepSizeMonitor.plot`` draws: a bounded number, spread evenly over the run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

import torch

from lightning_rprop.monitor._logs import Series

# More records than a plot can resolve. At twice as many, every other one is dropped.
LIMIT = 400


class History:
    """Values by name and step. The names may differ between records."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._values: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a record."""
        self._steps.append(step)
        for column in self._values.values():
            column.append(math.nan)
        for name, value in values.items():
            if name not in self._values:
                self._values[name] = array("d", [math.nan]) * len(self._steps)
            self._values[name][-1] = math.inf if math.isnan(value) else value  # NaN marks a missing value
        if len(self._steps) > 2 * LIMIT:  # an odd number, so that the first and the last are kept
            self._steps = self._steps[::2]
            self._values = {name: column[::2] for name, column in self._values.items()}

    def series(self) -> Series:
        """Return the steps and values of each name. NaN is returned as infinity; neither can be drawn."""
        result = {}
        for name, column in self._values.items():
            known = [(step, value) for step, value in zip(self._steps, column, strict=True) if not math.isnan(value)]
            result[name] = ([step for step, _ in known], [value for _, value in known])
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the records for a checkpoint."""
        values = {name: torch.tensor(column, dtype=torch.float64) for name, column in self._values.items()}
        return {"steps": torch.tensor(self._steps, dtype=torch.int64), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the records from a checkpoint."""
        self._steps = array("q", state["steps"].tolist())
        self._values = {name: array("d", column.tolist()) for name, column in state["values"].items()}
