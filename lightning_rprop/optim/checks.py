"""What is refused before anything is changed: a step that would fail half-way, a state that is another parameter's."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

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


def check_step(groups: list[dict[str, Any]], loss: float | Tensor | None) -> None:
    """Refuse what would fail half-way through a step."""
    compiling = torch.compiler.is_compiling()  # the compiler looks after graph capture itself
    for group in groups:
        if AT_FLIP[group["variant"]].take_back is None and any(param.grad is not None for param in group["params"]):
            _check_loss(loss)
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            if param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"Rprop does not support sparse gradients: that of {name_of(group, i)} is {param.grad.layout}: "
                    "make it dense (sparse=False in nn.Embedding, or param.grad = param.grad.to_dense())"
                )
            if compiling:
                continue
            if group["capturable"] and param.device.type == "cpu":
                raise RuntimeError(
                    "If capturable=True, params and state_steps must be on an accelerator, but "
                    f"{name_of(group, i)} is on the CPU: leave capturable=False"
                )
            if param.is_cuda and not group["capturable"] and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "Attempting CUDA graph capture of step() for an instance of Rprop but param_groups' capturable is "
                    "False: pass capturable=True"
                )


def _check_loss(loss: float | Tensor | None) -> None:
    """Refuse what iRprop+ cannot compare."""
    if loss is None:
        raise RuntimeError(
            "variant='irprop+' compares the loss with that of the step before, but got none: call "
            "step(closure) with a closure that returns it, or step(loss=loss)"
        )
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, Real)):
        raise ValueError(f"loss must be a number or a tensor of one element, got {loss!r}")
