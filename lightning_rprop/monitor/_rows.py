"""Which parameters there are to measure: those of every Rprop, ours or torch's, however it is wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_rprop._lightning import innermost
from lightning_rprop.monitor._statistics import Gradients
from lightning_rprop.optim._sharding import PLAIN, aligned, as_real, is_sharded, is_slice, local

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What torch.compile and FSDP put into a parameter's name.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


class Row(NamedTuple):
    """A parameter of an Rprop."""

    name: str
    group: str
    param: Tensor
    options: Mapping[str, Any]  # of its parameter group
    optimizer: Optimizer  # which has its state
    counts: bool  # whether this process has a part of it that no other one counts


class Listing:
    """The parameters of a Trainer's Rprops, listed again when the optimizers, their groups or parameters change."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.are_shared = False  # whether processes hold different parts of them
        self._key: list[tuple[int, ...]] | None = None

    def update(self, trainer: pl.Trainer) -> bool:
        """Bring the list up to date, and return whether it changed."""
        optimizers = trainer.optimizers
        # an id is not used again while the rows hold the object
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
        self.are_shared = trainer.world_size > 1 and are_shared_out(optimizers)
        return True


def state_of(rows: Sequence[Row], name: str) -> list[Tensor | None]:
    """Give this process's part of a state of each parameter, ``None`` where there is none yet."""
    states = [row.optimizer.state.get(row.param) for row in rows]
    return _local([state[name] if state else None for state in states])


def gradients_of(rows: Sequence[Row]) -> Gradients:
    """Give this process's part of the gradients, of parameters that have one, and what they are compared with."""
    return Gradients(
        _local([aligned(row.param.grad, row.param) for row in rows]),
        state_of(rows, "prev"),
        _local([row.param for row in rows]),
        [row.options.get("weight_decay", 0.0) for row in rows],
        [row.options["maximize"] for row in rows],
    )


def find_rprop(optimizer: Any) -> Optimizer | None:
    """Give the Rprop, ours or torch's, that an optimizer is or wraps; told by two options that no other one has."""
    optimizer = innermost(optimizer)
    is_rprop = isinstance(optimizer, Optimizer) and {"etas", "step_sizes"} <= optimizer.defaults.keys()
    return optimizer if is_rprop else None


def list_rows(optimizers: Sequence[Any], names: Mapping[int, str], rank: int) -> list[Row]:
    """List the parameters of all Rprops, the same on every process.

    Args:
        optimizers: the Trainer's.
        names: name of each parameter of the module, by its ``id``.
        rank: of this process.
    """
    found = [(i, outer, inner) for i, outer in enumerate(optimizers) if (inner := find_rprop(outer)) is not None]
    result = []
    for i, outer, inner in found:
        prefix = f"optimizer{i}." if len(found) > 1 else ""
        own = None if outer is inner else {*map(id, parameters(inner))}
        for j, group in enumerate(outer.param_groups):
            label = prefix + str(group.get("name", f"group{j}"))
            for k, param in enumerate(group["params"]):
                name = plain_name(names.get(id(param), f"optimizer{i}.group{j}.{k}"))
                counts = _counts(param, rank) if own is None else id(param) in own
                result.append(Row(name, label, param, group, inner, counts))
    return result


def plain_name(name: str) -> str:
    """Strip what wrappers of modules put into a name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def are_shared_out(optimizers: Iterable[Any]) -> bool:
    """Tell whether processes hold different parts of the step sizes."""
    for outer in optimizers:
        inner = find_rprop(outer)
        if inner is not None and (inner is not outer or any(is_sharded(p) or is_slice(p) for p in parameters(outer))):
            return True
    return False


def parameters(optimizer: Any) -> list[Tensor]:
    """List the parameters of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _counts(param: Any, rank: int) -> bool:
    """Of those that hold the same, the first counts it: on a mesh along each axis that replicates, else rank 0."""
    if not is_sharded(param):
        return rank == 0 or is_slice(param)
    place = param.device_mesh.get_coordinate()
    return place is not None and all(
        i == 0 or not placement.is_replicate() for i, placement in zip(place, param.placements, strict=True)
    )


def _local(tensors: list[Any]) -> list[Any]:
    """Give the parts of DTensors that are here, with a complex number as two real ones."""
    if PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_complex, tensors)):
        return tensors  # as nearly always
    return [None if t is None else as_real(local(t)) for t in tensors]
