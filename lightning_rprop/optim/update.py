"""The rules of the family, for one tensor at a time: the page to read against the papers.

C. Igel and M. Huesken, "Empirical evaluation of the improved Rprop learning algorithms", Neurocomputing 50 (2003),
105-123; with g the gradient, p the one stored before it, D the step size and s = sign(g) * sign(p):

    s > 0:  D = min(etaplus * D, max);   w -= sign(g) * D;  p = g
    s = 0:  D stays;                     w -= sign(g) * D;  p = g
    s < 0:  D = max(etaminus * D, min), and

        Rprop-   w -= sign(g) * D                                        p = g
        Rprop+   w takes back its last move                              p = 0, so that the next step does not adapt
        iRprop-  w stays                                                 p = 0
        iRprop+  w takes back its last move if the loss rose, else stays p = 0

The last move of a weight at a flip was made against sign(p) = -sign(g), by the D before it shrank: taking it back is to
move by that D against sign(g).

``torch.optim.Rprop`` multiplies the gradients to find s; a product underflows where signs do not. Each result here is
one multiplication, two clamps and one addition away from the state, so that every implementation can agree to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update(
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
    forget: bool,
    take_back: bool | Tensor,
    differentiable: bool,
) -> None:
    """Make one move, tensor after tensor.

    Args:
        params: real tensors, modified in place.
        grads: gradients, each of its parameter's shape; read only.
        prevs: the previous gradients (0 where the next step must not adapt), modified in place.
        step_sizes: the step sizes, in the parameters' unit; modified in place.
        etaminus: factor of a step size after a change of sign.
        etaplus: factor of a step size after two gradients of one sign.
        step_size_min: lower bound of every step size.
        step_size_max: upper bound of every step size.
        weight_decay: this times the parameter is added to the gradient before its sign is taken.
        maximize: climb instead of descend.
        forget: at a change of sign store 0 instead of the gradient, and make no ordinary move (variants.py).
        take_back: where so, undo the last move instead; a bool, or a bool tensor that broadcasts to every parameter.
        differentiable: keep what autograd needs to go back through this step.
    """
    for param, grad, prev, step_size in zip(params, grads, prevs, step_sizes, strict=True):
        # the gradient of what is minimised (two roundings for the decay: a fused multiply-add would depend on the path)
        if maximize:
            grad = -grad
        if weight_decay != 0:
            grad = grad + param * weight_decay

        # compare signs; sign(0) = 0, and torch's sign(NaN) = 0 too
        sign = grad.sign()
        agreement = sign * prev.sign()
        flipped = agreement < 0

        # adapt the step size: 1 + etaplus * (-1, 0, 1), cut to [etaminus, etaplus], is (etaminus, 1, etaplus)
        factor = agreement.mul(etaplus).add_(1).clamp_(etaminus, etaplus)
        last = step_size if take_back is False else step_size.clone()
        step_size.mul_(factor).clamp_(step_size_min, step_size_max)

        # move; where the sign changed back by the last step size, or not at all (autograd keeps what it multiplied:
        # give it a copy of the live state)
        if take_back is False:
            distance = step_size.clone() if differentiable else step_size
        else:
            distance = torch.where(flipped, last, step_size)
        if forget and take_back is not True:
            sign = sign.masked_fill(flipped if take_back is False else flipped & ~take_back.to(flipped.device), 0)
        param.addcmul_(sign, distance, value=-1)

        # remember the gradient: 0 where the sign changed, the one before where this one is NaN
        grad = torch.where(grad.isnan(), prev, grad)
        prev.copy_(grad.masked_fill_(flipped, 0) if forget else grad)
