"""Fit with several strategies on one, two and three ranks and save the results for test_strategies.py."""

from __future__ import annotations

import os

import forks
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lit import WEIGHTS_ONLY, trainer
from on_cpu import FSDPOnCPU
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from whole_set import whole_numbers

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

STEPS = 50
SAVED_AT = 27  # within an epoch, where iRprop+ compares losses next
SAMPLES = 50
STRATEGIES = ("ddp", "zero", "fsdp", "fsdp2", "fsdp2 full", "columns", "columns and rows")
# (strategy that loads a checkpoint, strategy that saved it); those of "fsdp" and "fsdp2" are sharded
CHECKPOINTS = (
    ("ddp", "ddp"),
    ("zero", "zero"),
    ("fsdp", "fsdp"),
    ("fsdp2", "fsdp2"),
    ("fsdp2 full", "fsdp2 full"),
    ("ddp", "fsdp2 full"),
    ("fsdp2 full", "ddp"),
)
WORLDS = (1, 2, 3)

# the precisions that each strategy supports
PRECISIONS = {
    "ddp": ("64-true", "bf16-mixed", "bf16-true", "16-mixed"),
    "zero": ("64-true", "bf16-mixed", "bf16-true", "16-mixed"),
    "fsdp": ("bf16-mixed", "bf16-true"),
    "fsdp2": ("bf16-mixed", "bf16-true"),
    "columns": ("bf16-mixed", "bf16-true"),
}

VARIANTS = ("irprop-", "irprop+", "rprop-", "rprop+")
PATHS = ({"foreach": False}, {"foreach": True}, {"fused": True})
OPTIONS = {"lr": 0.25, "etas": (0.5, 2.0), "step_sizes": (2**-10, 4.0)}
ROWS_OPTIONS = OPTIONS | {"step_sizes": (0.25, 1.0)}


def small_numbers(n):
    """Return ``n`` samples of integers so small that outputs and gradients are exact in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (n, 5), generator=generator).float()
    return x, torch.randint(-9, 10, (n, 1), generator=generator).float()


class Towers(torch.nn.Module):
    """One network per variant, initially equal; returns the sum of their losses.

    Parameters and step sizes are multiples of 2^-10, so that outputs, losses and gradients are exact.
    """

    def __init__(self, variants=VARIANTS):
        super().__init__()
        self.towers = torch.nn.ModuleList()
        for _ in variants:
            generator = torch.Generator().manual_seed(0)
            tower = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 1)).double()
            for param in tower.parameters():
                param.data = torch.randint(-4, 5, param.shape, generator=generator).double() / 4
            self.towers.append(tower)

    def forward(self, x, y):
        return sum((tower(x) - y).abs().sum() for tower in self.towers)


class Rows(Towers):
    """One layer per variant, for low precision; the loss is summed in float32, as docs/precision.md advises."""

    def __init__(self, variants=VARIANTS):
        super().__init__(())
        for _ in variants:
            layer = torch.nn.Linear(5, 1)
            layer.weight.data.fill_(0.5)
            layer.bias.data.fill_(0.25)
            self.towers.append(torch.nn.Sequential(layer))

    def forward(self, x, y):
        return sum((tower(x).float() - y.float()).abs().sum() for tower in self.towers)


def make_groups(towers, variants=VARIANTS):
    """Return groups per variant and implementation, in the parameter order that Lightning's full checkpoints need."""
    groups = []
    for i, (tower, variant) in enumerate(zip(towers, variants, strict=True)):
        params = list(tower.parameters())
        for j, some in enumerate((params[:1], params[1:3], params[3:])):
            if some:
                groups.append({"params": some, "variant": variant, **PATHS[(i + j) % len(PATHS)]})
    return groups


class Fit(pl.LightningModule):
    """Trains towers with an optimizer that uses every implementation."""

    def __init__(self, spread=None, wrap=None, variants=VARIANTS, net=Towers):
        super().__init__()
        self.net = net(variants)
        self.variants, self.spread, self.wrap = variants, spread, wrap

    def configure_model(self):
        if self.spread is not None:
            self.spread(self.net, self.device_mesh)

    def training_step(self, batch, batch_idx):
        return self.net(*batch)

    def configure_optimizers(self):
        groups = make_groups(self.net.towers, self.variants)
        options = ROWS_OPTIONS if isinstance(self.net, Rows) else OPTIONS
        return Rprop(groups, **options) if self.wrap is None else self.wrap(groups, **options)


def fully(net, mesh):
    fully_shard(net, mesh=mesh["data_parallel"])


def columns(net, mesh):
    """Shard the first layers only, so that a group mixes plain tensors and DTensors."""
    for tower in net.towers:
        parallelize_module(tower[0], mesh["tensor_parallel"], ColwiseParallel(output_layouts=Replicate()))


def columns_and_rows(net, mesh):
    for tower in net.towers:
        plan = {"0": ColwiseParallel(use_local_output=False), "1": RowwiseParallel()}
        parallelize_module(tower, mesh["tensor_parallel"], plan)


def zero(groups, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns on import

    return ZeroRedundancyOptimizer(groups, optimizer_class=Rprop, **options)


def make_trainer(strategy, steps=STEPS, callbacks=(), **options):
    options = {"devices": int(os.environ.get("WORLD_SIZE", "1")), **options}
    callbacks = [FullBatch(reduction="sum"), *callbacks]
    return trainer(".", callbacks, strategy=strategy, max_steps=steps, max_epochs=-1, **options)


def loader(size=8, data=whole_numbers):
    return FullBatchLoader(data(SAMPLES), size, steps_per_epoch=10)


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def make(name, world, net=Towers):
    """Return a strategy, its module and the micro-batch size."""
    if name in ("columns", "columns and rows"):  # slow, because every rank trains on all samples
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world)
        if name == "columns":
            return strategy, Fit(columns, net=net), 32
        return strategy, Fit(columns_and_rows, net=net), None
    if name.startswith("fsdp2"):
        full = {"save_distributed_checkpoint": name == "fsdp2"}
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, **full), Fit(fully, net=net), 8
    if name == "fsdp":
        return FSDPOnCPU(use_orig_params=True, state_dict_type="sharded"), Fit(net=net), 8
    return DDPStrategy(), Fit(wrap=zero if name == "zero" else None, net=net), 8


def parameters(strategy, module):
    if isinstance(strategy, FSDPStrategy):
        with FullyShardedDataParallel.summon_full_params(strategy.model):
            return {name: whole(param) for name, param in module.named_parameters()}
    return {name: whole(param) for name, param in module.named_parameters()}


class Begin(pl.Callback):
    """Records the step at which a run begins."""

    def on_train_start(self, trainer, *args):
        self.step = trainer.global_step


def fit(name, world):
    """Train to the end, save a checkpoint on the way, and return the results."""
    strategy, module, size = make(name, world)
    saved = ModelCheckpoint(".", f"{name}-{world}", every_n_train_steps=SAVED_AT)
    fitter = make_trainer(strategy, callbacks=[saved], enable_checkpointing=True)
    fitter.fit(module, loader(size))
    optimizer = fitter.optimizers[0]
    optimizer = getattr(optimizer, "optim", optimizer)  # inside ZeroRedundancyOptimizer
    params = parameters(strategy, module)
    optimizer.shared_loss = True  # as FullBatch sets it during a fit
    with CommDebugMode() as counted:
        optimizer.step(loss=0.0)
    return {
        "params": params,
        "placements": {
            (str(getattr(param, "placements", None)), str(getattr(state[key], "placements", None)))
            for param, state in optimizer.state.items()
            for key in ("prev", "step_size")
        },
        "collectives": counted.get_total_counts(),
        "moved": [not torch.equal(params[name], param) for name, param in parameters(strategy, module).items()],
    }


def fit_precisely(name, world):
    """Train in the precision at the end of the name and return the parameters."""
    strategy, precision = name.split(" in ")
    strategy, module, size = make(strategy, world, Rows)
    how = {"precision": precision}
    if precision == "16-mixed":  # without a GPU, Lightning needs the plugin
        how = {"plugins": [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))]}
    make_trainer(strategy, **how).fit(module, loader(size, small_numbers))
    return parameters(strategy, module)


def resume(name, world):
    """Resume from a checkpoint; ``"ddp-zero-3"`` loads with ddp what zero saved on three ranks."""
    name, saved_by, saved_on = name.split("-")
    strategy, module, size = make(name, world)
    begin = Begin()
    fitter = make_trainer(strategy, callbacks=[begin])
    fitter.fit(module, loader(size), ckpt_path=f"{saved_by}-{saved_on}.ckpt", **WEIGHTS_ONLY)
    return {"params": parameters(strategy, module), "from": begin.step}


def run(stage, world, function, names):
    """Call the function for each name on ``world`` ranks, each of which saves the results."""

    def save(rank, world):
        torch.save({name: function(name, world) for name in names}, f"{stage}-{world}-{rank}.pt")

    forks.run(world, save)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        run("fit", world, fit, STRATEGIES)
    for world in WORLDS:  # load what other numbers of ranks have saved
        pairs = [f"{loaded}-{saved}-{n}" for loaded, saved in CHECKPOINTS for n in WORLDS if n != world]
        run("resume", world, resume, pairs)
    run(
        "precise", 2, fit_precisely, [f"{name} in {precision}" for name in PRECISIONS for precision in PRECISIONS[name]]
    )
