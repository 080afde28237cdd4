"""Many starts of one model at once, as independent members of one module."""

from __future__ import annotations

from lightning_rprop.stacked.module import Stacked

__all__ = ["Stacked"]
