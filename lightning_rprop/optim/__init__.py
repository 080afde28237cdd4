"""The optimizer: knows tensors, knows nothing of Lightning or Hydra."""

# binds the function over the module of that name, which stays importable
from lightning_rprop.optim.rprop import Rprop, rprop

__all__ = ["Rprop", "rprop"]
