"""Fit with losses that are bad on one rank only, and save the results for test_bad_loss_ranks.py."""

from __future__ import annotations

import warnings

import forks
import torch
from domain import Domain
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lit import Recorder, trainer
from torch.distributed._composable.fsdp import fully_shard
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor

WORLD = 2


class Shifted(Domain):
    """Has a smaller domain for samples with a larger shift, which the last rank has."""

    def training_step(self, batch, batch_idx):
        w = self.w - batch.mean()
        loss = (w - 2 * w.sqrt()).sum()
        self.losses.append(loss.item())
        return loss


class Sharded(Regression):
    """Has a NaN in the last row of a weight."""

    def configure_model(self):
        with torch.no_grad():
            self.net[0].weight[-1, 2] = torch.nan
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Own:
    """Batches of which the last rank reads its own only once."""

    def __init__(self, rank, batches):
        self.batches = iter(batches) if rank else batches

    def __iter__(self):
        return iter(self.batches)


def zero(params):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns on import

    return ZeroRedundancyOptimizer(params, optimizer_class=Rprop, lr=1.2)


def fit(module, data, strategy=None, steps=100, size=2):
    """Return the error, the warnings, the records of retreats, and the parameters."""
    log, monitor = Recorder(), StepSizeMonitor(every_n_steps=1)
    fitter = trainer(
        ".",
        [FullBatch(), monitor],
        logger=log,
        devices=WORLD,
        strategy=strategy or DDPStrategy(),
        max_steps=steps,
        max_epochs=-1,
    )
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitter.fit(module, FullBatchLoader(data, size, steps_per_epoch=10))
        except RuntimeError as failure:
            error = str(failure)
    return {
        "error": error,
        "warnings": [str(each.message) for each in caught if "took back" in str(each.message)],
        "losses": getattr(module, "losses", []),
        "published": fitter.callback_metrics.get("step_size/retreats"),
        "params": [param.detach() for param in module.parameters()] if error is None else [],
    }


def shifts(last):
    return torch.tensor([0.0] * 4 + [last] * 4).unsqueeze(1)


def fits(rank, world):
    """Fit all cases and save the results."""
    x, y = make_data(12)
    seen = {}
    for variant in ("irprop-", "irprop+", "rprop-", "rprop+"):
        seen[variant] = fit(Shifted(lambda p, variant=variant: Rprop(p, lr=1.2, variant=variant)), shifts(0.5))
    seen["zero"] = fit(Shifted(zero), shifts(0.5))
    seen["first"] = fit(Shifted(Rprop), shifts(2.0))
    late = Domain(lambda p: Rprop(p, lr=0.01), bad=range(12, 100) if rank else ())
    seen["late"] = fit(late, torch.ones(8, 1), steps=40)
    y[8] = torch.inf
    seen["input"] = fit(Regression(), (x, y))
    seen["once"] = fit(Regression(), Own(rank, [(x, y)]), size=None)
    parallel = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    seen["sharded"] = fit(Sharded(), make_data(12), parallel)
    torch.save(seen, f"seen-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks.run(WORLD, fits)
