"""When to stop: criteria on the loss, the gradient and the step sizes, for any loop and any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lightning_rprop.convergence._small import are_small
from lightning_rprop.optim._loss import check_number
from lightning_rprop.optim._sharding import is_on_host, whole, wide_dtype

# The criteria, as bits.
_CHANGE, _GRAD, _STEP = 1, 2, 4
_SHIFT = 3


class Convergence:
    """Decides after each optimizer step whether to stop, by the loss, the gradient and the step sizes of Rprop.

    The run has converged when, for ``patience`` steps in a row, at least one of these criteria holds:

    - The loss changed little: ``|f - f_before| <= tolerance_change * max(|f|, |f_before|)``.
    - The gradient is small: no absolute entry is larger than ``tolerance_grad``.
    - The step sizes of Rprop are small: none is larger than ``tolerance_step``.

    A NaN or infinite value never satisfies a criterion, and none holds while the loss is NaN or infinite. The first two
    are those of :class:`torch.optim.LBFGS`, except that LBFGS compares the absolute change of the loss, and has no
    patience.

    For parameters on the CPU the comparisons run on the host. Otherwise they run on the parameters' device, and an
    update copies one number to the host.

    Args:
        tolerance_change: Largest change of the loss, relative to the loss; ``None`` disables the criterion.
        tolerance_grad: Largest absolute gradient entry, in the unit of the loss per unit of the weights. The real and
            imaginary parts of a complex entry count separately. ``None`` disables the criterion.
        tolerance_step: Largest step size of Rprop, in the unit of the weights; ``None`` disables the criterion.
        patience: Number of steps in a row in which a criterion must hold, not always the same one.

    Raises:
        ValueError: If a tolerance is negative or not finite, if all are ``None``, or if ``patience`` is below 1.
        TypeError: If a tolerance is not a number, or ``patience`` is not an integer.

    Example:
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
        self._reset()

    def _reset(self) -> None:
        # numbers; after an update with parameters on an accelerator, tensors of one element
        self._before: float | Tensor = math.nan  # the loss of the last step
        self._held: int | Tensor = 0  # the number of steps in a row in which a criterion held
        self._which: int | Tensor = 0  # the criteria that held in these steps
        self._end: int | Tensor = 0  # the step of convergence and the criteria, as one number
        self._step = 0

    def update(self, loss: float | Tensor, params: Any) -> bool:
        """Record an optimizer step and return whether the run has converged.

        Call it once after each step, but not after a step that a GradScaler has skipped, which changes no loss.

        Args:
            loss: The loss whose gradient the step used, a real number or a tensor of one element. Several processes
                must pass the same loss.
            params: The optimizer, its parameter groups, or parameters. Their gradients are read from ``grad``;
                parameters without one are left out. Values of DTensors, of FullyShardedDataParallel and of
                ZeroRedundancyOptimizer are compared over all processes, by an all-reduce of two numbers.

        Returns:
            Whether the run has converged; once true, it stays true.

        Raises:
            ValueError: If the loss is not one real number, if there are no parameters, or if ``tolerance_step`` is
                set and ``params`` is not an Rprop. Nothing is recorded then.
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
        when = f"for {self.patience} steps in a row, up to" if self.patience > 1 else "at"
        return f"{' or '.join(text for bit, text in texts.items() if which & bit)} {when} step {step}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers, so that a resumed run converges at the same step."""
        return {
            "options": [self.tolerance_change, self.tolerance_grad, self.tolerance_step, self.patience],
            "step": self._step,
            "before": float(self._before),
            "held": int(self._held),
            "which": int(self._which),
            "end": int(self._end),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state. If it was saved with other tolerances or patience, the steps in a row count from 0 again.

        Args:
            state_dict: The result of ``state_dict()``.

        Raises:
            ValueError: If something is missing; nothing is changed.
        """
        own = self.state_dict()
        if absent := [key for key in own if key not in state_dict]:
            raise ValueError(f"The state has no {', '.join(absent)}. Load a state saved by Convergence.")
        self._step, self._before = state_dict["step"], state_dict["before"]
        is_same = [*state_dict["options"]] == own["options"]
        self._held, self._which, self._end = (state_dict[key] if is_same else 0 for key in ("held", "which", "end"))

    def _observe(self, loss: float | Tensor, params: Any, step: int) -> None:
        """Record a step, without copying anything from an accelerator to the host."""
        now, which = self._compare(self._before, loss, params)
        holds = which > 0
        self._held = (self._held + 1) * holds
        self._which = (self._which | which) * holds
        is_first = (self._end == 0) * (self._held >= self.patience)
        self._end = self._end + is_first * ((step << _SHIFT) + self._which)
        self._before, self._step = now, step

    def _compare(self, before: float | Tensor, loss: float | Tensor, params: Any) -> tuple[Any, Any]:
        """Return the loss, and the criteria that hold now; both are tensors if the parameters are on an accelerator."""
        tensors = _tensors(params)
        now = _number(loss, tensors[0])
        last = before if type(before) is type(now) else _number(before, tensors[0])
        changed_little = False
        if self.tolerance_change is not None:
            change, most = abs(now - last), self.tolerance_change
            # < inf is false for NaN and infinite losses
            changed_little = (change < math.inf) & ((change <= most * abs(now)) | (change <= most * abs(last)))
        small_grad, small_step = are_small(tensors, params, self.tolerance_grad, self.tolerance_step)
        is_finite = abs(now) < math.inf
        return now, (_CHANGE * changed_little + _GRAD * small_grad + _STEP * small_step) * is_finite


def is_rprop(optimizer: Any) -> bool:
    """Return whether an optimizer is or wraps an Rprop, ours or torch's: no other one has this option."""
    return any("step_sizes" in group for group in getattr(optimizer, "param_groups", ()))


def check_count(name: str, value: Any) -> int:
    """Return a number of steps as an ``int``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer >= 1, got {value!r} ({type(value).__name__}).")
    if int(value) < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value}. Use {name}=1 for a single step.")
    return int(value)


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
    """Return the loss as a number, or as a tensor on the parameter's device if that is an accelerator."""
    check_number(loss)
    value = whole(loss.detach()) if isinstance(loss, Tensor) else loss
    if is_on_host(param):
        return float(value)
    if isinstance(value, Tensor):
        return value.reshape(()).to(param.device, wide_dtype(param.device))
    return torch.full((), value, dtype=wide_dtype(param.device), device=param.device)


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
