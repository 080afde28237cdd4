"""The Rprop family: four names, two switches.

The four adapt the step sizes alike and move alike, except where the sign of a gradient changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

Variant: TypeAlias = Literal["irprop-", "irprop+", "rprop-", "rprop+"]


class AtFlip(NamedTuple):
    """What a variant does with a weight whose gradient changed its sign.

    Attributes:
        forget: Store 0 as its gradient, so that the next step does not adapt, and make no ordinary move.
        take_back: Undo its last move instead; ``None``: only if the loss rose.
    """

    forget: bool
    take_back: bool | None


AT_FLIP: Mapping[str, AtFlip] = {
    "irprop-": AtFlip(forget=True, take_back=False),  # Igel and Huesken 2003
    "irprop+": AtFlip(forget=True, take_back=None),  # Igel and Huesken 2003
    "rprop-": AtFlip(forget=False, take_back=False),  # Riedmiller 1994
    "rprop+": AtFlip(forget=True, take_back=True),  # Riedmiller and Braun 1993
}
