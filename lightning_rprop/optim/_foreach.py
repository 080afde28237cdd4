"""The rules of ``_rule.py`` for lists of tensors: one launch for many tensors on devices with foreach kernels."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

from lightning_rprop.optim._members import along
from lightning_rprop.optim._rule import Rule, on_device

_dtype = attrgetter("dtype")


def update_foreach(
    params: list[Tensor], grads: list[Tensor], prevs: list[Tensor], step_sizes: list[Tensor], rule: Rule
) -> Callable[[], None]:
    """Prepare one move of all tensors at once; arguments as in ``lightning_rprop.optim._rule.update()``.

    Returns:
        A function that makes the move; it allocates no memory.
    """
    etaminus, etaplus, step_size_min, step_size_max, weight_decay, maximize, forget, take_back, retreat = rule

    # gradient to minimize (the decay rounds twice; a fused multiply-add would depend on the implementation)
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay != 0:
        grads = list(torch._foreach_add(torch._foreach_mul(params, weight_decay), grads))

    # compare signs; sign(0) = 0, and torch's sign(NaN) = 0 too
    signs = list(torch._foreach_sign(grads))
    agreements = torch._foreach_mul(signs, torch._foreach_sign(prevs))
    if retreat is not False:
        bad = [along(on_device(retreat, param.device), param) for param in params]
        for agreement, is_bad in zip(agreements, bad, strict=True):
            agreement.masked_fill_(is_bad, -1)
    flipped = [agreement < 0 for agreement in agreements]

    # adapt the step size: 1 + etaplus * (-1, 0, 1), clamped to [etaminus, etaplus], is (etaminus, 1, etaplus)
    torch._foreach_mul_(agreements, etaplus)
    torch._foreach_add_(agreements, 1)
    torch._foreach_clamp_min_(agreements, etaminus)
    torch._foreach_clamp_max_(agreements, etaplus)
    sizes = list(torch._foreach_mul(step_sizes, agreements))
    del agreements
    if [*map(_dtype, sizes)] != [*map(_dtype, step_sizes)]:  # a parameter's dtype changed during training
        sizes = [size.to(step_size.dtype) for size, step_size in zip(sizes, step_sizes, strict=True)]
    torch._foreach_clamp_min_(sizes, step_size_min)
    torch._foreach_clamp_max_(sizes, step_size_max)

    # store the gradient: 0 at a flip, the previous one where this one is NaN
    kept = [torch.where(grad.isnan(), prev, grad) for grad, prev in zip(grads, prevs, strict=True)]
    if forget:
        for grad, flip in zip(kept, flipped, strict=True):
            grad.masked_fill_(flip, 0)
    if retreat is not False:
        for grad, is_bad in zip(kept, bad, strict=True):
            grad.masked_fill_(is_bad, 0)

    # move; at a flip move back by the last step size, or not at all
    if take_back is False:
        distances = sizes
    else:
        distances = [torch.where(*row) for row in zip(flipped, step_sizes, sizes, strict=True)]
    if forget and take_back is not True:
        for sign, flip in zip(signs, flipped, strict=True):
            sign.masked_fill_(flip if take_back is False else flip & ~along(take_back.to(flip.device), flip), 0)
    if retreat is not False:
        opposites = torch._foreach_sign(torch._foreach_neg(prevs))
        signs = [torch.where(*row) for row in zip(bad, opposites, signs, strict=True)]
        distances = [torch.where(*row) for row in zip(bad, step_sizes, distances, strict=True)]

    def move() -> None:
        torch._foreach_addcmul_(params, signs, distances, value=-1)
        torch._foreach_copy_(step_sizes, sizes)
        torch._foreach_copy_(prevs, kept)

    return move
