"""The options of a parameter group: what is valid, and what an error says.

Where ``torch.optim`` has words for an error, the message starts with them; the rest names the argument, the value and
the remedy. Values come back as plain Python numbers, whatever config library they came from, so that a checkpoint with
them loads under ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lightning_rprop.optim._variants import AT_FLIP

# What a group holds that was pickled before an option existed, or by torch.optim.Rprop.
LATER_OPTIONS: Mapping[str, Any] = {
    "variant": "irprop-",
    "weight_decay": 0.0,
    "max_iter": 1,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of one group.

    Args:
        options: all of Rprop's options, and any others, which pass untouched.

    Returns:
        A copy in which Rprop's options are plain Python values (``lr`` may be a tensor, as in ``torch.optim``).

    Raises:
        ValueError: If a value is out of range, or two options exclude each other.
        TypeError: If a value has the wrong type.
    """
    checked = dict(options)

    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements: lr is one initial step size for all")
    if isinstance(lr, Tensor) and not lr.is_floating_point():
        raise TypeError(f"Tensor lr must be a floating-point tensor, got {lr!r}: write for example torch.tensor(1e-2)")
    number = lr.item() if isinstance(lr, Tensor) else _number("lr", lr)
    if not 0.0 <= number < math.inf:
        raise ValueError(
            f"Invalid learning rate: {number}: lr is the initial step size of every weight, "
            "a finite number >= 0, for example lr=1e-2"
        )
    checked["lr"] = lr if isinstance(lr, Tensor) else number

    checked["etas"] = etas = _numbers("etas", options["etas"])
    if len(etas) != 2 or not 0.0 < etas[0] < 1.0 < etas[1] < math.inf:
        raise ValueError(
            f"Invalid eta values: {_listed(etas)}: etas must be (etaminus, etaplus) "
            "with 0 < etaminus < 1 < etaplus < inf, for example etas=(0.5, 1.2)"
        )

    checked["step_sizes"] = step_sizes = _numbers("step_sizes", options["step_sizes"])
    if len(step_sizes) != 2 or not 0.0 <= step_sizes[0] <= step_sizes[1] < math.inf:
        raise ValueError(
            f"Invalid step sizes: {_listed(step_sizes)}: step_sizes must be (min, max) "
            "with 0 <= min <= max < inf, for example step_sizes=(1e-6, 50)"
        )

    checked["weight_decay"] = weight_decay = _number("weight_decay", options["weight_decay"])
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(
            f"Invalid weight_decay value: {weight_decay}: weight_decay must be a finite number >= 0; 0 turns it off"
        )

    variant = options["variant"]
    checked["variant"] = variant = variant.value if isinstance(variant, Enum) else variant
    if not isinstance(variant, str) or variant not in AT_FLIP:
        raise ValueError(f"Invalid variant: {variant!r}: variant must be one of {', '.join(AT_FLIP)}")

    max_iter = options["max_iter"]
    if not isinstance(max_iter, Integral) or isinstance(max_iter, bool):
        raise TypeError(f"max_iter must be an integer >= 1, got {max_iter!r} ({type(max_iter).__name__})")
    checked["max_iter"] = max_iter = int(max_iter)
    if max_iter < 1:
        raise ValueError(f"Invalid max_iter value: {max_iter}: max_iter must be an integer >= 1; 1 is one move a step")

    for name in ("maximize", "foreach", "fused", "capturable", "differentiable"):
        choices = (True, False, None) if name in ("foreach", "fused") else (True, False)
        if not any(options[name] is choice for choice in choices):
            raise TypeError(f"{name} must be one of {_listed(choices)}, got {options[name]!r}")
    if options["fused"] and options["foreach"]:
        raise ValueError("`fused` and `foreach` cannot be `True` together: leave foreach=None")
    if options["fused"] and options["differentiable"]:
        raise ValueError("`fused` does not support `differentiable`: leave fused=None")
    if options["foreach"] and options["differentiable"]:
        raise ValueError("foreach=True and differentiable=True exclude each other: leave foreach=None")
    return checked


def check_dtypes(options: Mapping[str, Any], params: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the options of a group still mean something in the dtypes of its parameters.

    Args:
        options: what :func:`check_options` returned.
        params: names and parameters.

    Raises:
        ValueError: If a factor rounds to 1 in a parameter's dtype (a step size would never shrink or never grow; with
            ``etaminus`` so, ``torch.optim.Rprop`` stops training silently), or a step size overflows it.
    """
    etaminus, etaplus = options["etas"]
    lr = initial_step_size(options)
    largest = max(lr, options["step_sizes"][1], etaplus)
    for name, param in params:
        if not (param.is_floating_point() or param.is_complex()):
            continue
        info = torch.finfo(param.dtype)
        # eps is the gap above 1; the gap below is half of it, and half a gap or less away is rounded to 1
        if 1 - etaminus <= info.eps / 4 or etaplus - 1 <= info.eps / 2:
            raise ValueError(
                f"Invalid eta values: {etaminus}, {etaplus}: one of etas rounds to 1 in {param.dtype}, the dtype of "
                f"{name}: choose etas further from 1, or parameters of a wider dtype"
            )
        if largest > info.max:
            raise ValueError(
                f"lr, etas and step_sizes must be finite in {param.dtype}, the dtype of {name}, whose largest number "
                f"is {info.max}: got lr={lr}, etas={options['etas']}, "
                f"step_sizes={options['step_sizes']}: choose smaller ones, or parameters of a wider dtype"
            )


def initial_step_size(options: Mapping[str, Any]) -> float:
    """Return ``lr``, a number or a tensor of one element, as a number."""
    return options["lr"].item() if isinstance(options["lr"], Tensor) else options["lr"]


def differences(own: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare the options of groups that change what a step does.

    Args:
        own: Groups before a state was loaded.
        loaded: The same groups after that.

    Returns:
        A text for each option that has another value, with both values. Where a learning rate scheduler is at work, lr
        is that before it.
    """
    texts = []
    for i, (before, after) in enumerate(zip(own, loaded, strict=True)):
        where = f"in parameter group {i} " if len(own) > 1 else ""
        for name in ("variant", "lr", "etas", "step_sizes", "weight_decay", "max_iter", "maximize"):
            a, b = (group.get("initial_lr", group[name]) if name == "lr" else group[name] for group in (before, after))
            if not _is_same(a, b):
                a, b = (value.item() if isinstance(value, Tensor) else value for value in (a, b))
                texts.append(f"{where}{name} is {b!r}, not {a!r}")
    return texts


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
        except OverflowError:  # a whole number of more than 308 digits
            return math.inf
    hint = ": YAML reads a number such as 1e-2 as text, write 1.0e-2" if isinstance(value, str) else ""
    raise TypeError(f"{name} must be made of numbers, got {value!r} ({type(value).__name__}){hint}")


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a pair of numbers, got {values!r} ({type(values).__name__})")
    return tuple(_number(name, value) for value in values)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
