"""The rule of ``update.py`` over lists of tensors: one launch for many of them where a device has such kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def update_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    *,
    etaminus: float,
    etaplus: float,
    step_size_min: float,
    step_size_max: float,
    weight_decay: float,
    maximize: bool,
    differentiable: bool,
) -> None:
    """Make one move with all tensors at once; arguments as in :func:`lightning_rprop.optim.update.update`."""
    del differentiable  # dispatch.py never sends a differentiable step here: the foreach kernels write in place

    # the gradient of what is minimised (two roundings for the decay: a fused multiply-add would depend on the path)
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay != 0:
        grads = list(torch._foreach_add(torch._foreach_mul(params, weight_decay), grads))

    # compare signs; sign(0) = 0, and torch's sign(NaN) = 0 too
    agreements = torch._foreach_sign(grads)
    torch._foreach_mul_(agreements, torch._foreach_sign(prevs))
    flipped = [agreement < 0 for agreement in agreements]

    # adapt the step size: 1 + etaplus * (-1, 0, 1), cut to [etaminus, etaplus], is (etaminus, 1, etaplus)
    factors = torch._foreach_mul(agreements, etaplus)
    torch._foreach_add_(factors, 1)
    torch._foreach_clamp_min_(factors, etaminus)
    torch._foreach_clamp_max_(factors, etaplus)
    torch._foreach_mul_(step_sizes, factors)
    torch._foreach_clamp_min_(step_sizes, step_size_min)
    torch._foreach_clamp_max_(step_sizes, step_size_max)

    # move, but not where the sign changed
    kept = [grad.masked_fill(flip, 0) for grad, flip in zip(grads, flipped, strict=True)]
    torch._foreach_addcmul_(params, torch._foreach_sign(kept), step_sizes, value=-1)

    # remember the gradient: 0 where the sign changed, the one before where this one is NaN
    torch._foreach_copy_(prevs, [torch.where(k.isnan(), prev, k) for k, prev in zip(kept, prevs, strict=True)])
