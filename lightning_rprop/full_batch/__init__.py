"""Full-batch training: one optimizer step is one pass over the whole data set."""

from lightning_rprop.full_batch.callback import FullBatch
from lightning_rprop.full_batch.loader import FullBatchLoader

__all__ = ["FullBatch", "FullBatchLoader"]
