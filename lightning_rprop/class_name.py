"""Classes told by their names: Lightning comes in two packages, with classes of their own of the same names."""

from __future__ import annotations

from typing import Any


def is_called(value: Any, name: str) -> bool:
    """Tell whether a value is of a class of this name, or of one derived from it."""
    return any(cls.__name__ == name for cls in type(value).__mro__)
