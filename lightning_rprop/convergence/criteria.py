"""When to stop: criteria on the loss, the gradient and the step sizes, for any loop and any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rprop.convergence._small import are_small
from lightning_rprop.optim._checks import check_count
from lightning_rprop.optim._loss import check_loss
from lightning_rprop.optim._members import check_members, check_same_members, is_frozen, is_per_member
from lightning_rprop.optim._sharding import is_on_host, whole, wide_dtype

# The criteria, as bits.
_CHANGE, _GRAD, _STEP = 1, 2, 4
_SHIFT = 3
# What the state holds, besides the options and the step.
_KEPT = ("before", "held", "which", "lost", "found", "end", "who")


class Convergence:
    """Decides after each optimizer step whether to stop, by the loss, the gradient and the step sizes of Rprop.

    The run has converged when, for ``patience`` steps in a row, at least one of these criteria holds:

    - The loss changed little: ``|f - f_before| <= tolerance_change * max(|f|, |f_before|)``.
    - The gradient is small: no absolute entry is larger than ``tolerance_grad``.
    - The step sizes of Rprop are small: none is larger than ``tolerance_step``.

    A NaN or infinite value never satisfies a criterion, and none holds while the loss is NaN or infinite. The first two
    are those of ``torch.optim.LBFGS``, except that LBFGS compares the absolute change of the loss, and has no
    patience.

    With losses of shape ``(n,)`` for the members of ``Stacked``, each member is judged by its own
    loss, gradients and step sizes, and has its own count of steps. A member that has converged counts as converged from
    then on. A member whose loss is NaN or infinite for ``patience`` steps in a row does not count.

    For parameters on the CPU the comparisons run on the host. Otherwise they run on the parameters' device, and an
    update copies one number to the host.

    Args:
        tolerance_change: Largest change of the loss, relative to the loss; ``None`` disables the criterion.
        tolerance_grad: Largest absolute gradient entry, in the unit of the loss per unit of the weights. The real and
            imaginary parts of a complex entry count separately. ``None`` disables the criterion.
        tolerance_step: Largest step size of Rprop, in the unit of the weights; ``None`` disables the criterion.
        patience: Number of steps in a row in which a criterion must hold, not always the same one.
        members: Which members must have converged if there is a loss for each: ``"all"``, or ``"best"``, the one with
            the lowest loss at this step (the highest if the parameter groups have ``maximize=True``).

    Raises:
        ValueError: If a tolerance is negative or not finite, if all are ``None``, if ``patience`` is below 1, or if
            ``members`` is unknown.
        TypeError: If a tolerance is not a number, or ``patience`` is not an integer.

    Examples:
        >>> import torch
        >>> from lightning_rprop import Convergence, Rprop
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Rprop([weight], lr=0.1)
        >>> convergence = Convergence(tolerance_change=None, tolerance_grad=1e-3)
        >>> for _ in range(1000):
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     if convergence.update(loss, optimizer):
        ...         break
        >>> convergence.reason
        'no gradient entry was larger than 0.001 for 10 steps in a row, up to step 49'
    """

    def __init__(
        self,
        tolerance_change: float | None = 1e-9,
        tolerance_grad: float | None = 1e-7,
        tolerance_step: float | None = None,
        patience: int = 10,
        members: Literal["all", "best"] = "all",
    ) -> None:
        self.tolerance_change = _tolerance("tolerance_change", tolerance_change)
        self.tolerance_grad = _tolerance("tolerance_grad", tolerance_grad)
        self.tolerance_step = _tolerance("tolerance_step", tolerance_step)
        if tolerance_change is None and tolerance_grad is None and tolerance_step is None:
            raise ValueError(
                "tolerance_change, tolerance_grad and tolerance_step are all None, so no run would ever converge. Set "
                "at least one, for example tolerance_change=1e-9."
            )
        self.patience = check_count("patience", patience)
        if members not in ("all", "best"):
            raise ValueError(f"members must be 'all' or 'best', got {members!r}.")
        self.members = members
        self._reset()

    def _reset(self) -> None:
        # numbers; after an update with parameters on an accelerator, tensors of one element; with members, of n
        self._before: float | Tensor = math.nan  # the loss of the last step
        self._held: int | Tensor = 0  # the number of steps in a row in which a criterion held
        self._which: int | Tensor = 0  # the criteria that held in these steps
        self._lost: int | Tensor = 0  # of members: the number of steps in a row without a finite loss
        self._found: int | Tensor = 0  # the criteria by which it has converged
        # never of n
        self._end: int | Tensor = 0  # the step of convergence and the criteria, as one number
        self._who: int | Tensor = 0  # the number of members that counted then, or the best one
        self._step = 0

    def update(self, loss: float | Tensor, params: Any) -> bool:
        """Record an optimizer step and return whether the run has converged.

        Call it once after each step, but not after a step that a GradScaler has skipped, which changes no loss.

        Args:
            loss: The loss whose gradient the step used, a real number or a tensor of one element; or the losses of n
                members, a tensor of shape ``(n,)``. Several processes must pass the same loss.
            params: The optimizer, its parameter groups, or parameters. Their gradients are read from ``grad``;
                parameters without one are left out. Values of DTensors, of FullyShardedDataParallel and of
                ZeroRedundancyOptimizer are compared over all processes, by an all-reduce of two numbers (for each
                member).

        Returns:
            Whether the run has converged; once true, it stays true.

        Raises:
            ValueError: If the loss is not one real number, nor one for each member; if the number of members has
                changed, or a parameter's first dimension is not that number; if there are no parameters; if
                ``tolerance_step`` is set and ``params`` is not an Rprop; or if the best member is unknown because only
                some groups have ``maximize=True``. Nothing is recorded then.
            TypeError: If ``params`` contains something other than parameters. Nothing is recorded then.
        """
        if self.tolerance_step is not None and not is_rprop(params):
            raise ValueError(
                f"tolerance_step={self.tolerance_step} needs the step sizes of Rprop, but params is "
                f"{type(params).__name__}. Pass the optimizer, lightning_rprop.Rprop or torch.optim.Rprop; or set "
                "tolerance_step=None."
            )
        self._observe(loss, params, self._step + 1)
        return bool(self._end)

    @property
    def reason(self) -> str | None:
        """The criteria that held, and the step of convergence, counted from 1; ``None`` before."""
        step, which = divmod(int(self._end), 1 << _SHIFT)
        if not step:
            return None
        texts = {
            _CHANGE: f"the loss changed by at most {self.tolerance_change} of itself",
            _GRAD: f"no gradient entry was larger than {self.tolerance_grad}",
            _STEP: f"no step size was larger than {self.tolerance_step}",
        }
        what = " or ".join(text for bit, text in texts.items() if which & bit)
        row, at = (f" for {self.patience} steps in a row", ", up to") if self.patience > 1 else ("", " at")
        return f"{what}{row}{self._where()}{at} step {step}"

    def _where(self) -> str:
        """Return the members that have converged, in words; nothing if there is one loss."""
        if not is_per_member(self._before):
            return ""
        n, who = len(self._before), int(self._who)
        if self.members == "best":
            return f" in the best member ({who})"
        return f" in all {n} members" if who == n else f" in {who} of {n} members (the others have no finite loss)"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists, so that a resumed run converges at the same step."""
        return {
            "options": [self.tolerance_change, self.tolerance_grad, self.tolerance_step, self.patience, self.members],
            "step": self._step,
            **{name: _plain(getattr(self, f"_{name}")) for name in _KEPT},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state. If it was saved with other options, the steps in a row count from 0 again.

        Args:
            state_dict: The result of ``state_dict()``.

        Raises:
            ValueError: If something is missing; nothing is changed.
        """
        own = self.state_dict()
        if absent := [key for key in own if key not in state_dict]:
            raise ValueError(f"The state has no {', '.join(absent)}. Load a state saved by Convergence.")
        is_same = [*state_dict["options"]] == own["options"]
        self._reset()
        self._step = state_dict["step"]
        for name in _KEPT if is_same else ("before",):
            value = state_dict[name]
            dtype = torch.float64 if name == "before" else torch.int64
            setattr(self, f"_{name}", torch.tensor(value, dtype=dtype) if isinstance(value, list) else value)

    def _observe(self, loss: float | Tensor, params: Any, step: int) -> None:
        """Record a step, without copying anything from an accelerator to the host."""
        now, which = self._compare(self._before, loss, params)
        held, earlier, lost, found = self._held, self._which, self._lost, self._found
        if is_per_member(now):
            held, earlier, lost, found = (torch.as_tensor(x, device=now.device) for x in (held, earlier, lost, found))
            lost = (lost + 1) * ~(now.abs() < math.inf)
        holds = which > 0
        held = (held + 1) * holds
        which = (earlier | which) * holds
        found = found + (found == 0) * (held >= self.patience) * which
        ended, who = self._decide(now, found, lost, params)
        is_first = (self._end == 0) * (ended > 0)
        self._end = self._end + is_first * ((step << _SHIFT) + ended)
        self._who = self._who + is_first * who
        self._held, self._which, self._lost, self._found = held, which, lost, found
        self._before, self._step = now, step

    def _compare(self, before: float | Tensor, loss: float | Tensor, params: Any) -> tuple[Any, Any]:
        """Return the loss, and the criteria that hold now; both are tensors if the parameters are on an accelerator.

        With members, both are tensors of shape ``(n,)`` on the parameters' device.
        """
        tensors = _tensors(params)
        now = _number(loss, tensors[0])
        if self._step:
            check_same_members(now, before)
        n = len(now) if is_per_member(now) else None
        if n is not None:
            check_members(now, [(f"parameter {i}", p) for i, p in enumerate(tensors) if not is_frozen(p)])
        last = before if type(before) is type(now) and n is None else _number(before, tensors[0])
        changed_little = False
        if self.tolerance_change is not None:
            change, most = abs(now - last), self.tolerance_change
            # < inf is false for NaN and infinite losses
            changed_little = (change < math.inf) & ((change <= most * abs(now)) | (change <= most * abs(last)))
        small_grad, small_step = are_small(tensors, params, self.tolerance_grad, self.tolerance_step, n)
        is_finite = abs(now) < math.inf
        return now, (_CHANGE * changed_little + _GRAD * small_grad + _STEP * small_step) * is_finite

    def _decide(self, now: Any, found: Any, lost: Any, params: Any) -> tuple[Any, Any]:
        """Return the criteria by which the run has converged, or 0, and the members that count.

        Args:
            now: The loss, or the losses of the members.
            found: The criteria by which it, or each of them, has converged.
            lost: The number of steps in a row in which the loss of a member was not finite.
            params: See ``update()``.

        Returns:
            The criteria of the members that count, if all these have converged. And their number, or the best one.
        """
        if not is_per_member(now):
            return found, 0
        is_finite = now.abs() < math.inf
        counts = is_finite | (lost < self.patience)
        who = counts.sum()
        if self.members == "best":
            who = torch.where(is_finite, -now if _maximizes(params) else now, math.inf).argmin()
            counts = is_finite & (torch.arange(len(now), device=now.device) == who)
        held = found * counts
        ended = sum(bit * ((held & bit) > 0).any() for bit in (_CHANGE, _GRAD, _STEP))
        ended = ended * ((held > 0) == counts).all()
        return (int(ended), int(who)) if is_on_host(now) else (ended, who)


def is_rprop(optimizer: Any) -> bool:
    """Return whether an optimizer is or wraps an Rprop, ours or torch's: no other one has this option."""
    return any("step_sizes" in group for group in getattr(optimizer, "param_groups", ()))


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or isinstance(value, bool):
        hint = " YAML reads a number such as 1e-9 as text; write 1.0e-9." if isinstance(value, str) else ""
        raise TypeError(f"{name} must be a number >= 0 or None, got {value!r} ({type(value).__name__}).{hint}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {number}. None disables the criterion.")
    return number


def _number(loss: Any, param: Tensor) -> Any:
    """Return the loss as a number, or as a tensor on the parameter's device if that is an accelerator.

    Losses of members are always a tensor there.
    """
    check_loss(loss)
    value = whole(loss.detach()) if isinstance(loss, Tensor) else loss
    if is_per_member(value):
        return value.to(param.device, wide_dtype(param.device))
    if is_on_host(param):
        return float(value)
    if isinstance(value, Tensor):
        return value.reshape(()).to(param.device, wide_dtype(param.device))
    return torch.full((), value, dtype=wide_dtype(param.device), device=param.device)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _maximizes(params: Any) -> bool:
    """Return whether parameter groups maximize the loss."""
    groups = getattr(params, "param_groups", params if isinstance(params, list | tuple) else ())
    directions = {bool(group.get("maximize")) for group in groups if isinstance(group, Mapping)}
    if len(directions) > 1:
        raise ValueError(
            "members='best' cannot tell which loss is the best, because only some parameter groups have maximize=True. "
            "Set it for all groups or for none."
        )
    return directions == {True}


def _tensors(params: Any) -> list[Tensor]:
    """Return the parameters of an optimizer, of parameter groups, or from an iterable of parameters."""
    if hasattr(params, "param_groups"):
        tensors = [p for group in params.param_groups for p in group["params"]]
    else:
        is_many = isinstance(params, Iterable) and not isinstance(params, Tensor)
        items = [*params] if is_many else [None]
        tensors = [p for each in items for p in (each["params"] if isinstance(each, Mapping) else [each])]
        if not all(isinstance(p, Tensor) for p in tensors):
            raise TypeError(
                f"params must be an optimizer, its param_groups, or an iterable of parameters, got {params!r}. Pass "
                "for example model.parameters()."
            )
    if not tensors:
        raise ValueError(
            "params contains no parameters. Pass the optimizer, or a new iterator such as model.parameters() to each "
            "update."
        )
    return tensors
