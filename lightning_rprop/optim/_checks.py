"""What is refused before anything is changed: a step that would fail half-way, a state that is another parameter's."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rprop._torch import is_true
from lightning_rprop.optim._dispatch import as_real, check_fused
from lightning_rprop.optim._sharding import local
from lightning_rprop.optim._variants import AT_FLIP

# The state of a parameter, with torch.optim.Rprop's keys and meanings.
_STATE_KEYS = ("step", "prev", "step_size")


def name_of(group: dict[str, Any], index: int) -> str:
    """Return the name of a parameter, if the optimizer was given names, else its index."""
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index}"


def check_state(name: str, param: Tensor, state: Any) -> None:
    """Refuse a state that is not this parameter's, which torch notices at the first step only, in mid-update."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of {name} is {state!r}, not a dict: it was not saved by Rprop")
    if absent := [key for key in _STATE_KEYS if key not in state]:
        raise ValueError(
            f"the state of {name} has no {', '.join(absent)}, but {', '.join(map(str, state))}: "
            "it was not saved by Rprop"
        )
    for key in ("prev", "step_size"):
        value = state[key]
        if not (
            isinstance(value, Tensor)
            and value.shape == param.shape
            and value.is_complex() == param.is_complex()
            and (value.is_complex() or value.is_floating_point())
            and value.layout is torch.strided
            and (value.is_complex() or value.dtype.itemsize > 1)  # float8 has no arithmetic
        ):
            raise ValueError(
                f"the state of {name} does not fit: its {key} is {_described(value)}, the "
                f"parameter is {param.dtype} {tuple(param.shape)}: was the checkpoint saved from another model?"
            )
    for key in ("step", "prev_loss"):
        value = state.get(key)
        is_number = isinstance(value, Real) if key == "step" else key not in state  # torch once saved a plain number
        is_real = isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool
        if not (is_real and value.numel() == 1 if isinstance(value, Tensor) else is_number):
            raise ValueError(
                f"the state of {name} does not fit: its {key} is {_described(value)}, not a tensor of one real number: "
                "was the checkpoint changed after it was saved?"
            )
    if not is_true((as_real(local(state["step_size"])) >= 0).all(), unknown=True):
        raise ValueError(
            f"the state of {name} does not fit: its step_size has NaN or negative elements: was the checkpoint changed "
            "after it was saved?"
        )


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_step(
    groups: list[dict[str, Any]], states: Mapping[Tensor, Any], loss: float | Tensor | None, shared_loss: bool
) -> None:
    """Refuse what would fail half-way through a step, or let replicas drift apart."""
    for group in groups:
        params = group["params"]
        grads = [param.grad for param in params]
        layouts = {grad.layout for grad in grads if grad is not None}
        if not layouts:
            continue
        if AT_FLIP[group["variant"]].take_back is None:
            _check_loss(loss, shared_loss)
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
    """Return what a step works with; state that is not there yet will be made like the parameter."""
    state = states.get(param, {})
    return param, grad, state.get("prev", param), state.get("step_size", param)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _check_loss(loss: float | Tensor | None, shared_loss: bool) -> None:
    """Refuse what iRprop+ cannot compare, or what each process would compare for itself."""
    if loss is None:
        raise RuntimeError(
            "variant='irprop+' compares the loss with that of the step before, but got none: call "
            "step(closure) with a closure that returns it, or step(loss=loss)"
        )
    if not (loss.numel() == 1 and not loss.is_complex() if isinstance(loss, Tensor) else isinstance(loss, Real)):
        raise ValueError(f"loss must be a number or a tensor of one element, got {loss!r}")
    if not shared_loss and dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        raise RuntimeError(
            f"variant='irprop+' would compare another loss on each of the {size} processes, and their replicas would "
            "drift apart: train with the FullBatch callback, or reduce the loss over the processes and set "
            "optimizer.shared_loss = True (on the Rprop itself: the .optimizer of Lightning's or Fabric's wrapper, the "
            ".optim of ZeroRedundancyOptimizer)"
        )
