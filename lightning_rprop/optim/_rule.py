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

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

from lightning_rprop._torch import is_simulating, is_transformed
from lightning_rprop.optim._fused import PLAIN
from lightning_rprop.optim._scratch import NEW, Scratch, Space, reserve, take

# Up to so many elements a parameter's new values are computed before anything moves. Larger parameters share memory
# that is reserved before, which takes a little longer per parameter.
_FEW = 1 << 12

_dtype = attrgetter("dtype")


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
    scratch: Scratch,
) -> Callable[[], None]:
    """Prepare one move, tensor after tensor.

    Args:
        params: Real tensors, modified in place.
        grads: Gradients, each of its parameter's shape; read only.
        prevs: The previous gradients (0 where the next step must not adapt), modified in place.
        step_sizes: The step sizes, in the parameters' unit; modified in place.
        etaminus: Factor of a step size after a change of sign.
        etaplus: Factor of a step size after two gradients of one sign.
        step_size_min: Lower bound of every step size.
        step_size_max: Upper bound of every step size.
        weight_decay: This times the parameter is added to the gradient before its sign is taken.
        maximize: Climb instead of descend.
        forget: At a change of sign store 0 instead of the gradient, and make no ordinary move (variants.py).
        take_back: Where so, undo the last move instead; a bool, or a bool tensor that broadcasts to every parameter.
        differentiable: Keep what autograd needs to go back through this step.
        scratch: Memory for the intermediate results of large parameters.

    Returns:
        A function that makes the move. All memory has been allocated before it is called, except where operations are
        traced or simulated.
    """
    names = ["sign", "size", "kept", "flipped", "mask"]
    if maximize or weight_decay != 0:
        names.append("gradient")
    if take_back is not False:
        names.append("distance")
    lazily = torch.compiler.is_compiling() or is_transformed() or is_simulating()
    keeps_sign = lazily or differentiable  # autograd has saved it, or vmap cannot write to it
    fell = {p.device: ~take_back.to(p.device) for p in params} if isinstance(take_back, Tensor) else {}

    def compute(param: Tensor, grad: Tensor, prev: Tensor, step_size: Tensor, space: Space) -> tuple[Tensor, ...]:
        # the gradient of what is minimised (two roundings for the decay: a fused multiply-add would depend on the path)
        if maximize:
            grad = torch.neg(grad, out=space.gradient)
        if weight_decay != 0:
            grad = torch.add(grad, torch.mul(param, weight_decay, out=space.kept), out=space.gradient)

        # compare signs; sign(0) = 0, and torch's sign(NaN) = 0 too
        sign = torch.sign(grad, out=space.sign)
        agreement = torch.mul(sign, torch.sign(prev, out=space.size), out=space.size)
        flipped = torch.lt(agreement, 0, out=space.flipped)

        # adapt the step size: 1 + etaplus * (-1, 0, 1), cut to [etaminus, etaplus], is (etaminus, 1, etaplus)
        factor = torch.mul(agreement, etaplus, out=space.size).add_(1).clamp_(etaminus, etaplus)
        before = step_size.clone() if differentiable else step_size  # autograd keeps what it multiplied
        size = torch.mul(before, factor, out=space.size)
        if size.dtype != step_size.dtype:  # a parameter that was given another dtype amid training
            size = size.to(step_size.dtype)
        size.clamp_(step_size_min, step_size_max)

        # move; where the sign changed back by the last step size, or not at all
        distance = size if take_back is False else torch.where(flipped, step_size, size, out=space.distance)
        if forget and take_back is not True:
            stays = flipped if take_back is False else torch.logical_and(flipped, fell[param.device], out=space.mask)
            sign = sign.masked_fill(stays, 0) if keeps_sign else sign.masked_fill_(stays, 0)

        # remember the gradient: 0 where the sign changed, the one before where this one is NaN
        kept = torch.where(torch.ne(grad, grad, out=space.mask), prev, grad, out=space.kept)
        if forget:
            kept.masked_fill_(flipped, 0)
        return sign, distance, size, kept

    rows = list(zip(params, grads, prevs, step_sizes, strict=True))
    early: list[tuple[Tensor, ...] | None] = [None] * len(rows)
    if not lazily:
        for i, row in enumerate(rows):
            # operations with out= are for plain tensors of one dtype
            if (
                params[i].numel() > _FEW
                and not differentiable
                and PLAIN.issuperset(map(type, row))
                and len({*map(_dtype, row)}) == 1
            ):
                reserve(scratch, params[i], names)
            else:
                early[i] = compute(*row, NEW)

    def move() -> None:
        for row, results in zip(rows, early, strict=True):
            param, _, prev, step_size = row
            if results is None:
                results = compute(*row, NEW if lazily else take(scratch, param))
            sign, distance, size, kept = results
            param.addcmul_(sign, distance, value=-1)
            step_size.copy_(size)
            prev.copy_(kept)

    return move
