"""The weights with the lowest loss of a run.

The public names are imported on first use (PEP 562), because ``BestWeights`` needs no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rprop.best.callback import KeepBest
    from lightning_rprop.best.weights import BestWeights

__all__ = ["BestWeights", "KeepBest"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import lightning_rprop

    return getattr(lightning_rprop, name)  # whose error explains a missing Lightning
