"""Checks of options, loaded state and steps, all made before anything changes.

Error messages that ``torch.optim`` has too start with torch's wording.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rprop._torch import is_true
from lightning_rprop.optim._dispatch import check_fused
from lightning_rprop.optim._loss import check_loss, is_local
from lightning_rprop.optim._members import check_members, fits, is_per_member
from lightning_rprop.optim._rule import AT_FLIP, AtFlip
from lightning_rprop.optim._sharding import as_real, local

# Defaults for groups from torch.optim.Rprop, or from a pickle that is older than the option.
LATER_OPTIONS: Mapping[str, Any] = {
    "variant": "irprop-",
    "weight_decay": 0.0,
    "max_iter": 1,
    "retreat": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}

# The state of a parameter, with torch.optim.Rprop's keys and meanings.
_STATE_KEYS = ("step", "prev", "step_size")


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of one group.

    Args:
        options: All Rprop options; other keys are kept unchanged.

    Returns:
        A copy in which the Rprop options are plain Python values, whatever config library they came from, so that
        checkpoints load with ``torch.load(..., weights_only=True)``. ``lr`` may be a tensor, as in ``torch.optim``.

    Raises:
        ValueError: If a value is out of range, or two options exclude each other.
        TypeError: If a value has the wrong type.
    """
    checked = dict(options)

    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements. All weights start with the same lr.")
    if isinstance(lr, Tensor) and not lr.is_floating_point():
        raise TypeError(f"Tensor lr must be a floating-point tensor, got {lr!r}. Use for example torch.tensor(1e-2).")
    number = lr.item() if isinstance(lr, Tensor) else _number("lr", lr)
    if not 0.0 <= number < math.inf:
        raise ValueError(
            f"Invalid learning rate: {number}. lr is the initial step size of every weight and must be a finite "
            "number >= 0, for example lr=1e-2."
        )
    checked["lr"] = lr if isinstance(lr, Tensor) else number

    checked["etas"] = etas = _numbers("etas", options["etas"])
    if len(etas) != 2 or not 0.0 < etas[0] < 1.0 < etas[1] < math.inf:
        raise ValueError(
            f"Invalid eta values: {_listed(etas)}. etas must be (etaminus, etaplus) "
            "with 0 < etaminus < 1 < etaplus < inf, for example etas=(0.5, 1.2)."
        )

    checked["step_sizes"] = step_sizes = _numbers("step_sizes", options["step_sizes"])
    if len(step_sizes) != 2 or not 0.0 <= step_sizes[0] <= step_sizes[1] < math.inf:
        raise ValueError(
            f"Invalid step sizes: {_listed(step_sizes)}. step_sizes must be (min, max) "
            "with 0 <= min <= max < inf, for example step_sizes=(1e-6, 50)."
        )

    checked["weight_decay"] = weight_decay = _number("weight_decay", options["weight_decay"])
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(
            f"Invalid weight_decay value: {weight_decay}. weight_decay must be a finite number >= 0; 0 turns it off."
        )

    variant = options["variant"]
    checked["variant"] = variant = variant.value if isinstance(variant, Enum) else variant
    if not isinstance(variant, str) or variant not in AT_FLIP:
        raise ValueError(f"Invalid variant: {variant!r}. variant must be one of {', '.join(AT_FLIP)}.")

    checked["max_iter"] = check_count("max_iter", options["max_iter"])

    for name in ("retreat", "maximize", "foreach", "fused", "capturable", "differentiable"):
        choices = (True, False, None) if name in ("retreat", "foreach", "fused") else (True, False)
        if not any(options[name] is choice for choice in choices):
            raise TypeError(f"{name} must be one of {_listed(choices)}, got {options[name]!r}.")
    if options["fused"] and options["foreach"]:
        raise ValueError("`fused` and `foreach` cannot be `True` together. Leave foreach=None.")
    if options["fused"] and options["differentiable"]:
        raise ValueError("`fused` does not support `differentiable`. Leave fused=None.")
    if options["foreach"] and options["differentiable"]:
        raise ValueError("foreach=True does not support differentiable=True. Leave foreach=None.")
    return checked


def check_dtypes(options: Mapping[str, Any], params: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the options of a group keep their meaning in the dtypes of its parameters.

    Args:
        options: The result of ``check_options()``.
        params: Names and parameters.

    Raises:
        ValueError: If a factor rounds to 1 in a parameter's dtype, so that step sizes would never shrink or never grow
            (``torch.optim.Rprop`` then stops training silently), or if a step size overflows it.
    """
    etaminus, etaplus = options["etas"]
    lr = initial_step_size(options)
    largest = max(lr, options["step_sizes"][1], etaplus)
    for name, param in params:
        if not (param.is_floating_point() or param.is_complex()):
            continue
        info = torch.finfo(param.dtype)
        # eps is the gap above 1, the gap below is eps / 2; anything within half a gap rounds to 1
        if 1 - etaminus <= info.eps / 4 or etaplus - 1 <= info.eps / 2:
            raise ValueError(
                f"Invalid eta values: {etaminus}, {etaplus}. One of etas rounds to 1 in {param.dtype}, the dtype of "
                f"{name}: choose etas further from 1, or parameters of a wider dtype."
            )
        if largest > info.max:
            raise ValueError(
                f"lr, etas and step_sizes must be finite in {param.dtype}, the dtype of {name}, whose largest number "
                f"is {info.max}; got lr={lr}, etas={options['etas']}, step_sizes={options['step_sizes']}. "
                "Choose smaller values, or parameters of a wider dtype."
            )


def initial_step_size(options: Mapping[str, Any]) -> float:
    """Return ``lr``, a number or a tensor of one element, as a number."""
    return options["lr"].item() if isinstance(options["lr"], Tensor) else options["lr"]


def check_count(name: str, value: Any) -> int:
    """Return a number of steps, members or the like as an ``int``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer >= 1, got {value!r} ({type(value).__name__}).")
    if int(value) < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value}.")
    return int(value)


def differences(own: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare the options of groups that change what a step does.

    Args:
        own: Groups before a state was loaded.
        loaded: The same groups afterwards.

    Returns:
        A text for each option that changed, with both values. If a learning rate scheduler is in use, lr is the value
        before it.
    """
    texts = []
    for i, (before, after) in enumerate(zip(own, loaded, strict=True)):
        where = f"in parameter group {i} " if len(own) > 1 else ""
        for name in ("variant", "lr", "etas", "step_sizes", "weight_decay", "max_iter", "retreat", "maximize"):
            a, b = (group.get("initial_lr", group[name]) if name == "lr" else group[name] for group in (before, after))
            if not _is_same(a, b):
                a, b = (value.item() if isinstance(value, Tensor) else value for value in (a, b))
                texts.append(f"{where}{name} is {b!r}, not {a!r}")
    return texts


def name_of(group: dict[str, Any], index: int) -> str:
    """Return the name of a parameter if the optimizer was given names, else its index."""
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index}"


def check_state(name: str, param: Tensor, state: Any) -> None:
    """Check that a state fits a parameter; torch would only notice in the middle of the next step.

    Raises:
        ValueError: If it does not fit.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"The state of {name} is {state!r}, not a dict. Load a state saved by Rprop.")
    if absent := [key for key in _STATE_KEYS if key not in state]:
        raise ValueError(
            f"The state of {name} has no {', '.join(absent)}, only {', '.join(map(str, state))}. "
            "Load a state saved by Rprop."
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
                f"The state of {name} does not fit: its {key} is {_described(value)}, but the parameter is "
                f"{param.dtype} {tuple(param.shape)}. Check that the checkpoint was saved from the same model."
            )
    for key in ("step", "prev_loss"):
        value = state.get(key)
        is_number = isinstance(value, Real) if key == "step" else key not in state  # torch once saved a plain number
        if isinstance(value, Tensor):
            is_real = not value.is_complex() and value.dtype != torch.bool
            is_number = is_real and (value.numel() == 1 or (key == "prev_loss" and value.shape == param.shape[:1]))
        elif key == "prev_loss" and isinstance(value, list):
            is_number = {*map(type, value)} == {float} and (len(value),) == param.shape[:1]
        if not is_number:
            form = "" if key == "step" or not param.dim() else f", or {len(param)} of them, one for each member"
            raise ValueError(
                f"The state of {name} does not fit: its {key} is {_described(value)}, not a tensor with one real "
                f"number{form}. Check whether the checkpoint was modified after it was saved."
            )
    if not is_true((as_real(local(state["step_size"])) >= 0).all(), unknown=True):
        raise ValueError(
            f"The state of {name} does not fit: its step_size has NaN or negative elements. Check whether the "
            "checkpoint was modified after it was saved."
        )


def check_step(
    groups: Sequence[dict[str, Any]],
    at_flips: Sequence[AtFlip],
    states: Mapping[Tensor, Any],
    loss: float | Tensor | None,
    shared_loss: bool,
) -> None:
    """Check everything that could otherwise fail in the middle of a step, or let replicas diverge."""
    if loss is not None and any(group["retreat"] for group in groups):
        check_loss(loss)
    for index, group in enumerate(groups):
        params = group["params"]
        grads = [param.grad for param in params]
        layouts = {grad.layout for grad in grads if grad is not None}
        if not layouts:
            continue
        if at_flips[index].take_back is None:
            _check_loss(loss, shared_loss)
        if layouts != {torch.strided}:
            i, grad = next((i, g) for i, g in enumerate(grads) if g is not None and g.layout is not torch.strided)
            raise RuntimeError(
                f"Rprop does not support sparse gradients, but that of {name_of(group, i)} is {grad.layout}. "
                "Make it dense: sparse=False in nn.Embedding, or param.grad = param.grad.to_dense()."
            )
        if torch.compiler.is_compiling():  # the compiler handles fused kernels and graph capture itself
            continue
        if group["fused"]:
            present = [i for i, grad in enumerate(grads) if grad is not None]
            names, rows = zip(*((name_of(group, i), _row(params[i], grads[i], states)) for i in present), strict=True)
            check_fused(names, rows, is_per_member(loss) and is_judged(group, shared_loss))
        if group["capturable"]:
            for i, param in enumerate(params):
                if param.is_cpu and grads[i] is not None:
                    raise RuntimeError(
                        "If capturable=True, params and state_steps must be on an accelerator, but "
                        f"{name_of(group, i)} is on the CPU. Leave capturable=False."
                    )
        elif _is_capturing() and any(param.is_cuda for param in params):
            raise RuntimeError(
                "Attempting CUDA graph capture of step() for an instance of Rprop but param_groups' capturable is "
                "False. Construct Rprop with capturable=True."
            )


def members_losses(
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, Any],
    losses: Tensor,
    is_result: bool,
    shared_loss: bool,
) -> Tensor | None:
    """Return the losses that judge members, or ``None`` if they are something else that a closure returns.

    Args:
        groups: The optimizer's parameter groups.
        states: Its state.
        losses: Several numbers, of shape ``(n,)``.
        is_result: They are a closure's result, which may be anything if no option asks for a loss.
        shared_loss: See ``Rprop``.

    Raises:
        ValueError: If a parameter that they judge has another first dimension. If no option asks for a loss, then only
            if another parameter has theirs.
    """
    judged: list[tuple[dict[str, Any], int, Tensor]] = []
    is_asked = not is_result
    for group in groups:
        if is_judged(group, shared_loss):
            is_asked = is_asked or AT_FLIP[group["variant"]].take_back is None or bool(group["retreat"])
            judged += [(group, i, p) for i, p in enumerate(group["params"]) if p.grad is not None or p in states]
    fitting = [fits(losses, param) for _, _, param in judged]
    if not is_asked and not any(fitting):
        return None
    if not all(fitting):  # else the names would take more time than all other checks
        check_members(losses, ((name_of(group, i), param) for group, i, param in judged))
    return losses


def is_judged(group: dict[str, Any], shared_loss: bool) -> bool:
    """Return whether the loss has an effect on the parameters of a group."""
    retreat = not is_local(shared_loss) if group["retreat"] is None else group["retreat"]
    return retreat or AT_FLIP[group["variant"]].take_back is None


def _row(param: Tensor, grad: Tensor, states: Mapping[Tensor, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of a step; state that does not exist yet will be created like the parameter."""
    state = states.get(param, {})
    return param, grad, state.get("prev", param), state.get("step_size", param)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _check_loss(loss: float | Tensor | None, shared_loss: bool) -> None:
    """Check the loss that iRprop+ compares."""
    if loss is None:
        raise RuntimeError(
            "variant='irprop+' compares the loss with that of the previous step, but got none. Call "
            "step(closure) with a closure that returns the loss, or step(loss=loss)."
        )
    check_loss(loss)
    if is_local(shared_loss):
        raise RuntimeError(
            f"variant='irprop+' would compare a different loss on each of the {dist.get_world_size()} processes, and "
            "their replicas would diverge. Train with the FullBatch callback, or reduce the loss over the processes "
            "and set optimizer.shared_loss = True (on the Rprop itself: .optimizer of a Lightning or Fabric wrapper, "
            ".optim of ZeroRedundancyOptimizer)."
        )


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        dtypes = [value.dtype for value in (a, b) if isinstance(value, Tensor)]
        dtype = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)  # a number rounds when it becomes a tensor
        a, b = (torch.as_tensor(value, dtype=dtype, device="cpu").item() for value in (a, b))
    return bool(a == b)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return math.inf
    hint = " YAML reads a number such as 1e-2 as text; write 1.0e-2." if isinstance(value, str) else ""
    raise TypeError(f"{name} must be made of numbers, got {value!r} ({type(value).__name__}).{hint}")


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a pair of numbers, got {values!r} ({type(values).__name__}).")
    return tuple(_number(name, value) for value in values)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
