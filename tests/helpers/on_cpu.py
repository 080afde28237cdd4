"""Lightning strategies for GPUs, adapted to run on a CPU."""

from __future__ import annotations

import importlib
import os

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.fsdp import FullyShardedDataParallel


class FSDPOnCPU(FSDPStrategy):
    """FSDPStrategy on the CPU; Lightning refuses that by class name (lightning issue 21812)."""

    def _setup_model(self, model):
        options = {"mixed_precision": self.mixed_precision_config, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options, **self.kwargs)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """DeepSpeedStrategy without the check for GPUs and without a device number; stage 0 means no ZeRO."""

    def __init__(self, stage):
        os.environ["DS_ACCELERATOR"] = "cpu"
        super().__init__(stage=stage, zero_optimization=stage > 0, logging_level=40)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # compiling it takes a minute

    def setup_environment(self):
        Strategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        config = {**self.config, "zero_force_ds_cpu_optimizer": False}
        engine, optimizer, *_ = deepspeed.initialize(config=config, model=model, optimizer=optimizer)
        return engine, optimizer
