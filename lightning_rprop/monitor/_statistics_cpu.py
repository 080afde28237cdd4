"""The sums and counts of ``statistics.py`` where all tensors are float32 on the CPU: once over memory, on all threads.

Each function gives ``None`` where it does not serve, and torch's operations do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_rprop.optim import _dispatch as dispatch
from lightning_rprop.optim._dispatch import is_dense
from lightning_rprop.optim._sharding import PLAIN
from lightning_rprop.optim._threads import run

if TYPE_CHECKING:
    from lightning_rprop.monitor._statistics import Gradients

Array = np.ndarray[Any, Any]

# The C types of the kernels: the pieces' addresses and sizes, how many, a counter, and what each has of its own.
_PROTOTYPE = {
    name: ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * arguments)
    for name, arguments in {"step_sizes": 3, "gradients": 4, "upper_bits": 4, "lower_bits": 4}.items()
}

# Elements that a thread takes at a time: work for a tenth of a millisecond.
_PIECE = 1 << 18

# Elements that are sorted rather than counted, which takes two tables of 65,536 counts.
_FEW = 1 << 15

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")

# The largest bits that have the order of their numbers: those of infinity.
_INFINITY = 0x7F800000


class _Layout(NamedTuple):
    """How tensors are cut in pieces."""

    owners: Array  # which tensor each piece is of
    starts: Array  # where in it, in bytes
    sizes: Array  # how many elements
    occupied: Array  # tensors that have pieces
    firsts: Array  # and the first of each


@lru_cache(maxsize=256)
def _layout(elements: tuple[int, ...], most: int) -> _Layout:
    """Cut tensors of so many elements in pieces of at most so many; the same at every record of a run."""
    sizes = np.array(elements)
    counts = -(-sizes // most)
    owners, ends = np.arange(len(sizes)).repeat(counts), counts.cumsum()
    starts = most * (np.arange(len(owners)) - (ends - counts)[owners])
    occupied = np.flatnonzero(sizes)
    pieces = np.minimum(sizes[owners] - starts, most)
    return _Layout(owners, (4 * starts).astype(np.uint64), pieces, occupied, (ends - counts)[occupied])


class _Pieces:
    """Tensors in pieces, as the kernels take them; there may be lists of such as belong together."""

    def __init__(self, *lists: Sequence[Tensor]) -> None:
        self.elements = tuple(map(Tensor.numel, lists[0]))
        self.owners, starts, self.sizes, self.occupied, self.firsts = _layout(self.elements, _PIECE)
        addresses = np.array([[*map(Tensor.data_ptr, tensors)] for tensors in lists], dtype=np.uint64)
        self.addresses = np.ascontiguousarray(addresses[:, self.owners] + starts)
        self.lists = lists  # what the addresses are of

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def threads(self) -> int:
        """How many threads the work is worth."""
        return max(1, min(torch.get_num_threads(), sum(self.elements) // _PIECE))

    def count(self, name: str, slots: Array) -> Tensor:
        """Run a kernel that counts by bits; give the tables ``(slots[0], 65536)``, put together from all threads."""
        tables = np.zeros((self.threads, slots[0], 1 << 16), np.uint32)
        self.run(name, np.zeros(1, np.int64), slots, tables)
        return torch.from_numpy(tables.sum(axis=0, dtype=np.int64))

    def run(self, name: str, *arguments: Array) -> None:
        """Run a kernel over all pieces."""
        tables = [self.addresses, self.sizes, np.zeros(1, np.int64), *arguments]
        assert all(table.flags.c_contiguous for table in tables)
        places = [table.ctypes.data for table in tables]
        kernel = load_kernel(name)
        assert kernel is not None
        run(lambda *_: kernel(*places[:2], len(self), *places[2:]), self.threads, tables, self)


def sum_up(step_sizes: Sequence[Tensor], bounds: Sequence[tuple[float, float]]) -> Tensor | None:
    """Give the first eight rows of a table, float64."""
    if not _serves("step_sizes", step_sizes):
        return None
    pieces = _Pieces(step_sizes)
    limits = np.array(bounds)
    rows = np.tile(np.array([0, 2**32, -1, 0, 0], np.float64), (len(pieces), 1))
    pieces.run("step_sizes", limits.astype(np.float32)[pieces.owners], rows)
    if len(rows) and rows[:, 2].max() > _INFINITY:
        return None  # negative or NaN, whose bits have another order
    table = np.zeros((8, len(step_sizes)))
    table[0] = pieces.elements
    table[4::2], table[5::2] = np.inf, -np.inf
    if len(rows):
        occupied, firsts = pieces.occupied, pieces.firsts
        table[1:4, occupied] = np.add.reduceat(rows[:, [0, 3, 4]], firsts).T
        extremes = np.stack([np.minimum.reduceat(rows[:, 1], firsts), np.maximum.reduceat(rows[:, 2], firsts)])
        table[4:6, occupied] = _numbers(extremes)
        table[6:, occupied] = limits[occupied].T
    return torch.from_numpy(table)


def compare(gradients: Gradients) -> Tensor | None:
    """Give the last five rows of a table, float64."""
    prevs = [prev for prev in gradients.prevs if prev is not None]
    lists = gradients.grads, prevs, gradients.params
    if len(prevs) < len(gradients.grads) or not _serves("gradients", *lists):
        return None
    pieces = _Pieces(*lists)
    flips = np.array(gradients.maximize, np.uint32)[pieces.owners] << np.uint32(31)
    decays = np.array(gradients.weight_decays, np.float32)[pieces.owners]
    rows = np.zeros((len(pieces), 4))
    pieces.run("gradients", flips, decays, rows)
    table = np.zeros((5, len(prevs)))
    table[0] = pieces.elements
    if len(rows):
        table[1:, pieces.occupied] = np.add.reduceat(rows, pieces.firsts).T
    return torch.from_numpy(table)


def order_statistics(step_sizes: Sequence[Tensor], indices: Sequence[int]) -> Tensor | None:
    """Give those elements of all tensors, in their order from the smallest, float64."""
    if not _serves("upper_bits", step_sizes) or not _serves("lower_bits", step_sizes):
        return None
    if sum(map(Tensor.numel, step_sizes)) <= _FEW:
        return torch.cat([tensor.flatten() for tensor in step_sizes]).sort().values[[*indices]].double()
    pieces = _Pieces(step_sizes)
    wanted = torch.tensor(indices)
    # first which upper bits they have, then which lower ones among those of the same upper bits
    (counts,) = pieces.count("upper_bits", np.ones(1, np.int64))
    if counts[(_INFINITY >> 16) + 1 :].any():
        return None  # negative or NaN, as above
    ends = counts.cumsum(dim=0)
    upper = torch.searchsorted(ends, wanted, right=True)
    before = ends[upper] - counts[upper]
    bins, table = torch.unique(upper, return_inverse=True)
    slots = np.zeros(1 + (1 << 16), np.int64)
    slots[0] = 1 + len(bins)
    slots[1 + bins.numpy()] = np.arange(1, 1 + len(bins))
    ends = pieces.count("lower_bits", slots)[1:].cumsum(dim=1)
    lower = torch.searchsorted(ends[table], (wanted - before).unsqueeze(1), right=True).squeeze(1)
    return torch.from_numpy(_numbers(((upper << 16) | lower).numpy()))


def _numbers(keys: Array) -> Array:
    """Give the numbers whose bits, read as whole numbers, are these."""
    return keys.astype(np.uint32).view(np.float32).astype(np.float64)


def _serves(name: str, *lists: Sequence[Tensor]) -> bool:
    tensors = [tensor for tensors in lists for tensor in tensors]
    return (
        PLAIN.issuperset(map(type, tensors))
        and {*map(_dtype, tensors)} <= {torch.float32}
        and all(map(_is_cpu, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and (all(map(Tensor.is_contiguous, tensors)) or all(map(_are_alike, *lists)))
        and load_kernel(name) is not None
    )


def _are_alike(*tensors: Tensor) -> bool:
    return len({tensor.stride() for tensor in tensors}) == 1 and is_dense(tensors[0])


@cache
def load_kernel(name: str) -> Callable[..., None] | None:
    """Load a kernel of ``statistics_kernel.py``, compiled on this machine once; ``None`` if it cannot be had."""
    if find_spec("numba") is None:
        return None
    files = Path(__file__).with_name("_statistics_kernel.py"), Path(dispatch.__file__).with_name("_numba_kernel.py")
    source = "".join(file.read_text() for file in files)  # the first imports from the second

    def compile_module() -> tuple[str, str]:
        from lightning_rprop.monitor._statistics_kernel import compile_kernel

        return compile_kernel(name)

    try:
        from lightning_rprop.optim._machine_code import load

        return _PROTOTYPE[name](load(f"rprop_monitor_{name}", source, compile_module))
    except Exception:  # whatever a compiler has to say, which the optimizer tells of its own kernel: torch does it too
        return None
