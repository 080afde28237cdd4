"""What watches, traces or simulates torch's operations, and would not see what a kernel of ours does.

torch has no public names for this.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEYS = torch._C._TorchDispatchModeKey
_SIMULATING = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)  # FakeTensorMode, make_fx, functionalization
_SIMULATED = frozenset({"FakeTensor", "FunctionalTensor"})


def is_watched() -> bool:
    """Return whether a ``TorchDispatchMode`` is active."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_simulating() -> bool:
    """Return whether a mode is active that traces operations, or pretends to carry them out."""
    return is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _SIMULATING)


def is_simulated(tensor: Tensor) -> bool:
    """Return whether a tensor has no values, or stands for another one."""
    return tensor.is_meta or type(tensor).__name__ in _SIMULATED


def is_transformed() -> bool:
    """Return whether this runs inside a transformation of ``torch.func``, such as ``vmap``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_true(condition: Tensor, *, unknown: bool) -> bool:
    """Return a tensor's truth value, or ``unknown`` for one without a value: fake, meta, traced."""
    try:
        return bool(condition)
    except RuntimeError:  # torch has no public way to ask
        return unknown
