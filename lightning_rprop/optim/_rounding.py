"""The numbers of the rule as torch rounds them, for kernels of our own."""

from __future__ import annotations

from array import array
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def rounded(
    dtype: torch.dtype,
    etaminus: float,
    etaplus: float,
    step_size_min: float,
    step_size_max: float,
    weight_decay: float,
) -> array[float]:
    """Round the numbers of the rule to what torch's operations make of them on tensors of a dtype.

    Factors and bounds become numbers of that dtype. The weight decay is multiplied in the type that torch calculates
    with, which is float32 for the halves.

    Args:
        dtype: the parameters' dtype.
        etaminus: factor of a step size after a change of sign.
        etaplus: factor of a step size after two gradients of one sign.
        step_size_min: lower bound of every step size.
        step_size_max: upper bound of every step size.
        weight_decay: this times the parameter is added to the gradient.

    Returns:
        The five numbers as C doubles, in this order; not to be written to.
    """
    decay_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = torch.tensor([etaminus, etaplus, step_size_min, step_size_max], dtype=dtype, device="cpu").tolist()
    return array("d", [*numbers, torch.tensor(weight_decay, dtype=decay_dtype, device="cpu").item()])
