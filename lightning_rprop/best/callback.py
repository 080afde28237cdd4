"""To be written."""


class KeepBest:
    """To be written."""
