"""To be written."""


class Converged:
    """To be written."""
