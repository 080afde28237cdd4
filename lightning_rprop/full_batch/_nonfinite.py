"""Search for the first parameter, input or buffer that is not finite, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_rprop._ranks import gather
from lightning_rprop._torch import plain_name
from lightning_rprop.full_batch._batches import leaves
from lightning_rprop.full_batch._evaluation import Evaluation
from lightning_rprop.optim._sharding import local


@torch.no_grad()
def find_nonfinite(evaluation: Evaluation) -> str | None:
    """Describe the first parameter, input or buffer that is not finite, with the remedy. Every rank must call it.

    Infinite buffers count as finite, because masks hold them.

    Returns:
        The same text on every rank; ``None`` if all are finite.
    """
    module, trainer = evaluation.pl_module, evaluation.trainer
    params = ((f"parameter {plain_name(name)!r}", param) for name, param in module.named_parameters())
    buffers = ((f"buffer {plain_name(name)!r}", buffer) for name, buffer in module.named_buffers())
    in_inputs = None
    with suppress(Exception):  # data that cannot be read again must not keep the other ranks waiting
        in_inputs = _first(_inputs(evaluation), _is_bad)
    found = [_first(params, _is_bad), in_inputs, _first(buffers, torch.isnan)]
    remedies = ["Give it finite values", "Correct these samples, or remove them", "Give it finite values"]
    for remedy, by_rank in zip(remedies, zip(*gather(trainer, found), strict=True), strict=True):
        for rank, each in enumerate(by_rank):
            if each is not None:
                name, rest = each
                return f"{name}{f' on rank {rank}' if trainer.world_size > 1 else ''} {rest}. {remedy}"
    return None


def _first(tensors: Iterable[tuple[str, Any]], is_bad: Callable[[Tensor], Tensor]) -> tuple[str, str] | None:
    """Describe the first tensor whose local shard has a bad entry."""
    for name, tensor in tensors:
        if is_lazy(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = local(tensor.detach())
        bad = is_bad(values if values.layout is torch.strided else values.to_dense()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            return name, f"has {len(bad)} of {values.numel()} entries that are NaN or infinite, the first at {index}"
    return None


def _is_bad(values: Tensor) -> Tensor:
    return ~values.isfinite()


def _inputs(evaluation: Evaluation) -> Iterator[tuple[str, Tensor]]:
    """Iterate over this rank's inputs that count, as training_step gets them."""
    for i, batch in evaluation.inputs():
        for path, tensor in _tensors("batch", batch):
            yield f"{path} of micro-batch {i}", tensor


def _tensors(path: str, data: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of a batch, also those that are attributes of its objects."""
    for place, leaf in leaves(path, data):
        if isinstance(leaf, Tensor):
            yield place, leaf
        elif not isinstance(leaf, type):
            for name, value in getattr(leaf, "__dict__", {}).items():
                yield from _tensors(f"{place}.{name}", value)
