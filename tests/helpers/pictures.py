"""The files that plots are saved to."""

from pathlib import Path


def is_png(path: Path) -> bool:
    """Return whether a file begins as a PNG does."""
    return path.read_bytes().startswith(b"\x89PNG")
