"""The names of the Rprop family."""

from __future__ import annotations

from typing import Literal, TypeAlias

Variant: TypeAlias = Literal["irprop-", "irprop+", "rprop-", "rprop+"]
