"""The optimizer: knows tensors, knows nothing of Lightning or Hydra."""

from lightning_rprop.optim.functional import rprop
from lightning_rprop.optim.rprop import Rprop

__all__ = ["Rprop", "rprop"]
