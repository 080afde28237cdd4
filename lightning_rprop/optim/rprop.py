"""The optimizer class and, as in ``torch.optim``, its functional form; the rules are in ``_rule.py``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial, reduce, wraps
from operator import or_
from typing import Any, ParamSpec, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_rprop._torch import (
    is_hooked,
    is_simulated,
    is_simulating,
    is_transformed,
    is_true,
    is_watched,
    record_event,
)
from lightning_rprop.optim._checks import (
    LATER_OPTIONS,
    check_dtypes,
    check_options,
    check_state,
    check_step,
    differences,
    initial_step_size,
    members_losses,
    name_of,
)
from lightning_rprop.optim._closure import evaluate_checked
from lightning_rprop.optim._compiled import prepare_compiled
from lightning_rprop.optim._dispatch import Lists, check_fused, check_parameter, prepare
from lightning_rprop.optim._loss import check_loss, is_bad, is_local, is_loss, is_surely_finite
from lightning_rprop.optim._members import is_per_member
from lightning_rprop.optim._rule import AT_FLIP, Rule, Variant, on_device
from lightning_rprop.optim._scratch import Scratch
from lightning_rprop.optim._sharding import local, placed, whole, wide_dtype

__all__ = ["Rprop", "rprop"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ONE = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


class Rprop(Optimizer):
    """Resilient backpropagation: every weight has its own step size, and only the sign of its gradient counts.

    A drop-in replacement for ``torch.optim.Rprop`` with the same arguments, state and checkpoints. Results are
    equal bit for bit, except where torch's product of two gradients underflows or is NaN: torch multiplies gradients to
    compare their signs. The default rule is iRprop- (Igel and Huesken 2003), which is also what torch implements;
    ``lightning_rprop/optim/_rule.py`` defines all four.

    Rprop needs gradients of the whole data set, because the noise of small batches changes their signs.

    Args:
        params: Parameters to optimize, dicts that define parameter groups, or ``(name, parameter)`` pairs. They must be
            dense; any shape, memory format and floating-point or complex dtype is supported. A complex weight is
            treated as two real ones.
        lr: Initial step size of every weight, in the unit of the weights: a number or a tensor of one element. It is
            read when a parameter gets its first gradient, so a learning rate scheduler has no effect afterwards.
        etas: Pair (etaminus, etaplus): the factors of a step size after a sign change and after two equal signs.
        step_sizes: Pair (min, max): bounds of every step size, in the unit of the weights.
        variant: Rule of the family: ``"irprop-"``, ``"irprop+"``, ``"rprop-"`` or ``"rprop+"``. They differ in what a
            weight does when its gradient changes sign: it stays (irprop-); it takes back its last move if the loss
            rose, else stays (irprop+, which needs the loss, see ``step()``); it moves on (rprop-); it takes back its
            last move (rprop+).
        weight_decay: Factor of the weight that is added to its gradient before the sign is taken (coupled, L2).
        max_iter: How often one ``step(closure)`` evaluates the closure and moves, as in ``torch.optim.LBFGS``; the
            same for all groups. Values above 1 save the training loop's work between steps. The closure must then zero
            the gradients, which rules out gradient accumulation and ``torch.amp.GradScaler``.
        retreat: Whether a step whose loss is NaN, or infinite in the bad direction, takes back the last move of every
            weight, shrinks all step sizes, and makes no other move. It needs the loss: ``step(closure)`` or
            ``step(loss=loss)``. ``None`` means wherever the loss is the same on every process: in a single process, and
            if ``shared_loss`` is true. ``True`` means always, ``False`` never.
        maximize: Whether to maximize the objective instead of minimizing it.
        foreach: Whether to use the foreach implementation. ``None`` uses it for plain tensors on accelerators that no
            fused kernel supports.
        fused: Whether to use the fused kernels, which read and write memory once, in one call for all tensors: Numba
            kernels on the CPU, Triton kernels on CUDA. They support float64, float32, bfloat16, float16 and complex
            dtypes, and dense tensors of any memory format that their gradients share. ``None`` uses them where
            supported unless ``foreach`` is given; ``True`` requires them. All implementations give the same bits.
        capturable: Whether a step may be captured in a CUDA graph; the parameters must be on an accelerator.
        differentiable: Whether autograd can differentiate through the step. Because a step changes the parameters in
            place, several steps need a forward pass on clones of the parameters, as with ``torch.optim``.

    Attributes:
        shared_loss: Whether every process passes the same loss to a step (default: ``False``). With several processes
            irprop+ and the default ``retreat`` require it, because replicas that judge different losses diverge.
            ``FullBatch`` sets it during a fit; set it yourself if you reduce the loss over the
            processes. It is not part of ``state_dict()``.
        retreats: How many steps have taken back the last move, of at least one member: 0, and from the first step on a
            tensor of one element on the device of the parameters. It is not part of ``state_dict()``.

    Raises:
        ValueError: If a value is out of range, also in a parameter group.
        TypeError: If an argument has the wrong type, or a parameter cannot be updated, such as an expanded tensor or
            one of a float8 dtype.
        RuntimeError: If ``fused=True`` and no fused kernel supports a parameter; also raised by a step.

    Examples:
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

    # not set on the class, where Lightning's wrapper would find them instead of forwarding
    shared_loss: bool
    retreats: int | Tensor
    # takes the losses of two evaluations, and returns whether max_iter ends before the move of the second
    _is_done: Callable[[float | Tensor, float | Tensor], bool] | None = None
    _unmoved: set[Tensor]  # parameters whose state was created by a step that moved nothing

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
        retreat: bool | None = None,
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
            "retreat": retreat,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._unmoved = set()
        self.shared_loss, self.retreats = False, 0
        super().__init__(params, check_options(options))

    @staticmethod
    def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
        """Wrap ``step`` for profilers and hooks as torch does, at less cost if there are none.

        Torch's wrapper takes a quarter of the time of a small step. Hooks that are registered during a step run from
        the next one on, and an ``ExecutionTraceObserver`` shows steps only together with a profiler.
        """
        hooked = Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            optimizer: Any = args[0]
            if is_hooked(optimizer):
                return hooked(*args, **kwargs)
            with record_event(f"Optimizer.step#{type(optimizer).__name__}.step"):
                return func(*args, **kwargs)

        return step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its options are checked like the constructor's.

        Args:
            param_group: ``"params"`` and any options that differ from the optimizer's; unknown keys are kept.

        Raises:
            ValueError: Like the constructor and ``torch.optim.Optimizer.add_param_group``; nothing is added.
            TypeError: Likewise.
        """
        if isinstance(param_group, dict):
            params = param_group["params"]
            if not isinstance(params, set):  # torch rejects sets below
                params = [params] if isinstance(params, Tensor) else list(params)  # keep what an iterator yields
            options = check_options({**self.defaults, **param_group, "params": params})
            if self.param_groups and options["max_iter"] != self.param_groups[0]["max_iter"]:
                raise ValueError(
                    f"max_iter must be the same in all parameter groups, got {options['max_iter']} after "
                    f"{self.param_groups[0]['max_iter']}. Pass it to the optimizer, not to a group."
                )
            named = [
                (repr(p[0]), p[1]) if isinstance(p, tuple) else (f"parameter {i}", p) for i, p in enumerate(params)
            ]
            named = [(name, p) for name, p in named if isinstance(p, Tensor)]
            for name, param in named:
                if param.requires_grad:  # others are checked at a step if they have a gradient
                    check_parameter(name, param)
            check_dtypes(options, named)
            if options["fused"]:
                check_fused([name for name, _ in named], [(p, p, p, p) for _, p in named])
            param_group.update(options)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling and copying."""
        self._set_initial_step_sizes()
        return {**super().__getstate__(), "shared_loss": self.shared_loss, "retreats": self.retreats}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Check and set the state of a pickle or a checkpoint, from this class or ``torch.optim.Rprop``."""
        state = dict(state)
        is_pickled = "defaults" in state
        if is_pickled:
            state["defaults"] = check_options({**LATER_OPTIONS, **state["defaults"]})
            state = {"shared_loss": False, "retreats": 0, **state}  # which older pickles lack
        # options that the saved groups lack keep this optimizer's values
        own = self.__dict__.get("param_groups") or [LATER_OPTIONS] * len(state["param_groups"])
        for i, (group, own_group) in enumerate(zip(state["param_groups"], own, strict=True)):
            if absent := {"lr", "etas", "step_sizes"} - group.keys():
                raise ValueError(
                    f"Parameter group {i} of the state has no {', '.join(sorted(absent))}. Load a state saved by Rprop."
                )
            group.update(check_options({name: own_group[name] for name in LATER_OPTIONS} | group))
            named = [(name_of(group, j), param) for j, param in enumerate(group["params"])]
            check_dtypes(group, named)
            for name, param in named:
                if param_state := state["state"].get(param):
                    if is_pickled:  # load_state_dict checks before torch converts the state
                        check_state(name, param, param_state)
                    for key in ("prev", "step_size"):
                        param_state[key] = placed(param_state[key], param)
                    if not isinstance(param_state["step"], Tensor):
                        param_state["step"] = _counter(param, group["capturable"]).fill_(float(param_state["step"]))
        super().__setstate__(state)
        self._unmoved = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict, like ``torch.optim.Optimizer.state_dict``; losses of members become lists."""
        self._set_initial_step_sizes()
        state_dict = super().state_dict()
        lists: dict[Tensor, list[float]] = {}
        for key, state in state_dict["state"].items():
            losses = state.get("prev_loss") if isinstance(state, dict) else None
            if is_per_member(losses) and not is_simulated(losses):
                # torch.distributed.checkpoint loads tensors only into those of the same size, which a fresh optimizer
                # does not know
                if losses not in lists:
                    lists[losses] = losses.tolist()
                state_dict["state"][key] = {**state, "prev_loss": lists[losses]}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of ``torch.optim.Rprop``.

        As in torch, options in the state replace those of the constructor; options that it lacks are kept. If the
        optimizer has made no step yet, a warning names each replaced option that changes what a step does.

        Args:
            state_dict: The result of ``state_dict()``; its tensors are copied.

        Raises:
            ValueError: If the state does not fit a parameter, which the message names; nothing is changed.
        """
        losses: list[tuple[Tensor, Tensor]] = []

        def copy_and_check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # torch does not copy tensors whose dtype and device fit, so later steps would change the caller's tensors
            copies = {
                key: {name: v.clone() if isinstance(v, Tensor) else v for name, v in value.items()}
                if isinstance(value, dict)
                else value
                for key, value in state_dict["state"].items()
            }
            for key, name, param in self._matched(state_dict["param_groups"]):
                if state := copies.get(key):
                    check_state(name, param, state)
                    if isinstance(state.get("prev_loss"), Tensor):
                        losses.append((param, state["prev_loss"]))
            return {**state_dict, "state": copies}

        is_fresh = all(param in self._unmoved for param in self.state)  # else this may restore an earlier state
        own = [dict(group) for group in self.param_groups]
        last = self.register_load_state_dict_pre_hook(copy_and_check)  # runs after the user's hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        # torch casts all but "step" to the parameter's dtype, which would round the loss
        for param, loss in losses:
            self.state[param]["prev_loss"] = loss.to(param.device)
        if is_fresh and (found := differences(own, self.param_groups)):
            is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
            if is_first:
                warnings.warn(
                    f"The loaded state replaced options of this optimizer: {'; '.join(found)}. To keep your own, set "
                    "them in optimizer.param_groups after loading; lr only affects parameters that have no state yet.",
                    stacklevel=2,
                )

    def _matched(self, saved_groups: list[dict[str, Any]]) -> Iterator[tuple[Any, str, Tensor]]:
        """Iterate over saved parameters: their keys, and the matching names and parameters of this optimizer."""
        for saved, group in zip(saved_groups, self.param_groups, strict=False):  # torch rejects different lengths
            if "etas" in saved:  # else __setstate__ rejects the group as another optimizer's
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
        """Make one step, or ``max_iter`` of them, with all parameters that have a gradient.

        ``torch.distributed.checkpoint`` creates the state of a fresh optimizer by a first step with lr 0, gradients of
        0, no closure and no loss. Such a step only creates state. It is not counted, and the next step starts with
        ``lr``.

        Args:
            closure: Zeroes the gradients, evaluates the model, calls ``backward`` and returns the loss, like ``loss``.
                Unless irprop+ or ``retreat=True`` ask for the loss, it may return anything; a tensor of shape ``(n,)``
                then holds losses of members if the first dimension of any parameter is n.
            loss: The loss of the current gradients, for loops that call ``backward`` themselves: a number, a tensor of
                one element, or the losses of n members, a tensor of shape ``(n,)`` for parameters of shape
                ``(n, ...)`` such as those of ``Stacked``. irprop+ and ``retreat`` then judge each
                member by its own loss. A tensor on an accelerator is not copied to the host. It takes precedence over
                the closure's result.

        Returns:
            The result of the first closure call, or ``None`` without a closure.

        Raises:
            RuntimeError: If a gradient is sparse; if ``fused=True`` and no fused kernel supports a parameter; if the
                step cannot be captured in a graph; if irprop+ got no loss, or a different loss on each process (see
                ``shared_loss``); if ``max_iter`` is more than 1 and the closure is missing or does not zero the
                gradients; or if memory runs out. No parameter has moved then.
            TypeError: If a parameter with a gradient cannot be updated. No parameter has moved then.
            ValueError: If ``loss`` is not a loss, or the closure's result is not although irprop+ or ``retreat=True``
                need it; or if losses of members come with a parameter that they judge and whose first dimension is
                another. No parameter has moved then.
        """
        if loss is not None:
            check_loss(loss)
        max_iter = self.param_groups[0]["max_iter"]
        if closure is None and loss is None and not torch.compiler.is_compiling() and _makes_state(self):
            self._make_state()
            return None
        if max_iter > 1 and (closure is None or loss is not None):
            raise RuntimeError(
                f"max_iter={max_iter} evaluates a closure several times. Call step(closure) without loss=, or use "
                "max_iter=1 if the closure cannot be passed, as with torch.amp.GradScaler."
            )
        if closure is None:
            self._move(loss)
            return None
        with torch.enable_grad():
            first = closure() if max_iter == 1 else evaluate_checked(closure, self.param_groups)
        self._move(first if loss is None else loss, is_result=loss is None)
        before = first
        for _ in range(max_iter - 1):
            with torch.enable_grad():
                again = closure()
            if self._is_done is not None and self._is_done(before, again):
                break
            self._move(again, is_result=True)
            before = again
        return first

    def _make_state(self) -> None:
        """Create the state that a first step would create, including the loss of irprop+, and move nothing."""
        for group in self.param_groups:
            self._init_group(group, [], [], [], [], [])
            if AT_FLIP[group["variant"]].take_back is None:
                _, keep_loss = self._compare(group, math.nan)  # counts as the worst loss
                keep_loss()
        self._unmoved.update(self.state)

    def _move(self, loss: float | Tensor | None, is_result: bool = False) -> None:
        """Move every parameter that has a gradient once, or none if that fails."""
        at_flips = [AT_FLIP[group["variant"]] for group in self.param_groups]
        if is_per_member(loss):
            loss = members_losses(self.param_groups, self.state, loss, is_result, self.shared_loss)
        check_step(self.param_groups, at_flips, self.state, loss, self.shared_loss)
        moves: list[Callable[[], None]] = []
        scratch: Scratch = {}
        retreats, distinct = self._judge(loss)
        with torch.set_grad_enabled(False):  # takes half the time of no_grad()
            for i, group in enumerate(self.param_groups):
                forget, take_back = at_flips[i]
                params: list[Tensor] = []
                grads: list[Tensor] = []
                prevs: list[Tensor] = []
                step_sizes: list[Tensor] = []
                state_steps: list[Tensor] = []
                self._init_group(group, params, grads, prevs, step_sizes, state_steps)
                if retreats[i] is not False and self._has_no_gradient():
                    params, grads, prevs, step_sizes = self._rows_without_gradients(group)
                when: bool | Tensor | None = take_back
                if when is None:
                    when, keep_loss = self._compare(group, loss)
                    moves.append(keep_loss)
                numbers = (*group["etas"], *group["step_sizes"], group["weight_decay"])
                moves += (_prepare_with_autograd if group["differentiable"] else _prepare)(
                    params,
                    grads,
                    prevs,
                    step_sizes,
                    state_steps,
                    Rule._make((*numbers, group["maximize"], forget, when, retreats[i])),
                    foreach=group["foreach"],
                    fused=group["fused"],
                    differentiable=group["differentiable"],
                    scratch=scratch,
                )
            if distinct:
                moves.append(partial(self._count_retreat, reduce(or_, distinct)))
            for move in moves:  # everything that can fail has been done
                move()

    def _judge(self, loss: float | Tensor | None) -> tuple[list[bool | Tensor], list[bool | Tensor]]:
        """Return for each group whether it takes back its last move, and the distinct flags that may be true."""
        # without retreat=True, a closure may return anything
        if loss is None or not is_loss(loss) or is_surely_finite(loss):
            return [False] * len(self.param_groups), []
        by_default = not is_local(self.shared_loss)
        flags: list[bool | Tensor] = []
        found: dict[bool, bool | Tensor] = {}
        for group in self.param_groups:
            retreat, maximize = group["retreat"], group["maximize"]
            is_active = by_default if retreat is None else retreat
            if is_active and maximize not in found:
                found[maximize] = is_bad(loss, maximize)
            flags.append(is_active and found[maximize])
        return flags, [flag for flag in found.values() if flag is not False]

    def _count_retreat(self, flag: bool | Tensor) -> None:
        if isinstance(flag, Tensor):
            flag = flag.any()
            if not torch.compiler.is_compiling() and (is_transformed() or is_simulating()):
                return  # the value is not known
            self.retreats = on_device(self.retreats, flag.device)
        self.retreats += flag

    def _compare(self, group: dict[str, Any], loss: float | Tensor | None) -> tuple[bool | Tensor, Callable[[], None]]:
        """Return whether the loss is worse than at the previous call, and a function that stores it for the next call.

        Everything stays on the loss's device. NaN and infinite losses count as the worst. The loss is stored as
        "prev_loss" in the state of each parameter, one tensor shared by all, so that every checkpoint contains it. If
        that holds another number of losses, there is no previous loss, as at the first call.
        """
        states = [self.state[p] for p in group["params"] if p in self.state]
        if loss is None or not states:
            return False, lambda: None  # nothing moves
        now = whole(loss.detach()) if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        now = now if is_per_member(now) else now.reshape(())
        worst = -torch.inf if group["maximize"] else torch.inf
        now = torch.where(now.isnan(), worst, now)
        before = next((state["prev_loss"] for state in states if "prev_loss" in state), None)
        if isinstance(before, list):  # from a checkpoint
            before = torch.tensor(before, dtype=wide_dtype(now.device), device=now.device)
        if before is None or before.numel() != now.numel():
            before = torch.full_like(now, worst)
        before = before.to(now.device).reshape(now.shape)
        rose = (now < before if group["maximize"] else now > before) | (now == worst)

        def keep() -> None:
            # in place, because a captured graph has its address
            kept = before.copy_(now) if before.dtype == now.dtype else now
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
        """Fill the lists, and create the state of parameters that have none yet.

        The name and the empty lists are required by torch.compile, which runs this method once eagerly and traces only
        what follows (torch/_dynamo/variables/optimizer.py).
        """
        states, unmoved = self.state, self._unmoved
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if unmoved and p in unmoved:
                _set_step_size(states[p], group)
                unmoved.remove(p)
            state = states.get(p)
            if state is None or "step_size" not in state:
                check_parameter(_name_in(group, p), p)
                new = _new_state(p, group)  # complete before it is stored, in case memory runs out
                state = states[p]
                state.update(new)
            prev, shape = state["prev"], p.shape
            if prev.shape != shape or grad.shape != shape:
                raise RuntimeError(
                    f"{_name_in(group, p)} has the shape {tuple(shape)}, its gradient {tuple(grad.shape)}, and its "
                    f"state {tuple(prev.shape)}. After changing a parameter's shape, create a new optimizer."
                )
            params.append(p)
            grads.append(grad)
            prevs.append(prev)
            step_sizes.append(state["step_size"])
            state_steps.append(state["step"])
        if params and isinstance(self.retreats, int):  # the compiler keeps no attribute that is set later
            self.retreats = on_device(self.retreats, params[0].device)

    def _has_no_gradient(self) -> bool:
        return all(p.grad is None for group in self.param_groups for p in group["params"])

    def _rows_without_gradients(self, group: dict[str, Any]) -> Lists:
        """Return the tensors of a step after a closure that skips ``backward()`` if its loss is bad.

        If it turns out that the loss is not bad, gradients of NaN leave the parameters unchanged.
        """
        params = [p for p in group["params"] if "step_size" in self.state.get(p, ())]
        grads = [torch.full_like(p, complex(math.nan, math.nan) if p.is_complex() else math.nan) for p in params]
        states = [self.state[p] for p in params]
        return params, grads, [state["prev"] for state in states], [state["step_size"] for state in states]

    def _set_initial_step_sizes(self) -> None:
        """Set the step sizes of parameters that have state but have not moved yet to the current lr."""
        for group in self.param_groups:
            for p in self._unmoved.intersection(group["params"]):
                _set_step_size(self.state[p], group)


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
    retreat: bool | Tensor = False,
) -> None:
    r"""Make one step of Rprop with the given tensors; a drop-in replacement for ``torch.optim.rprop.rprop``.

    Call it under ``torch.no_grad()`` if parameters require grad, as with the functions of ``torch.optim``. Unlike
    ``Rprop``, it does not check its arguments.

    Args:
        params: The parameters, real or complex, of any shape and memory format; modified in place.
        grads: Their gradients, of the same shapes; read only.
        prevs: The previous gradients, zeros at first; modified in place.
        step_sizes: The step size of every weight, in the unit of the parameters; modified in place. A complex one holds
            the step sizes of the real and the imaginary part, which are treated as two weights.
        state_steps: One counter (a tensor of one element) for each parameter; modified in place.
        foreach: Whether to use the foreach implementation. ``None`` uses it on accelerators, for parameters that no
            fused kernel supports (default: ``None``).
        capturable: Ignored, because the operations are the same in a graph (default: ``False``).
        maximize: Whether to maximize instead of minimize (default: ``False``).
        differentiable: Whether autograd can differentiate through the step (default: ``False``).
        has_complex: Ignored, because complex tensors are recognized by their dtype (default: ``False``).
        fused: Whether to use a fused kernel. ``None`` uses it where supported unless ``foreach`` is given; ``True``
            requires it (default: ``None``).
        step_size_min: Lower bound of the step sizes.
        step_size_max: Upper bound of the step sizes.
        etaminus: Factor of a step size after a sign change.
        etaplus: Factor of a step size after two equal signs.
        weight_decay: Factor of the parameter that is added to its gradient (default: 0).
        variant: The rule: ``"irprop-"``, ``"irprop+"``, ``"rprop-"`` or ``"rprop+"`` (default: ``"irprop-"``).
        loss_rose: For ``"irprop+"``, whether the loss is worse than at the previous call: a bool, a bool tensor of one
            element, or one of shape ``(n,)`` with a value for each member of parameters of shape ``(n, ...)``
            (default: ``False``).
        retreat: Whether to take back the last move of every weight, shrink all step sizes and make no other move:
            likewise (default: ``False``).

    Raises:
        RuntimeError: If ``state_steps`` holds anything other than tensors, or if ``fused=True`` and no fused kernel
            supports one of the parameters.
    """
    if set(map(type, state_steps)) != {Tensor} and not all(isinstance(step, Tensor) for step in state_steps):
        raise RuntimeError("API has changed, `state_steps` argument must contain a list of singleton tensors")
    forget, take_back = AT_FLIP[variant]
    rose = loss_rose if take_back is None else take_back
    moves = _prepare(
        params,
        grads,
        prevs,
        step_sizes,
        state_steps,
        Rule(etaminus, etaplus, step_size_min, step_size_max, weight_decay, maximize, forget, rose, retreat),
        foreach=foreach,
        fused=fused,
        differentiable=differentiable,
        scratch={},
    )
    for move in moves:
        move()


def _prepare(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    state_steps: list[Tensor],
    rule: Rule,
    *,
    foreach: bool | None,
    fused: bool | None,
    differentiable: bool,
    scratch: Scratch,
) -> list[Callable[[], None]]:
    """Return functions that make a step. Everything that can fail, such as allocating memory, is done here."""
    if not params:
        return []
    if torch.compiler.is_compiling():
        moves = prepare_compiled(params, grads, prevs, step_sizes, rule, differentiable=differentiable)
    else:
        moves = prepare(
            params,
            grads,
            prevs,
            step_sizes,
            rule,
            foreach=foreach,
            fused=fused,
            scratch=scratch,
            differentiable=differentiable,
        )
    return [partial(_count, state_steps), *moves]


def _prepare_with_autograd(*args: Any, **kwargs: Any) -> list[Callable[[], None]]:
    """Prepare a step that autograd can differentiate through, whatever the current grad mode."""
    with torch.enable_grad():
        return [torch.enable_grad()(move) for move in _prepare(*args, **kwargs)]


def _count(steps: list[Tensor]) -> None:
    """Add 1 to the step counters."""
    if not steps:
        return
    first = steps[0]
    if type(first) is not Tensor or torch.compiler.is_compiling() or is_watched():
        torch._foreach_add_(steps, 1)
    elif is_transformed():  # torch.func has no rules for foreach operations
        for step in steps:
            step.add_(1)
    elif first.is_cpu and first.dtype in _ONE:
        # adding a Python number would convert it to a tensor for each counter, which takes seven times as long
        torch._foreach_add_(steps, _ONE[first.dtype], alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _makes_state(optimizer: Optimizer) -> bool:
    """Return whether this is the step by which torch.distributed.checkpoint creates state, see ``Rprop.step()``."""
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
    """Create the state of a parameter, with its device, memory format and sharding."""
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
    """Create a step counter, on the CPU unless it must be part of a graph, because elsewhere it costs a launch."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=param.device if capturable else "cpu")


def _name_in(group: dict[str, Any], param: Tensor) -> str:
    return next(name_of(group, i) for i, p in enumerate(group["params"]) if p is param)


# Pickles and config files name the class by its public path; doctest would then skip it without __test__.
Rprop.__module__ = "lightning_rprop"
__test__ = {"Rprop": Rprop}
