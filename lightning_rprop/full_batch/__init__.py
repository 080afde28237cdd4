"""Full-batch training: one optimizer step is one pass over the whole data set."""

from lightning_rprop import FullBatch, FullBatchLoader  # there, a missing Lightning is explained

__all__ = ["FullBatch", "FullBatchLoader"]
