"""isinstance() by class name, because ``lightning`` and ``pytorch_lightning`` define separate classes."""

from __future__ import annotations

from typing import Any


def is_called(value: Any, name: str) -> bool:
    """Return whether the value's class, or a base class of it, has this name."""
    return any(cls.__name__ == name for cls in type(value).__mro__)
