"""The optimizer class: checks, state, gathering and ``step``; the rule itself stands in ``update.py``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_rprop._torch import is_true
from lightning_rprop.optim._checks import check_state, check_step, name_of
from lightning_rprop.optim._closure import evaluate_anew
from lightning_rprop.optim._dispatch import check_fused, check_parameter
from lightning_rprop.optim._functional import prepare, prepare_with_autograd, rprop
from lightning_rprop.optim._options import (
    LATER_OPTIONS,
    check_dtypes,
    check_options,
    differences,
    initial_step_size,
)
from lightning_rprop.optim._scratch import Scratch
from lightning_rprop.optim._sharding import local, placed, whole
from lightning_rprop.optim._variants import AT_FLIP, Variant

__all__ = ["Rprop", "rprop"]


class Rprop(Optimizer):
    """Resilient backpropagation: every weight has its own step size, and only the sign of its gradient counts.

    A drop-in for :class:`torch.optim.Rprop`: the same arguments, state and checkpoints, and the same result to the last
    bit wherever the product of two gradients, which torch takes to compare their signs, neither underflows nor is NaN.
    The default rule is iRprop- (Igel and Huesken 2003), which is what torch's code does;
    ``lightning_rprop/optim/_rule.py`` spells out all four.

    Rprop is made for gradients of the whole data set: the noise of small batches changes their signs.

    Args:
        params: Parameters to optimize, or dicts that define parameter groups, or ``(name, parameter)`` pairs. Dense, of
            any shape, memory format and floating-point or complex dtype; a complex weight is two real ones.
        lr: Initial step size of every weight, in the weights' unit; a number, or a tensor of one element. Read when a
            parameter gets its first gradient, hence a learning rate scheduler has no effect on it afterwards.
        etas: Pair (etaminus, etaplus): the factor of a step size after a change of sign, and after two equal signs.
        step_sizes: Pair (min, max): the bounds of every step size, in the weights' unit.
        variant: Rule of the family, ``"irprop-"``, ``"irprop+"``, ``"rprop-"`` or ``"rprop+"``: what a weight does when
            its gradient changes sign. It stays (irprop-); it takes back its last move if the loss rose, else stays
            (irprop+, which needs the loss, see :meth:`step`); it moves on (rprop-); it takes back its move (rprop+).
        weight_decay: This times the weight is added to its gradient before the sign is taken (coupled, L2).
        max_iter: How often one ``step(closure)`` evaluates the closure and moves, as in :class:`torch.optim.LBFGS`; one
            value for all groups. More than 1 spares a training loop's work between steps; the closure must zero the
            gradients, which excludes gradient accumulation and ``torch.amp.GradScaler``.
        maximize: Whether to maximize the objective instead of minimizing it.
        foreach: Whether to use the foreach implementation; ``None`` uses it for plain tensors on accelerators that no
            fused kernel serves.
        fused: Whether to use the fused kernels, which go over memory once, in one call for all tensors: on the CPU by
            Numba, on CUDA by Triton; float64, float32, bfloat16, float16 and complex, dense tensors of any memory
            format that their gradients share. ``None`` uses them wherever they serve, unless ``foreach`` is given;
            ``True`` demands it. All implementations give the same result to the last bit.
        capturable: Whether a step may be captured in a CUDA graph; the parameters must be on an accelerator.
        differentiable: Whether autograd goes through the step. Over several steps the forward pass must use clones of
            the parameters, as with the optimizers of ``torch.optim``: a step changes the parameters in place.

    Attributes:
        shared_loss: Whether the loss that a step gets is the same number on every process, ``False`` at first. With
            several processes irprop+ demands it, because replicas that compare their own losses drift apart.
            :class:`lightning_rprop.FullBatch` sets it for the duration of a fit; set it yourself where you reduce the
            loss over the processes. It is not part of ``state_dict()``.

    Raises:
        ValueError: If an argument is out of its range, also in a parameter group of its own.
        TypeError: If an argument has the wrong type, or a parameter cannot be updated: an expanded tensor, or float8.
        RuntimeError: If ``fused=True`` and no fused kernel serves a parameter, also at a step.

    Example:
        >>> import torch
        >>> from lightning_rprop import Rprop
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Rprop([weight], lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight
        Parameter containing:
        tensor([ 0.7800, -1.7800], requires_grad=True)
    """

    shared_loss: bool = False  # of the class, for optimizers that were pickled before it existed
    _unmoved: set[Tensor]  # parameters whose state was made by a step that moved nothing

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        variant: Variant = "irprop-",
        weight_decay: float = 0.0,
        max_iter: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
            "variant": variant,
            "weight_decay": weight_decay,
            "max_iter": max_iter,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._unmoved = set()
        super().__init__(params, check_options(options))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, whose own options are checked like the constructor's.

        Args:
            param_group: ``"params"`` and any options that differ from the optimizer's; unknown keys are kept.

        Raises:
            ValueError: As the constructor, or as ``torch.optim.Optimizer.add_param_group``; nothing is added then.
            TypeError: Likewise.
        """
        if isinstance(param_group, dict):
            params = param_group["params"]
            if not isinstance(params, set):  # which torch refuses below
                params = [params] if isinstance(params, Tensor) else list(params)  # an iterator can be read once only
            options = check_options({**self.defaults, **param_group, "params": params})
            if self.param_groups and options["max_iter"] != self.param_groups[0]["max_iter"]:
                raise ValueError(
                    f"max_iter must be the same in all parameter groups, got {options['max_iter']} after "
                    f"{self.param_groups[0]['max_iter']}: give it to the optimizer alone"
                )
            named = [
                (repr(p[0]), p[1]) if isinstance(p, tuple) else (f"parameter {i}", p) for i, p in enumerate(params)
            ]
            named = [(name, p) for name, p in named if isinstance(p, Tensor)]
            for name, param in named:
                if param.requires_grad:  # others may be passed: without a gradient they are left alone
                    check_parameter(name, param)
            check_dtypes(options, named)
            if options["fused"]:
                check_fused([name for name, _ in named], [(p, p, p, p) for _, p in named])
            param_group.update(options)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy of the optimizer holds."""
        self._set_initial_step_sizes()
        return {**super().__getstate__(), "shared_loss": self.shared_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled optimizer or a loaded state, ours or ``torch.optim.Rprop``'s, once it is checked."""
        state = dict(state)
        is_pickled = "defaults" in state
        if is_pickled:
            state["defaults"] = check_options({**LATER_OPTIONS, **state["defaults"]})
        # what the saved groups do not say stays as this optimizer's user asked
        own = self.__dict__.get("param_groups") or [LATER_OPTIONS] * len(state["param_groups"])
        for i, (group, own_group) in enumerate(zip(state["param_groups"], own, strict=True)):
            if absent := {"lr", "etas", "step_sizes"} - group.keys():
                raise ValueError(
                    f"parameter group {i} of the state has no {', '.join(sorted(absent))}: it was not saved by Rprop"
                )
            group.update(check_options({name: own_group[name] for name in LATER_OPTIONS} | group))
            named = [(name_of(group, j), param) for j, param in enumerate(group["params"])]
            check_dtypes(group, named)
            for name, param in named:
                if param_state := state["state"].get(param):
                    if is_pickled:  # a state_dict was checked before torch converted it
                        check_state(name, param, param_state)
                    for key in ("prev", "step_size"):
                        param_state[key] = placed(param_state[key], param)
                    if not isinstance(param_state["step"], Tensor):
                        param_state["step"] = _counter(param, group["capturable"]).fill_(float(param_state["step"]))
        super().__setstate__(state)
        self._unmoved = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict, as in torch."""
        self._set_initial_step_sizes()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of ``torch.optim.Rprop``; options that it does not hold stay as they are.

        As in torch, the options in the state replace those that the optimizer was constructed with. Where these differ
        in what a step does, and the optimizer has made no step yet, a warning names them.

        Args:
            state_dict: What ``state_dict()`` returned; its tensors are copied.

        Raises:
            ValueError: If the state does not fit, naming the first parameter that it does not fit; nothing is changed
                then.
        """
        losses: list[tuple[Tensor, Tensor]] = []

        def copy_and_check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # torch hands on the given tensors themselves where dtype and device agree: a later step would write to them
            copies = {
                key: {name: v.clone() if isinstance(v, Tensor) else v for name, v in value.items()}
                if isinstance(value, dict)
                else value
                for key, value in state_dict["state"].items()
            }
            for key, name, param in self._matched(state_dict["param_groups"]):
                if state := copies.get(key):
                    check_state(name, param, state)
                    if "prev_loss" in state:
                        losses.append((param, state["prev_loss"]))
            return {**state_dict, "state": copies}

        is_fresh = all(param in self._unmoved for param in self.state)  # else it may go back to where it was
        own = [dict(group) for group in self.param_groups]
        last = self.register_load_state_dict_pre_hook(copy_and_check)  # sees what the user's hooks made
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        # torch casts all but "step" to the parameter's dtype, in which a loss would lose its digits
        for param, loss in losses:
            self.state[param]["prev_loss"] = loss.to(param.device)
        if is_fresh and (found := differences(own, self.param_groups)):
            is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
            if is_first:
                warnings.warn(
                    f"The loaded state brings other options than this optimizer had, and they are in force: "
                    f"{'; '.join(found)}. To go on with your own, set them in optimizer.param_groups after loading; lr "
                    "is only the first step size of a parameter that has no state yet.",
                    stacklevel=2,
                )

    def _matched(self, saved_groups: list[dict[str, Any]]) -> Iterator[tuple[Any, str, Tensor]]:
        """Iterate over the keys of saved parameters, with name and parameter of this optimizer's."""
        for saved, group in zip(saved_groups, self.param_groups, strict=False):  # torch refuses other numbers
            if "etas" in saved:  # else __setstate__ refuses another optimizer's group
                for i, (key, param) in enumerate(zip(saved["params"], group["params"], strict=False)):
                    yield key, name_of(group, i), param

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    @overload
    def step(self, closure: Callable[[], Tensor], *, loss: float | Tensor | None = None) -> Tensor: ...

    def step(
        self, closure: Callable[[], float | Tensor] | None = None, *, loss: float | Tensor | None = None
    ) -> float | Tensor | None:
        """Make a step, or ``max_iter`` of them, with all parameters that have a gradient.

        The step by which ``torch.distributed.checkpoint`` makes the state of a fresh optimizer (the first one, with lr
        0 and gradients of 0, without a closure or a loss) makes state and nothing else: it is not counted, and the
        first real step begins with ``lr``.

        Args:
            closure: Zeroes the gradients, evaluates the model again, calls ``backward`` and returns the loss.
            loss: The loss that the gradients are of, for loops that call ``backward`` themselves; a tensor of one
                element is not brought to the host. Only iRprop+ looks at it, and prefers it to the closure's.

        Returns:
            What the closure returned first, ``None`` without one.

        Raises:
            RuntimeError: If a gradient is sparse, if ``fused=True`` and no fused kernel serves a parameter, if the step
                cannot be captured in a graph, if iRprop+ got no loss, or its own loss on each of several processes (see
                ``shared_loss``), if ``max_iter`` is more than 1 and the closure is missing or does not zero the
                gradients, or if memory runs out; nothing has moved then.
            TypeError: If a parameter with a gradient cannot be updated; nothing has moved then.
            ValueError: If iRprop+ got something else than one number; nothing has moved then.
        """
        max_iter = self.param_groups[0]["max_iter"]
        if closure is None and loss is None and not torch.compiler.is_compiling() and _makes_state(self):
            self._make_state()
            return None
        if max_iter > 1 and (closure is None or loss is not None):
            raise RuntimeError(
                f"max_iter={max_iter} evaluates a closure that often: call step(closure), without loss=. "
                "Where no closure comes through, as under torch.amp.GradScaler, use max_iter=1"
            )
        if closure is None:
            self._move(loss)
            return None
        with torch.enable_grad():
            first = closure() if max_iter == 1 else evaluate_anew(closure, self.param_groups)
        self._move(first if loss is None else loss)
        for _ in range(max_iter - 1):
            with torch.enable_grad():
                again = closure()
            self._move(again)
        return first

    def _make_state(self) -> None:
        """Make the state that a first step would make, with a place for the loss, and move nothing."""
        for group in self.param_groups:
            self._init_group(group, [], [], [], [], [])
            if AT_FLIP[group["variant"]].take_back is None:
                _, keep_loss = self._compare(group, math.nan)  # which counts as the worst
                keep_loss()
        self._unmoved.update(self.state)

    def _move(self, loss: float | Tensor | None) -> None:
        """Move every parameter that has a gradient, once; or none, if that fails."""
        check_step(self.param_groups, self.state, loss, self.shared_loss)
        moves: list[Callable[[], None]] = []
        scratch: Scratch = {}
        with torch.set_grad_enabled(False):  # half the time of no_grad()
            for group in self.param_groups:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                prevs: list[Tensor] = []
                step_sizes: list[Tensor] = []
                state_steps: list[Tensor] = []
                self._init_group(group, params, grads, prevs, step_sizes, state_steps)
                etaminus, etaplus = group["etas"]
                step_size_min, step_size_max = group["step_sizes"]
                loss_rose: bool | Tensor = False
                if AT_FLIP[group["variant"]].take_back is None:
                    loss_rose, keep_loss = self._compare(group, loss)
                    moves.append(keep_loss)
                moves += (prepare_with_autograd if group["differentiable"] else prepare)(
                    params,
                    grads,
                    prevs,
                    step_sizes,
                    state_steps,
                    foreach=group["foreach"],
                    fused=group["fused"],
                    maximize=group["maximize"],
                    differentiable=group["differentiable"],
                    step_size_min=step_size_min,
                    step_size_max=step_size_max,
                    etaminus=etaminus,
                    etaplus=etaplus,
                    weight_decay=group["weight_decay"],
                    variant=group["variant"],
                    loss_rose=loss_rose,
                    scratch=scratch,
                )
            for move in moves:  # all that can fail has been done
                move()

    def _compare(self, group: dict[str, Any], loss: float | Tensor | None) -> tuple[bool | Tensor, Callable[[], None]]:
        """Return whether the loss is worse than at the call before, and a function that keeps it for the call after.

        All on the loss's device. NaN counts as the worst of all losses, and so does an infinite one. It is kept as
        "prev_loss" in the state of each parameter, one tensor for all of them: so it travels in every checkpoint.
        """
        states = [self.state[p] for p in group["params"] if p in self.state]
        if loss is None or not states:
            return False, lambda: None  # nothing moves
        now = whole(loss.detach()).reshape(()) if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        worst = -torch.inf if group["maximize"] else torch.inf
        now = torch.where(now.isnan(), worst, now)
        before = next((state["prev_loss"] for state in states if "prev_loss" in state), None)
        before = torch.full_like(now, worst) if before is None else before.to(now.device)
        rose = (now < before if group["maximize"] else now > before) | (now == worst)

        def keep() -> None:
            kept = before.copy_(now) if before.dtype == now.dtype else now  # in place: a captured graph has its address
            for state in states:
                state["prev_loss"] = kept

        return rose, keep

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        prevs: list[Tensor],
        step_sizes: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        """Fill the lists, and make the state of parameters that have none yet.

        The name and the empty lists are a protocol: torch.compile runs this method of an optimizer once, eagerly, and
        traces only what follows (torch/_dynamo/variables/optimizer.py).
        """
        unmoved = self._unmoved
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if unmoved and p in unmoved:
                _set_step_size(self.state[p], group)
                unmoved.remove(p)
            state = self.state.get(p)
            if state is None or "step_size" not in state:
                check_parameter(next(name_of(group, i) for i, q in enumerate(group["params"]) if q is p), p)
                new = _new_state(p, group)  # all of it or nothing, if memory runs out
                state = self.state[p]
                state.update(new)
            prev = state["prev"]
            if prev.shape != p.shape or grad.shape != p.shape:
                raise RuntimeError(
                    f"{next(name_of(group, i) for i, q in enumerate(group['params']) if q is p)} has the shape "
                    f"{tuple(p.shape)}, its gradient {tuple(grad.shape)}, and its state {tuple(prev.shape)}: after "
                    "changing a parameter's shape, make a new optimizer"
                )
            params.append(p)
            grads.append(grad)
            prevs.append(prev)
            step_sizes.append(state["step_size"])
            state_steps.append(state["step"])

    def _set_initial_step_sizes(self) -> None:
        """Set the step sizes of parameters that have state but have not moved to what lr is now."""
        for group in self.param_groups:
            for p in self._unmoved.intersection(group["params"]):
                _set_step_size(self.state[p], group)


def _makes_state(optimizer: Optimizer) -> bool:
    """Return whether this is the step by which torch.distributed.checkpoint makes state, to load into it.

    It is the first one, with lr 0 and gradients of 0, and without a closure or a loss.
    """
    groups = optimizer.param_groups
    return (
        not optimizer.state
        and all(initial_step_size(group) == 0 for group in groups)
        and not any(
            is_true(local(p.grad).any(), unknown=False)
            for group in groups
            for p in group["params"]
            if p.grad is not None
        )
    )


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Make the state of a parameter, like it in device, memory format and sharding."""
    state = {
        "step": _counter(param, group["capturable"]),
        "prev": torch.zeros_like(param, memory_format=torch.preserve_format),
        "step_size": torch.empty_like(param, memory_format=torch.preserve_format),
    }
    _set_step_size(state, group)
    return state


@torch.no_grad()
def _set_step_size(state: dict[str, Tensor], group: dict[str, Any]) -> None:
    lr, step_size = initial_step_size(group), state["step_size"]
    local(step_size).fill_(complex(lr, lr) if step_size.is_complex() else lr)


def _counter(param: Tensor, capturable: bool) -> Tensor:
    """Make the step counter of a parameter: on its device only for graphs, as there it costs a launch."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=param.device if capturable else "cpu")


# Other packages write the name of the class into their files: it is the public one. The doctest is found all the same.
Rprop.__module__ = "lightning_rprop"
__test__ = {"Rprop": Rprop}
