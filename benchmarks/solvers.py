"""The optimizers that ``benchmarks.profile`` compares, and a run that counts evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, NAdam, Optimizer

from benchmarks.problems import Start
from lightning_rprop import Rprop

ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the first is torch's default
SGD_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1)
NOT_FINITE = 20  # a run ends after as many evaluations in a row that are not finite
FIRST_STAGE = 0.1  # the share of the evaluations that Rprop has before LBFGS

Make = Callable[[list[Tensor]], Optimizer]
_lbfgs: Make = partial(LBFGS, line_search_fn="strong_wolfe")
# The optimizers of a run one after the other, each with the share of the evaluations at which it ends
RUNS: dict[str, list[tuple[float, Make]]] = {
    **{variant: [(1, partial(Rprop, variant=variant))] for variant in ("irprop-", "irprop+", "rprop-", "rprop+")},
    **{f"Adam {rate:g}": [(1, partial(Adam, lr=rate, fused=True))] for rate in ADAM_RATES},
    **{f"SGD {rate:g}": [(1, partial(SGD, lr=rate, momentum=0.9, fused=True))] for rate in SGD_RATES},
    "NAdam": [(1, NAdam)],
    "LBFGS": [(1, _lbfgs)],
    "LBFGS 50": [(1, partial(_lbfgs, history_size=50))],
    "Rprop, LBFGS": [(FIRST_STAGE, Rprop), (1, _lbfgs)],
}
# What the tables and profiles compare. Of several runs the best for a problem and a target counts.
SOLVERS: dict[str, list[str]] = {
    **{variant: [variant] for variant in ("irprop-", "irprop+", "rprop-", "rprop+")},
    "Adam": [f"Adam {ADAM_RATES[0]:g}"],
    "Adam tuned": [f"Adam {rate:g}" for rate in ADAM_RATES],
    "SGD tuned": [f"SGD {rate:g}" for rate in SGD_RATES],
    **{name: [name] for name in ("NAdam", "LBFGS", "LBFGS 50", "Rprop, LBFGS")},
}


class Over(Exception):  # noqa: N818 (not an error)
    """Ends a run: the evaluations are used up, or too many in a row were not finite."""


class Record:
    """The loss function of a run, with a record of its evaluations.

    Attributes:
        first: The first loss.
        improvements: The evaluations that had the lowest loss so far: their number, the seconds, and the loss.
        evaluations: The number of evaluations of loss and gradient.
        not_finite: The number of evaluations whose loss was NaN or infinite.
        seconds: The duration of the run.
        error: The class of the exception that ended the run, or None.
    """

    def __init__(self, start: Start, budget: int) -> None:
        self.params, self._loss_function = start
        self._budget = budget
        self.improvements: list[tuple[int, float, float]] = []
        self.evaluations = self.not_finite = self._in_a_row = 0
        self.first = math.nan
        self.best = math.inf
        self.seconds = 0.0
        self.error: str | None = None
        self.begin = time.perf_counter()

    def closure(self) -> Tensor:
        """Compute the loss and its gradient."""
        if self.evaluations == self._budget or self._in_a_row == NOT_FINITE:
            raise Over
        for p in self.params:
            p.grad = None
        loss = self._loss_function()
        loss.backward()
        value = loss.item()
        self.evaluations += 1
        if self.evaluations == 1:
            self.first = value
        if not math.isfinite(value):
            self.not_finite += 1
            self._in_a_row += 1
            return loss
        self._in_a_row = 0
        if value < self.best:
            self.best = value
            self.improvements.append((self.evaluations, time.perf_counter() - self.begin, value))
        return loss

    def reach(self, target: float) -> tuple[int | None, float | None]:
        """Return the evaluations and seconds to a loss of at most ``target``, or None twice if it was not reached."""
        return next(((count, seconds) for count, seconds, loss in self.improvements if loss <= target), (None, None))


def run(name: str, start: Start, budget: int) -> Record:
    """Minimize until the evaluations are used up, LBFGS stops moving, or the losses stay NaN or infinite."""
    record = Record(start, budget)
    try:
        for share, make in RUNS[name]:
            minimize(record, make(record.params), share * budget)
    except Over:
        pass
    except Exception as error:  # the strong Wolfe search can raise an IndexError
        record.error = type(error).__name__
    record.seconds = time.perf_counter() - record.begin
    return record


def minimize(record: Record, optimizer: Optimizer, end: float) -> None:
    """Take steps until ``end`` evaluations are used up or LBFGS stops moving."""
    line_search = isinstance(optimizer, LBFGS)
    while record.evaluations < end:
        before = [p.detach().clone() for p in record.params] if line_search else []
        optimizer.step(record.closure)
        if line_search and all(map(torch.equal, before, record.params)):
            break
