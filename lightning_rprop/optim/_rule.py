"""The four rules of the Rprop family, for one tensor at a time: read this page next to the papers.

C. Igel and M. Huesken, "Empirical evaluation of the improved Rprop learning algorithms", Neurocomputing 50 (2003),
105-123. With g the gradient, p the stored previous gradient, D the step size and s = sign(g) * sign(p):

    s > 0:  D = min(etaplus * D, max);   w -= sign(g) * D;  p = g
    s = 0:  D is kept;                   w -= sign(g) * D;  p = g
    s < 0:  D = max(etaminus * D, min), and

        Rprop-   w -= sign(g) * D                                     p = g
        Rprop+   w takes back its last move                           p = 0, so that the next step does not adapt D
        iRprop-  w is kept                                            p = 0
        iRprop+  w takes back its last move if the loss rose          p = 0

    the loss is NaN, or infinite in the bad direction ("retreat", all variants, whatever s is):
        w += sign(p) * D;  D = max(etaminus * D, min);  p = 0

At a flip (s < 0) the last move was -sign(p) * D = sign(g) * D with D before it shrank. Taking it back therefore means
moving by -sign(g) times that D.

``torch.optim.Rprop`` multiplies the gradients themselves to get s, and that product can underflow. Every result here is
one multiplication, two clamps and one addition away from the state, so that all implementations agree bit for bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_rprop._torch import is_simulating, is_transformed
from lightning_rprop.optim._members import along
from lightning_rprop.optim._scratch import NEW, Scratch, Space, is_sharable, reserve, take

Variant: TypeAlias = Literal["irprop-", "irprop+", "rprop-", "rprop+"]


class AtFlip(NamedTuple):
    """What a variant does with a weight whose gradient changed its sign.

    Attributes:
        forget: Store 0 instead of the gradient, and make no ordinary move.
        take_back: Undo the last move; ``None`` undoes it only if the loss rose.
    """

    forget: bool
    take_back: bool | None


AT_FLIP: Mapping[str, AtFlip] = {
    "irprop-": AtFlip(forget=True, take_back=False),  # Igel and Huesken 2003
    "irprop+": AtFlip(forget=True, take_back=None),  # Igel and Huesken 2003
    "rprop-": AtFlip(forget=False, take_back=False),  # Riedmiller 1994
    "rprop+": AtFlip(forget=True, take_back=True),  # Riedmiller and Braun 1993
}


class Rule(NamedTuple):
    """The numbers and switches of one step.

    The first five fields are plain numbers and thus hashable.

    Attributes:
        etaminus: Factor of a step size after a sign change.
        etaplus: Factor of a step size after two equal signs.
        step_size_min: Lower bound of every step size.
        step_size_max: Upper bound of every step size.
        weight_decay: This times the parameter is added to the gradient.
        maximize: Maximize instead of minimize.
        forget: See ``AtFlip``.
        take_back: Undo the last move at a flip: a bool, a bool tensor of one element, or one of shape ``(n,)`` for
            parameters of shape ``(n, ...)``.
        retreat: Undo the last move of every weight and make no other; likewise.
    """

    etaminus: float
    etaplus: float
    step_size_min: float
    step_size_max: float
    weight_decay: float
    maximize: bool
    forget: bool
    take_back: bool | Tensor
    retreat: bool | Tensor = False

    @property
    def members(self) -> int:
        """How many members are judged separately; 1 if all of a parameter is judged together."""
        for flag in (self.take_back, self.retreat):
            if flag is not False and isinstance(flag, Tensor) and flag.numel() > 1:
                return flag.numel()
        return 1


# The signature of all implementations: a call prepares the move and may fail, the returned function makes it.
Update: TypeAlias = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Rule], Callable[[], None]]


def update(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    rule: Rule,
    *,
    scratch: Scratch,
    differentiable: bool = False,
) -> Callable[[], None]:
    """Prepare one move, one tensor after another.

    Args:
        params: Real parameters, modified in place.
        grads: Gradients of the same shapes, read only.
        prevs: Previous gradients, 0 where the step size must not adapt; modified in place.
        step_sizes: Step sizes in the unit of the parameters, modified in place.
        rule: Numbers and switches of the step.
        scratch: Memory for the intermediate results of large parameters.
        differentiable: Keep what autograd needs to differentiate through the step.

    Returns:
        A function that makes the move. It allocates no memory, except where operations are traced or simulated.
    """
    etaminus, etaplus, step_size_min, step_size_max, weight_decay, maximize, forget, take_back, retreat = rule
    names = ["sign", "size", "kept", "flipped", "mask"]
    if maximize or weight_decay != 0:
        names.append("gradient")
    if take_back is not False or retreat is not False:
        names.append("distance")
    lazily = torch.compiler.is_compiling() or is_transformed() or is_simulating()
    keeps_sign = lazily or differentiable  # autograd has saved it, or vmap cannot write to it
    fell = {p.device: ~take_back.to(p.device) for p in params} if isinstance(take_back, Tensor) else {}
    is_bad = {p.device: on_device(retreat, p.device) for p in params} if retreat is not False else {}

    def compute(param: Tensor, grad: Tensor, prev: Tensor, step_size: Tensor, space: Space) -> tuple[Tensor, ...]:
        # gradient to minimize (the decay rounds twice; a fused multiply-add would depend on the implementation)
        if maximize:
            grad = torch.neg(grad, out=space.gradient)
        if weight_decay != 0:
            grad = torch.add(grad, torch.mul(param, weight_decay, out=space.kept), out=space.gradient)

        # compare signs; sign(0) = 0, and torch's sign(NaN) = 0 too
        sign = torch.sign(grad, out=space.sign)
        agreement = torch.mul(sign, torch.sign(prev, out=space.size), out=space.size)
        if retreat is not False:
            bad = along(is_bad[param.device], param)
            agreement = agreement.masked_fill(bad, -1) if lazily else agreement.masked_fill_(bad, -1)
        flipped = torch.lt(agreement, 0, out=space.flipped)

        # adapt the step size: 1 + etaplus * (-1, 0, 1), clamped to [etaminus, etaplus], is (etaminus, 1, etaplus)
        factor = torch.mul(agreement, etaplus, out=space.size).add_(1).clamp_(etaminus, etaplus)
        before = step_size.clone() if differentiable else step_size  # autograd saves the factors of a product
        size = torch.mul(before, factor, out=space.size)
        if size.dtype != step_size.dtype:  # the parameter's dtype changed during training
            size = size.to(step_size.dtype)
        size.clamp_(step_size_min, step_size_max)

        # move; at a flip move back by the last step size, or not at all
        distance = size if take_back is False else torch.where(flipped, step_size, size, out=space.distance)
        if forget and take_back is not True:
            stays = flipped
            if take_back is not False:
                stays = torch.logical_and(flipped, along(fell[param.device], param), out=space.mask)
            sign = sign.masked_fill(stays, 0) if keeps_sign else sign.masked_fill_(stays, 0)
        if retreat is not False:
            opposite = torch.sign(torch.neg(prev, out=space.kept), out=space.kept)
            sign = torch.where(bad, opposite, sign, out=space.sign)
            distance = torch.where(bad, step_size, distance, out=space.distance)

        # store the gradient: 0 at a flip, the previous one where this one is NaN
        kept = torch.where(torch.ne(grad, grad, out=space.mask), prev, grad, out=space.kept)
        if forget:
            kept.masked_fill_(flipped, 0)
        if retreat is not False:
            kept.masked_fill_(bad, 0)
        return sign, distance, size, kept

    rows = list(zip(params, grads, prevs, step_sizes, strict=True))
    early: list[tuple[Tensor, ...] | None] = [None] * len(rows)
    if not lazily:
        for i, row in enumerate(rows):
            if not differentiable and is_sharable(row):
                reserve(scratch, row[0], names)
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


def on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a flag of a rule, or a number, as a tensor on this device."""
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


@lru_cache(maxsize=64)
def rounded(dtype: torch.dtype, numbers: tuple[float, ...]) -> array[float]:
    """Round the numbers of a rule as torch's operations on tensors of a dtype do, for custom kernels.

    Factors and bounds become numbers of that dtype. The weight decay is a factor in torch's computation type, which is
    float32 for float16 and bfloat16.

    Args:
        dtype: The parameters' dtype.
        numbers: The first five fields of a ``Rule``.

    Returns:
        The numbers as C doubles; do not write to them.
    """
    *factors_and_bounds, weight_decay = numbers
    decay_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return array(
        "d",
        [
            *torch.tensor(factors_and_bounds, dtype=dtype, device="cpu").tolist(),
            torch.tensor(weight_decay, dtype=decay_dtype, device="cpu").item(),
        ],
    )
