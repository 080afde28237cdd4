"""Fit members and separate models on one, two and three ranks, and save the results for test_member_loss_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace

import forks
import torch
from lightning.pytorch.strategies import DDPStrategy
from lit import trainer
from members import WAVES, Alone, Members, Outputs, compare, stacked
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_rprop import FullBatch, FullBatchLoader, Rprop
from lightning_rprop.full_batch._evaluation import Evaluation

WORLDS = (1, 2, 3)
MEMBERS = 3


class Distributed(Members):
    """Returns the losses as a DTensor."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        mesh = init_device_mesh("cpu", (self.trainer.world_size,))
        return outputs | {"member_losses": DTensor.from_local(outputs["member_losses"], mesh, [Replicate()])}


def fit(module, world, callbacks=(), data=WAVES, size=8, steps=8, **options):
    fitter = trainer(
        ".",
        [*callbacks, FullBatch(module.reduction, **options)],
        devices=world,
        strategy=DDPStrategy(),
        max_steps=steps,
        max_epochs=-1,
    )
    fitter.fit(module, FullBatchLoader(data, size, steps_per_epoch=10))
    return fitter


def results(rank, world):
    """Fit all cases and save the results."""
    seen = {}
    for variant, reduction in (("irprop+", "mean"), ("rprop-", "sum")):
        seen[variant] = compare(
            MEMBERS,
            lambda module, outputs: fit(module, world, [outputs]),
            lambda params, variant=variant: Rprop(params, variant=variant),
            reduction,
        )
    few = tuple(tensor[:2] for tensor in WAVES)  # the last of three ranks only keeps in step
    seen["few"] = compare(MEMBERS, lambda module, outputs: fit(module, world, [outputs], few))
    x, y = WAVES
    spoiled = x, y.where(torch.arange(103).unsqueeze(1) >= 60, torch.nan)

    def is_counted(batch):
        return batch[1].isfinite().all() * len(batch[1])

    left_out = compare(MEMBERS, lambda module, outputs: fit(module, world, [outputs], spoiled, 20, weight=is_counted))
    seen["weight 0"] = left_out
    outputs = Outputs()
    fit(Distributed(stacked(MEMBERS), lambda params: Rprop(params, variant="irprop+")), world, [outputs])
    seen["distributed"] = torch.stack(outputs.values)
    shorter = Members(stacked(MEMBERS), spoil=lambda losses, i: losses[: MEMBERS - rank])
    missing = (Alone if rank else Members)(stacked(MEMBERS), spoil=lambda losses, i: losses.sum() if rank else losses)
    for name, module in (("length", shorter), ("missing", missing)) if world > 1 else ():
        try:
            fit(module, world, size=None)
        except ValueError as error:
            seen[name] = str(error)
        assert torch.equal(module.net.a, stacked(MEMBERS).a)
    seen["zeroed"] = zeroed(world)
    torch.save(seen, f"{world}-{rank}.pt")


def zeroed(world):
    """Return a gradient that is sharded along the members, after the rows of members 0 and 2 were set to 0."""
    mesh = init_device_mesh("cpu", (world,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(MEMBERS, 2), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.full((MEMBERS, 2), torch.nan), mesh, [Shard(0)])
    fitter = SimpleNamespace(optimizers=[Rprop([param])])
    Evaluation.zero_gradients(SimpleNamespace(trainer=fitter), torch.tensor([True, False, True]))
    return param.grad.full_tensor()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, results)
