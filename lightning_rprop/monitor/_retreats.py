"""The number of retreats in a run: of all its optimizers, also after a resume."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer


class Retreats:
    """Adds up the retreats that each ``lightning_rprop.Rprop`` of a run counts.

    Args:
        total: The count so far; ``None`` without such an Rprop.
    """

    def __init__(self, total: int | Tensor | None = None) -> None:
        self.total = total  # a tensor if an optimizer counts on its device
        self._counted: WeakKeyDictionary[Optimizer, int | Tensor] = WeakKeyDictionary()  # how much is in the total

    def __reduce__(self) -> tuple[type[Retreats], tuple[int | Tensor | None]]:
        """Leave the optimizers out of copies and pickles."""
        return Retreats, (self.total,)

    def start(self, optimizers: Iterable[Optimizer]) -> None:
        """Leave out what the optimizers have counted so far."""
        self._counted.update({optimizer: _count(optimizer) for optimizer in optimizers})

    def update(self, optimizers: Iterable[Optimizer]) -> None:
        """Add what the optimizers have counted since the last call."""
        for optimizer in {each for each in optimizers if hasattr(each, "retreats")}:
            now = _count(optimizer)
            new = now - self._counted.get(optimizer, 0)
            if isinstance(new, Tensor) and isinstance(self.total, Tensor):
                new = new.to(self.total.device)
            self.total = new + (0 if self.total is None else self.total)
            self._counted[optimizer] = now


def _count(optimizer: Optimizer) -> int | Tensor:
    count: int | Tensor = getattr(optimizer, "retreats", 0)
    return count.clone() if isinstance(count, Tensor) else count  # the optimizer may count in place
