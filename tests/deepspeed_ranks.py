"""Fits under DeepSpeed itself, as Lightning has it for GPUs only, on one to three ranks; for test_strategies.py."""

from __future__ import annotations

import importlib
import os

import forks
import torch
from strategy_ranks import ROWS_OPTIONS, SAMPLES, STEPS, WORLDS, Rows, make_groups, small_numbers

from lightning_rprop import FullBatchLoader, Rprop


def fit(stage, rank, world):
    """Train in a loop of one's own: DeepSpeed is told which micro-batch is the last, and Rprop the loss of all."""
    import deepspeed

    net = Rows()
    optimizer = Rprop(make_groups(net.towers), **ROWS_OPTIONS)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # counts nothing here
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    loader = FullBatchLoader(small_numbers(SAMPLES), 8)
    loader.share(rank, world)
    loss = torch.zeros(())
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "loss": loss}))
    for _ in range(STEPS):
        loss.zero_()
        for micro_batch in loader.micro_batches():
            engine.set_gradient_accumulation_boundary(micro_batch.is_last)
            part = engine(*micro_batch.data)
            if not micro_batch.size:  # only keeps this rank in step with the others
                part = part * 0
            loss += part.detach()
            engine.backward(part * world)  # the ranks' mean is taken
        torch.distributed.all_reduce(loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        return {f"net.{name}": param.detach().clone() for name, param in net.named_parameters()}


def fits(rank):
    """Train in all four stages."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    world = torch.distributed.get_world_size()
    torch.save({stage: fit(stage, rank, world) for stage in range(4)}, f"deepspeed-{world}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # it would be compiled for a minute
    for world in WORLDS:
        forks.run(world, fits)
