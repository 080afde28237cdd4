"""All private names of torch that this package uses, with the reason for each.

``tests/optim/test_torch_private.py`` names the releases that they hold for. Only the ``torch._foreach_*`` functions, on
which all of ``torch.optim`` is built, are called where they are needed; that test lists the files.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

_count_modes = torch._C._len_torch_dispatch_stack
_is_profiling = torch._C._autograd._profiler_enabled
record_event = torch._C._profiler._RecordFunctionFast  # takes a twentieth of the time of record_function()
_innermost_transformation = torch._C._functorch.peek_interpreter_stack
_KEYS = torch._C._TorchDispatchModeKey
_SIMULATING = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)  # FakeTensorMode, make_fx, functionalization
_SIMULATED = frozenset({"FakeTensor", "FunctionalTensor"})

# Nested inputs and outputs, for which torch has no public functions.
tree_leaves, tree_map = torch.utils._pytree.tree_leaves, torch.utils._pytree.tree_map

# The attribute that marks the parameters of FullyShardedDataParallel (version 1), which have the ordinary type.
FSDP_MARK = "_fsdp_flattened"

# The dicts of a module that hold its tensors and submodules. Two modules that share them stay equal.
MODULE_CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

# The extension module, through which the libraries that torch is linked to can be searched.
EXTENSION = torch._C.__file__

# Prefixes that torch.compile and FSDP insert into parameter names.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


def is_watched() -> bool:
    """Return whether a ``TorchDispatchMode`` is active, which would not see what a custom kernel does."""
    return _count_modes() > 0


def is_hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether hooks, a profiler or the compiler need torch's wrapper around the steps of an optimizer."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    every = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
    return torch.compiler.is_compiling() or _is_profiling() or any(own) or any(every)


def is_simulating() -> bool:
    """Return whether a mode is active that traces operations or only pretends to run them."""
    return is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _SIMULATING)


def is_simulated(tensor: Tensor) -> bool:
    """Return whether a tensor has no values or stands for another tensor."""
    return tensor.is_meta or type(tensor).__name__ in _SIMULATED


def is_transformed() -> bool:
    """Return whether the caller runs inside a transformation of ``torch.func``, such as ``vmap``."""
    return _innermost_transformation() is not None


def is_true(condition: Tensor, *, unknown: bool) -> bool:
    """Return a tensor's truth value, or ``unknown`` if it has no value: fake, meta or traced."""
    try:
        return bool(condition)
    except RuntimeError:  # torch has no public way to ask
        return unknown


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes so far, which autograd counts; 0 for inference tensors.

    There is no other way to find out that a tensor was written to without reading it.
    """
    return 0 if tensor.is_inference() else tensor._version


def plain_name(name: str) -> str:
    """Remove the prefixes of module wrappers from a parameter name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def buffer_dicts(module: nn.Module) -> list[dict[str, Tensor | None]]:
    """Return the dicts that hold the buffers of a module and its submodules, where an assigned buffer is replaced."""
    return [each._buffers for each in module.modules()]


def tensor_dicts(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Return the dicts that hold the parameters and the buffers of a module and its submodules, with their prefixes.

    Unlike with ``named_parameters()``, a parameter can be replaced, and tied ones are found in each place.
    """
    return [
        (name, each_dict) for name, each in module.named_modules() for each_dict in (each._parameters, each._buffers)
    ]


def has_gradient_hooks(param: Tensor) -> bool:
    """Return whether ``register_hook()`` or ``register_post_accumulate_grad_hook()`` was called."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def is_spectral_norm(module: nn.Module) -> bool:
    """Return whether a module is the parametrization ``spectral_norm``, or has the hook of its older version."""
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return type(module).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks


def has_own_iteration(loader: DataLoader[Any]) -> bool:
    """Return whether a DataLoader's class overrides how batches are made."""
    cls = type(loader)
    return cls.__iter__ is not DataLoader.__iter__ or cls._get_iterator is not DataLoader._get_iterator


def copy_with_sampler(loader: DataLoader[Any], name: str, sampler: Any) -> DataLoader[Any]:
    """Copy a DataLoader, with everything its class and its user added, and replace one of its samplers.

    Args:
        loader: The DataLoader.
        name: ``"sampler"`` or ``"batch_sampler"``.
        sampler: The new sampler.
    """
    result = copy.copy(loader)
    # bypasses DataLoader.__setattr__, which refuses to set a sampler twice; persistent workers have the old sampler
    vars(result).update({name: sampler, "_iterator": None})
    return result


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """Shut down persistent workers, which would otherwise live as long as the DataLoader."""
    workers = loader._iterator
    if workers is not None and hasattr(workers, "_shutdown_workers"):
        workers._shutdown_workers()
        loader._iterator = None


def abort_process_group() -> None:
    """Abort the default process group, which interrupts NCCL collectives that wait for a lost rank."""
    from torch.distributed import distributed_c10d

    distributed_c10d._abort_process_group()


def reset_process_group_count() -> None:
    """Start counting process groups from 0 again, as ``destroy_process_group`` does.

    After a failed ``init_process_group`` the next group would otherwise get another name here than on its other ranks,
    and wait for them forever (torch 2.13).
    """
    from torch.distributed import distributed_c10d

    distributed_c10d._world.group_count = 0
