"""Full-batch training: one optimizer step is one pass over the whole data set."""

from lightning_rprop import FullBatch, FullBatchLoader  # whose error explains a missing Lightning

__all__ = ["FullBatch", "FullBatchLoader"]
