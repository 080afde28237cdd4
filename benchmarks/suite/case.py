"""A problem of the suite."""

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.problems import Start


class Case(NamedTuple):
    """A problem without a target: what kind it is, what it is, and how to start it.

    ``start`` draws the parameters, and in some problems the data, from torch's random state. ``known`` is a loss that
    can be reached, for problems on which all optimizers may fail.
    """

    kind: str
    about: str
    start: Callable[[], Start]
    known: float = math.inf
