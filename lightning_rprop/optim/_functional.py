"""The functional form of Rprop, beside the class as in ``torch.optim``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_rprop._torch import is_transformed, is_watched
from lightning_rprop.optim._dispatch import dispatch
from lightning_rprop.optim._scratch import Scratch
from lightning_rprop.optim._variants import AT_FLIP

_ONE = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def rprop(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    capturable: bool = False,
    maximize: bool = False,
    differentiable: bool = False,
    has_complex: bool = False,
    *,
    fused: bool | None = None,
    step_size_min: float,
    step_size_max: float,
    etaminus: float,
    etaplus: float,
    weight_decay: float = 0.0,
    variant: str = "irprop-",
    loss_rose: bool | Tensor = False,
) -> None:
    r"""Make one step of Rprop with the given tensors; a drop-in for ``torch.optim.rprop.rprop``.

    Call it under ``torch.no_grad()`` for parameters that require grad, as with the functions of ``torch.optim``. The
    class :class:`lightning_rprop.Rprop` checks its arguments; this function trusts them.

    Args:
        params: The parameters, real or complex, of any shape and memory format; modified in place.
        grads: Their gradients, of the same shapes; never written to.
        prevs: The previous gradients, zeros at first; modified in place.
        step_sizes: The step size of every weight, in the parameters' unit; modified in place. A complex one holds those
            of the real and of the imaginary part, which are treated as two weights.
        state_steps: One counter (a tensor of one element) for each parameter; modified in place.
        foreach: Whether the foreach implementation is used; ``None`` uses it on accelerators, for what no
            fused kernel serves (default: ``None``).
        capturable: Whether the step may be captured in a graph; the operations are the same (default: ``False``).
        maximize: Whether to climb instead of descend (default: ``False``).
        differentiable: Whether autograd goes through the step (default: ``False``).
        has_complex: Taken for torch's sake; complex tensors are recognised by their dtype (default: ``False``).
        fused: Whether a fused kernel is used: ``None`` uses it wherever one serves, unless ``foreach`` says otherwise;
            ``True`` demands it (default: ``None``).
        step_size_min: The lower bound of the step sizes.
        step_size_max: The upper bound of the step sizes.
        etaminus: The factor of a step size after a change of sign.
        etaplus: The factor of a step size after two gradients of one sign.
        weight_decay: This times the parameter is added to its gradient (default: 0).
        variant: The rule, one of ``"irprop-"``, ``"irprop+"``, ``"rprop-"``, ``"rprop+"`` (default: ``"irprop-"``).
        loss_rose: For ``"irprop+"``, whether the loss is worse than at the call before; a bool, or a bool tensor that
            broadcasts to every parameter (default: ``False``).

    Raises:
        RuntimeError: If ``state_steps`` holds something else than tensors, or if ``fused=True`` and no fused kernel
            serves one of the parameters.
    """
    del capturable, has_complex
    if set(map(type, state_steps)) != {Tensor} and not all(isinstance(step, Tensor) for step in state_steps):
        raise RuntimeError("API has changed, `state_steps` argument must contain a list of singleton tensors")
    moves = prepare(
        params,
        grads,
        prevs,
        step_sizes,
        state_steps,
        foreach=foreach,
        fused=fused,
        maximize=maximize,
        differentiable=differentiable,
        step_size_min=step_size_min,
        step_size_max=step_size_max,
        etaminus=etaminus,
        etaplus=etaplus,
        weight_decay=weight_decay,
        variant=variant,
        loss_rose=loss_rose,
        scratch={},
    )
    for move in moves:
        move()


def prepare(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    state_steps: list[Tensor],
    *,
    foreach: bool | None,
    fused: bool | None,
    maximize: bool,
    differentiable: bool,
    step_size_min: float,
    step_size_max: float,
    etaminus: float,
    etaplus: float,
    weight_decay: float,
    variant: str,
    loss_rose: bool | Tensor,
    scratch: Scratch,
) -> list[Callable[[], None]]:
    """Prepare a step, with the arguments of :func:`rprop`.

    Returns:
        Functions that make the step. What can fail, above all to allocate memory, has been done before.
    """
    if not params:
        return []
    forget, always_or_never = AT_FLIP[variant]
    take_back = loss_rose if always_or_never is None else always_or_never
    chosen = dispatch(
        params,
        grads,
        prevs,
        step_sizes,
        foreach=foreach,
        fused=fused,
        take_back=take_back,
        differentiable=differentiable,
    )
    moves: list[Callable[[], None]] = [partial(_count, state_steps)]
    for update, tensors in chosen:
        moves.append(
            update(
                *tensors,
                etaminus=etaminus,
                etaplus=etaplus,
                step_size_min=step_size_min,
                step_size_max=step_size_max,
                weight_decay=weight_decay,
                maximize=maximize,
                forget=forget,
                take_back=take_back,
                differentiable=differentiable,
                scratch=scratch,
            )
        )
    return moves


def prepare_with_autograd(*args: Any, **kwargs: Any) -> list[Callable[[], None]]:
    """Prepare a step through which autograd goes, wherever it is called."""
    with torch.enable_grad():
        return [torch.enable_grad()(move) for move in prepare(*args, **kwargs)]


def _count(steps: list[Tensor]) -> None:
    """Add 1 to the step counters."""
    first = steps[0]
    if type(first) is not Tensor or torch.compiler.is_compiling() or is_watched():
        torch._foreach_add_(steps, 1)
    elif is_transformed():  # for which torch has no foreach operations
        for step in steps:
            step.add_(1)
    elif first.is_cpu and first.dtype in _ONE:
        # a number would be made a tensor for each of them, which takes seven times as long
        torch._foreach_add_(steps, _ONE[first.dtype], alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)
