"""Listing of the parameters to measure: those of every Rprop optimizer, ours or torch's, wrapped or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_rprop._lightning import innermost
from lightning_rprop._torch import plain_name
from lightning_rprop.monitor._statistics import Gradients
from lightning_rprop.optim._sharding import aligned, as_real, is_sharded, is_slice, local

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Row(NamedTuple):
    """A parameter of an Rprop."""

    name: str
    group: str
    param: Tensor
    options: Mapping[str, Any]  # of its parameter group
    optimizer: Optimizer  # the one that holds its state
    is_counted: bool  # whether this process measures it, when processes hold different parts


class Listing:
    """The rows of a Trainer, listed again when its optimizers, their groups or parameters change."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.is_distributed = False  # whether processes hold different parts of the rows
        self._key: list[tuple[int, ...]] | None = None

    @property
    def optimizers(self) -> set[Optimizer]:
        """The optimizers of the rows."""
        return {row.optimizer for row in self.rows}

    def update(self, trainer: pl.Trainer) -> bool:
        """Update the rows and return whether they changed."""
        optimizers = trainer.optimizers
        # the rows keep the objects alive, so no id is reused
        key = [
            (i, id(rprop), id(group), *map(id, group["params"]))
            for i, optimizer in enumerate(optimizers)
            if (rprop := find_rprop(optimizer)) is not None
            for group in optimizer.param_groups
        ]
        if key == self._key:
            return False
        names = {id(param): name for name, param in trainer.lightning_module.named_parameters()}
        self._key, self.rows = key, list_rows(optimizers, names, trainer.global_rank)
        self.is_distributed = trainer.world_size > 1 and are_distributed(optimizers)
        return True


def state_of(rows: Sequence[Row], name: str) -> list[Tensor | None]:
    """Return the local part of a state of each parameter, ``None`` before its first step."""
    states = [row.optimizer.state.get(row.param) for row in rows]
    return [_local(state[name]) if state else None for state in states]


def gradients_of(rows: Sequence[Row]) -> Gradients:
    """Return the local part of the gradients, for parameters that have one."""
    return Gradients(
        [_local(aligned(row.param.grad, row.param)) for row in rows],
        state_of(rows, "prev"),
        [_local(row.param) for row in rows],
        [row.options.get("weight_decay", 0.0) for row in rows],
        [row.options["maximize"] for row in rows],
    )


def find_rprop(optimizer: Any) -> Optimizer | None:
    """Return the Rprop that an optimizer is or wraps, recognized by two options that only Rprop has."""
    optimizer = innermost(optimizer)
    is_rprop = isinstance(optimizer, Optimizer) and {"etas", "step_sizes"} <= optimizer.defaults.keys()
    return optimizer if is_rprop else None


def list_rows(optimizers: Sequence[Any], names: Mapping[int, str], rank: int) -> list[Row]:
    """List the parameters of all Rprops, the same on every process.

    Args:
        optimizers: The Trainer's optimizers.
        names: Names of the module's parameters, by ``id``.
        rank: The rank of this process.
    """
    found = [(i, outer, inner) for i, outer in enumerate(optimizers) if (inner := find_rprop(outer)) is not None]
    rows = []
    for i, outer, inner in found:
        prefix = f"optimizer{i}." if len(found) > 1 else ""
        own = None if outer is inner else {*map(id, parameters(inner))}
        for j, group in enumerate(outer.param_groups):
            label = prefix + str(group.get("name", f"group{j}"))
            for k, param in enumerate(group["params"]):
                name = plain_name(names.get(id(param), f"optimizer{i}.group{j}.{k}"))
                is_counted = _is_first_replica(param, rank) if own is None else id(param) in own
                rows.append(Row(name, label, param, group, inner, is_counted))
    return rows


def are_distributed(optimizers: Iterable[Any]) -> bool:
    """Return whether processes hold different parts of the step sizes."""
    for outer in optimizers:
        inner = find_rprop(outer)
        if inner is not None and (inner is not outer or any(is_sharded(p) or is_slice(p) for p in parameters(outer))):
            return True
    return False


def parameters(optimizer: Any) -> list[Tensor]:
    """List the parameters of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _is_first_replica(param: Any, rank: int) -> bool:
    """Return whether this process is the first of those that hold the same part of a parameter."""
    if not is_sharded(param):
        return rank == 0 or is_slice(param)
    place = param.device_mesh.get_coordinate()
    return place is not None and all(
        i == 0 or not placement.is_replicate() for i, placement in zip(place, param.placements, strict=True)
    )


def _local(tensor: Any) -> Tensor:
    """Return the local part of a tensor, with a complex number as two real ones."""
    return as_real(local(tensor))
