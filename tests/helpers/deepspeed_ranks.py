"""Fit with DeepSpeedStrategy on one to three ranks and save the results for test_strategies.py."""

from __future__ import annotations

import math

import forks
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from on_cpu import DeepSpeedOnCPU
from strategy_ranks import SAMPLES, SAVED_AT, WORLDS, Begin, Fit, Rows, loader, make_trainer, small_numbers
from whole_set import Regression, make_data

from lightning_rprop import Converged, FullBatchLoader, StepSizeMonitor

STAGES = (0, 1, 2, 3)
PRECISIONS = ("bf16-mixed", "bf16-true")  # not in stage 0, where DeepSpeed steps before there is a loss
RAGGED = 103  # samples; neither micro-batches nor ranks divide it


class Ragged(Regression):
    """Records no gradients, because ZeRO keeps them to itself."""

    def on_before_optimizer_step(self, optimizer):
        pass


def whole(module, stage):
    """Return the whole parameters; in stage 3 each rank holds only a part."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        return {name: param.detach().clone() for name, param in module.named_parameters()}


class Squares(Callback):
    """Sums the squares of the gradient, or of this rank's part of it, that the inner optimizer gets."""

    def __init__(self):
        self.sum = 0.0

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self.add)  # after FullBatch's hook

    def add(self, optimizer, *args):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.sum += sum(grad.double().square().sum().item() for grad in grads)


def fit(stage, ckpt_path=None, **options):
    """Train to the end with two micro-batches per rank and return the parameters."""
    trainer, module = make_trainer(DeepSpeedOnCPU(stage), **options), Fit(net=Rows)
    trainer.fit(module, loader(math.ceil(SAMPLES / trainer.world_size / 2), small_numbers), ckpt_path=ckpt_path)
    return whole(module, stage)


def error_of(stage, callbacks=(), **options):
    """Return the error of a fit that is refused."""
    try:
        fit(stage, callbacks=callbacks, **options)
    except MisconfigurationException as error:
        return str(error)
    return None


def fits(stage, world):
    """Train in a ZeRO stage: a step on ragged data, a whole run and, on two ranks, a resumed run."""
    squares, ragged = Squares(), FullBatchLoader(make_data(RAGGED), 8)
    make_trainer(DeepSpeedOnCPU(stage), 1, [squares]).fit(Ragged(reduction="sum"), ragged)
    seen = {"squares": squares.sum}
    if world == 2:  # a DeepSpeed checkpoint needs the same number of ranks
        saved, begin = ModelCheckpoint(".", f"{stage}", every_n_train_steps=SAVED_AT), Begin()
        seen["params"] = fit(stage, callbacks=[saved], enable_checkpointing=True)
        seen["resumed"] = fit(stage, callbacks=[begin], ckpt_path=f"{stage}.ckpt")
        seen["from"] = begin.step
        seen |= {precision: fit(stage, precision=precision) for precision in PRECISIONS if stage}
    else:
        seen["params"] = fit(stage)
    if (stage, world) == (1, 1):
        seen["monitor"], seen["clip"] = error_of(stage, [StepSizeMonitor()]), error_of(stage, gradient_clip_val=0.5)
        seen["tolerance"], converged = error_of(stage, [Converged()]), Converged(1.0, None, patience=3)
        fit(stage, callbacks=[converged])
        seen["reason"] = converged.reason
    return seen


def save(rank, world):
    """Fit in all stages and save the results."""
    torch.save({stage: fits(stage, world) for stage in STAGES}, f"deepspeed-{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    DeepSpeedOnCPU(0)  # imports DeepSpeed, once for all ranks
    for world in WORLDS:
        forks.run(world, save)
