"""To be written."""


class BestWeights:
    """To be written."""
