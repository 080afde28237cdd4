"""To be written."""


class Convergence:
    """To be written."""
