"""The Rprop optimizer, which depends only on torch."""

# the function replaces the module of the same name as an attribute; the module stays importable
from lightning_rprop.optim.rprop import Rprop, rprop

__all__ = ["Rprop", "rprop"]
