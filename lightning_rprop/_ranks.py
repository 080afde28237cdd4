"""Check at the start of a fit that all ranks are set up alike, and exchange values between them.

Neither DDP nor FSDP checks this completely. ``DistributedDataParallel`` compares the number of trainable parameters,
their sizes and their strides with rank 0 when it is constructed (``_verify_params_across_processes``), but not their
dtypes. ``FullyShardedDataParallel`` and ``fully_shard`` compare none of these. No strategy compares hyperparameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_rprop.optim._sharding import is_slice

# Not hyperparameters, or options that do not change the result and may depend on a rank's machine.
_IGNORED = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


def check_agreement(trainer: pl.Trainer) -> None:
    """Compare parameter shapes and optimizer hyperparameters between the ranks.

    Costs one all-reduce of two numbers; the values are exchanged only if those numbers differ.

    Args:
        trainer: The Trainer, on every rank. Parameters and optimizers that do not exist yet are skipped.

    Raises:
        ValueError: On every rank, if a shape, a dtype, a hyperparameter or a number of parameters differs.
    """
    if trainer.world_size > 1:
        compare(
            trainer,
            {**dict(_shapes(trainer)), **dict(_options(trainer))},
            "the ranks are set up differently: {}. Create the same model and optimizer on every rank; under Hydra's "
            "--multirun, where each process that Lightning starts would run the whole sweep, train inside "
            "`with lightning_rprop.hydra_ddp(trainer):`",
        )


def compare(trainer: pl.Trainer, values: Mapping[str, str], message: str) -> None:
    """Compare values that should be the same on all ranks. Every rank must call it.

    Args:
        trainer: The Trainer, which must have more than one rank.
        values: This rank's values by name.
        message: The error message; ``{}`` is replaced by the names, ranks and values that differ.

    Raises:
        ValueError: On every rank, if something differs.
    """
    digest = hashlib.sha256(repr(dict(values)).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    ends = torch.tensor([number, -number], device=trainer.strategy.root_device)
    most, least = trainer.strategy.reduce(ends, reduce_op="max").abs().tolist()
    if most == least:
        return
    first, *others = gather(trainer, dict(values))
    differences = [
        f"{name} is {first.get(name, 'missing')} on rank 0, {other.get(name, 'missing')} on rank {rank}"
        for rank, other in enumerate(others, start=1)
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]
    more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
    raise ValueError(message.format("; ".join(differences[:5]) + more))


def gather(trainer: pl.Trainer, value: Any) -> list[Any]:
    """Return the values of all ranks. Every rank must call it."""
    return [trainer.strategy.broadcast(value, src=rank) for rank in range(trainer.world_size)]


def _shapes(trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    for name, param in trainer.lightning_module.named_parameters():
        if is_lazy(param):
            yield name, "not initialized"
        elif not is_slice(param):  # the shape of a slice depends on the rank
            yield name, f"{tuple(param.shape)} {str(param.dtype).removeprefix('torch.')}"


def _options(trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    for i, optimizer in enumerate(trainer.optimizers):
        where = f"optimizer {i}: " if i else ""
        for j, group in enumerate(getattr(optimizer, "param_groups", [])):
            of_group = f"{where}of parameter group {j} " if j else where
            yield f"{of_group}the number of parameters", str(len(group["params"]))
            for name, value in group.items():
                if name not in _IGNORED:
                    yield f"{of_group}{name}", repr(_plain(value))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
