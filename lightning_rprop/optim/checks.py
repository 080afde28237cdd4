"""What is refused before anything is changed: a step that would fail half-way, a state that is another parameter's."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_rprop.optim.dispatch import check_fused
from lightning_rprop.optim.variants import AT_FLIP

# The state of a parameter, with torch.optim.Rprop's keys and meanings.
_STATE_KEYS = ("step", "prev", "step_size")


def name_of(group: dict[str, Any], index: int) -> str:
    """Call a parameter by its name, if the optimizer was given names."""
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index}"


def check_state(name: str, param: Tensor, state: dict[str, Any]) -> None:
    """Refuse a state that is not this parameter's, which torch notices at the first step only, in mid-update."""
    if absent := [key for key in _STATE_KEYS if key not in state]:
        raise ValueError(
            f"the state of {name} has no {', '.join(absent)}, but {', '.join(map(str, state))}: "
            "it was not saved by Rprop"
        )
    for key in ("prev", "step_size"):
        if state[key].shape != param.shape or state[key].is_complex() != param.is_complex():
            raise ValueError(
                f"the state of {name} does not fit: its {key} is {state[key].dtype} {tuple(state[key].shape)}, the "
                f"parameter is {param.dtype} {tuple(param.shape)}: was the checkpoint saved from another model?"
            )


def check_step(groups: list[dict[str, Any]], states: Mapping[Tensor, Any], loss: float | Tensor | None) -> None:
    """Refuse what would fail half-way through a step."""
    for group in groups:
        params = group["params"]
        grads = [param.grad for param in params]
        layouts = {grad.layout for grad in grads if grad is not None}
        if not layouts:
            continue
        if AT_FLIP[group["variant"]].take_back is None:
            _check_loss(loss)
        if layouts != {torch.strided}:
            i, grad = next((i, g) for i, g in enumerate(grads) if g is not None and g.layout is not torch.strided)
            raise RuntimeError(
                f"Rprop does not support sparse gradients: that of {name_of(group, i)} is {grad.layout}: "
                "make it dense (sparse=False in nn.Embedding, or param.grad = param.grad.to_dense())"
            )
        if torch.compiler.is_compiling():  # the compiler looks after graph capture itself
            continue
        if group["fused"]:
            present = [i for i, grad in enumerate(grads) if grad is not None]
            check_fused([name_of(group, i) for i in present], [_row(params[i], grads[i], states) for i in present])
        if group["capturable"]:
            for i, param in enumerate(params):
                if param.is_cpu and grads[i] is not None:
                    raise RuntimeError(
                        "If capturable=True, params and state_steps must be on an accelerator, but "
                        f"{name_of(group, i)} is on the CPU: leave capturable=False"
                    )
        elif _is_capturing() and any(param.is_cuda for param in params):
            raise RuntimeError(
                "Attempting CUDA graph capture of step() for an instance of Rprop but param_groups' capturable is "
                "False: pass capturable=True"
            )


def _row(param: Tensor, grad: Tensor, states: Mapping[Tensor, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give what a step works with; state that is not there yet will be made like the parameter."""
    state = states.get(param, {})
    return param, grad, state.get("prev", param), state.get("step_size", param)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _check_loss(loss: float | Tensor | None) -> None:
    """Refuse what iRprop+ cannot compare."""
    if loss is None:
        raise RuntimeError(
            "variant='irprop+' compares the loss with that of the step before, but got none: call "
            "step(closure) with a closure that returns it, or step(loss=loss)"
        )
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, Real)):
        raise ValueError(f"loss must be a number or a tensor of one element, got {loss!r}")
