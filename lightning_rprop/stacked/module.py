"""Many independently initialized copies of a model as one module."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from lightning_rprop._torch import MODULE_CONTENTS, tree_leaves, tree_map
from lightning_rprop.optim._checks import check_count
from lightning_rprop.optim._sharding import fully_sharded, is_sharded, rows, whole
from lightning_rprop.stacked._architecture import stack
from lightning_rprop.stacked._vmap import evaluate

_RANDOMNESS = ("error", "different", "same")


class Stacked(nn.Module):
    """n independently initialized copies of a model, the members, which train side by side.

    Rprop treats every weight separately, so n members with one optimizer train as they would in n separate runs. One
    evaluation of small members takes much less time than n evaluations. Sum their losses before ``backward()``: each
    member then gets the gradient of its own loss. Pass the losses to ``Rprop.step()``, so that
    irprop+ and ``retreat`` judge each member by its own.

    Parameters and buffers have the names of those of ``make()``, and a first dimension of n. They may be DTensors that
    are all sharded along that dimension, which spreads the members over processes: each process evaluates its own
    members, and the outputs are gathered.

    Args:
        make: Builds one member: a function without arguments that returns a new module. It is called n times.
        n: Number of members.
        randomness: What random operations such as dropout do, as in ``torch.vmap()``: ``"error"``, ``"different"``
            (different random numbers in each member) or ``"same"``.
        chunk_size: How many members are evaluated at a time, as in ``torch.vmap()``; ``None`` evaluates all. A
            smaller number saves memory.

    Raises:
        TypeError: If an argument has the wrong type, or ``make`` returns anything but a module.
        ValueError: If ``n`` or ``chunk_size`` is below 1; if ``randomness`` is unknown; if ``make`` returns the same
            module twice, different architectures, or a module without parameters, with lazy ones, or with a list of
            them in an attribute (as recurrent layers have).

    Examples:
        >>> import torch
        >>> from lightning_rprop import Rprop
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> model = Stacked(lambda: torch.nn.Linear(1, 1), n=3)
        >>> optimizer = Rprop(model.parameters())
        >>> for _ in range(100):
        ...     losses = (model(x) - 2 * x).square().mean(dim=(1, 2))
        ...     optimizer.zero_grad()
        ...     losses.sum().backward()
        ...     optimizer.step(loss=losses)
        >>> model.member(losses.argmin())
        Linear(in_features=1, out_features=1, bias=True)
    """

    _base: nn.Module  # of a member's class, with its attributes; parameters and children are those of this module

    def __init__(
        self,
        make: Callable[[], nn.Module],
        n: int,
        randomness: str = "error",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(make) or isinstance(make, nn.Module):
            raise TypeError(
                f"make must be a function without arguments that returns a new module, got {type(make).__name__}. "
                "Use for example make=lambda: nn.Linear(2, 1)."
            )
        if randomness not in _RANDOMNESS:
            raise ValueError(f"randomness must be one of {', '.join(map(repr, _RANDOMNESS))}, got {randomness!r}.")
        self._n = check_count("n", n)
        self.randomness = randomness
        self.chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)
        base = stack(make, self._n)
        self.__dict__["_base"] = base  # not a submodule
        for name in MODULE_CONTENTS:
            self.__dict__[name] = base.__dict__[name]
        self.training = base.training

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Evaluate all members with the same inputs.

        Args:
            *inputs: Positional arguments of the members' ``forward``.
            **kwargs: Keyword arguments of the members' ``forward``.

        Returns:
            Their outputs, a tensor or a nested structure of tensors, each with a first dimension of n.

        Raises:
            RuntimeError: If ``torch.vmap()`` cannot run the module, or if the module writes to a buffer.
        """
        return self._evaluate(inputs, kwargs, each=False)

    def forward_each(self, *inputs: Any, **kwargs: Any) -> Any:
        """Evaluate each member with its own inputs.

        After ``torch.distributed.fsdp.fully_shard``, call ``register_fsdp_forward_method(stacked, "forward_each")``.

        Args:
            *inputs: Like those of ``forward()``, but every tensor has a first dimension of n.
            **kwargs: Likewise.

        Returns:
            As in ``forward()``.

        Raises:
            ValueError: If the first dimension of a tensor is not n.
            RuntimeError: As in ``forward()``.
        """
        for value in tree_leaves((inputs, kwargs)):
            if isinstance(value, Tensor) and (value.dim() == 0 or len(value) != self._n):
                raise ValueError(
                    f"forward_each got a tensor of shape {tuple(value.shape)}, but its first dimension must be the "
                    f"number of members, {self._n}. Use forward for inputs that all members share."
                )
        return self._evaluate(inputs, kwargs, each=True)

    def member(self, i: SupportsIndex) -> nn.Module:
        """Return a copy of one member as an ordinary module.

        Args:
            i: Its index: an integer, or a tensor of one element such as ``losses.argmin()``.

        Returns:
            A module like those of ``make()``, with copies of the member's parameters and buffers. DTensors are
            gathered, so every process must call it.

        Raises:
            IndexError: If there is no such member.
        """
        index = operator.index(i)
        if not -self._n <= index < self._n:
            raise IndexError(f"member {index} does not exist: there are {self._n} members, 0 to {self._n - 1}.")
        copies: dict[int, Any] = {}
        for param in self.parameters():
            copies[id(param)] = nn.Parameter(whole(param.detach())[index].clone(), param.requires_grad)
        for buffer in self.buffers():
            copies[id(buffer)] = whole(buffer.detach())[index].clone()
        self._base.training = self.training
        return copy.deepcopy(self._base, copies)

    def __len__(self) -> int:
        """Return the number of members."""
        return self._n

    def extra_repr(self) -> str:
        """Return the number and type of the members."""
        return f"n={self._n}, {type(self._base).__name__}"

    def _evaluate(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], each: bool) -> Any:
        self._base.training = self.training
        params: dict[str, Any] = dict(self.named_parameters())
        buffers = dict(self.named_buffers())
        shard = next(filter(is_sharded, params.values()), None)
        if shard is not None:
            _check_spread(self, params, (inputs, kwargs))
            params = {name: param.to_local() for name, param in params.items()}
            buffers = {name: rows(buffer, shard) for name, buffer in buffers.items()}
            if each:
                inputs, kwargs = tree_map(lambda x: rows(x, shard) if isinstance(x, Tensor) else x, (inputs, kwargs))
        outputs = evaluate(self._base, params, buffers, inputs, kwargs, each, self.randomness, self.chunk_size)
        return outputs if shard is None else tree_map(lambda x: _gathered(x, shard, self._n), outputs)


def _check_spread(stacked: Stacked, params: dict[str, Any], inputs: Any) -> None:
    """Check that all parameters are sharded along the dimension of the members, and that no input needs a gradient."""
    if any(each is not stacked for each in fully_sharded(stacked)):
        raise RuntimeError(
            "A child of a Stacked cannot be sharded separately. Call fully_shard() with the Stacked only."
        )
    first = next(iter(params.values()))
    for name, param in params.items():
        placements = getattr(param, "placements", ())
        is_spread = sum(placement.is_shard(0) for placement in placements) == 1
        is_spread = is_spread and all(placement.is_shard(0) or placement.is_replicate() for placement in placements)
        if not is_spread or (param.device_mesh, placements) != (first.device_mesh, first.placements):
            raise RuntimeError(
                f"The placements of {name!r} are {placements}, but all parameters of a Stacked must be sharded along "
                "their first dimension, in the same way. Distribute each of them with [Shard(0)]."
            )
    if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(inputs)):
        raise RuntimeError(
            "An input requires grad, but members on other processes would not add to its gradient. Compute derivatives "
            "inside the module with torch.func.grad or torch.func.jacrev."
        )


def _gathered(value: Any, shard: Any, n: int) -> Any:
    """Return the outputs of all members from those of this process's members."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((n, *value.shape[1:]))
    strides = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        value.contiguous(), shard.device_mesh, shard.placements, run_check=False, shape=shape, stride=strides
    )
    return spread.full_tensor()
