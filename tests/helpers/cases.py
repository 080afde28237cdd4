"""Cases for the optimizer tests: valid and invalid arguments, parameters and gradients."""

from __future__ import annotations

import io
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_rprop.optim._rule import AT_FLIP

VARIANTS = tuple(AT_FLIP)
TORCH_2_8 = torch.__version__.startswith("2.8.")  # docs/compatibility.md says what does not work with it

# Arguments that torch.optim.Rprop accepts too, with equal trajectories.
SHARED = {
    "default": {},
    "lr": {"lr": 0.3},
    "lr-0": {"lr": 0},
    "lr-tensor": {"lr": torch.tensor(0.03)},
    "lr-tensor-1d": {"lr": torch.tensor([0.03])},
    "lr-above-max": {"lr": 3.0, "step_sizes": (1e-3, 0.5)},
    "lr-below-min": {"lr": 1e-4, "step_sizes": (1e-2, 0.5)},
    "etas": {"etas": (0.3, 1.7)},
    "etas-above-2": {"etas": (0.01, 7.3)},
    "bounds-tight": {"lr": 0.1, "step_sizes": (0.05, 0.15)},
    "bounds-equal": {"step_sizes": (0.25, 0.25)},
    "min-0": {"step_sizes": (0, 50)},
    "maximize": {"maximize": True},
}

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
    torch.complex32,
)

_Name = Enum("_Name", {"foo": "foo"}, type=str)

# Invalid keyword arguments, the exception, and a pattern that its message matches.
BAD = {
    "lr-negative": ({"lr": -1}, ValueError, "Invalid learning rate: -1.0. lr is .* for example lr=1e-2"),
    "lr-nan": ({"lr": math.nan}, ValueError, "Invalid learning rate: nan. lr"),
    "lr-inf": ({"lr": math.inf}, ValueError, "Invalid learning rate: inf. lr"),
    "lr-tensor-negative": ({"lr": torch.tensor(-0.5)}, ValueError, "Invalid learning rate: -0.5. lr"),
    "lr-tensor-2": ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element, got 2 elements"),
    "lr-text": ({"lr": "1e-2"}, TypeError, r"lr must be made of numbers, got '1e-2' \(str\). YAML .* write 1.0e-2"),
    "lr-complex": ({"lr": 1j}, TypeError, r"lr must be made of numbers, got 1j \(complex\)"),
    "lr-tensor-complex": (
        {"lr": torch.tensor(1j)},
        TypeError,
        r"Tensor lr must be a floating-point tensor, got .*1\.j",
    ),
    "lr-tensor-int": ({"lr": torch.tensor(1)}, TypeError, r"floating-point tensor, got tensor\(1\). Use for example"),
    "lr-tensor-bool": ({"lr": torch.tensor(True)}, TypeError, "Tensor lr must be a floating-point tensor, got tensor"),
    "lr-numpy-bool": ({"lr": np.bool_(True)}, TypeError, "lr must be made of numbers, got .*True"),
    "lr-huge": ({"lr": 10**400}, ValueError, "Invalid learning rate: inf. lr is .* a finite number >= 0"),
    "lr-none": ({"lr": None}, TypeError, r"lr must be made of numbers, got None \(NoneType\)"),
    "lr-bool": ({"lr": True}, TypeError, r"lr must be made of numbers, got True \(bool\)"),
    "etas-torch": (
        {"etas": (1.0, 0.5)},
        ValueError,
        r"Invalid eta values: 1.0, 0.5. etas must be \(etaminus, etaplus\)",
    ),
    "etas-swapped": ({"etas": [1.2, 0.5]}, ValueError, "Invalid eta values: 1.2, 0.5. .* for example etas="),
    "etas-one": ({"etas": [0.5]}, ValueError, "Invalid eta values: 0.5. etas must be"),
    "etas-three": ({"etas": (0.5, 1.2, 2)}, ValueError, "Invalid eta values: 0.5, 1.2, 2.0. etas must be"),
    "etas-inf": ({"etas": (0.5, math.inf)}, ValueError, "Invalid eta values: 0.5, inf"),
    "etas-nan": ({"etas": (math.nan, 1.2)}, ValueError, "Invalid eta values: nan, 1.2"),
    "etas-zero": ({"etas": (0.0, 1.2)}, ValueError, "Invalid eta values: 0.0, 1.2"),
    "etas-number": ({"etas": 0.5}, TypeError, r"etas must be a pair of numbers, got 0.5 \(float\)"),
    "etas-text": ({"etas": "0.5,1.2"}, TypeError, "etas must be a pair of numbers, got '0.5,1.2'"),
    "etas-texts": ({"etas": ("5e-1", 1.2)}, TypeError, "etas must be made of numbers, got '5e-1'"),
    "step_sizes-swapped": (
        {"step_sizes": [50, 1e-6]},
        ValueError,
        "Invalid step sizes: 50.0, 1e-06. step_sizes must be",
    ),
    "step_sizes-negative": ({"step_sizes": (-1, -0.5)}, ValueError, "Invalid step sizes: -1.0, -0.5. .* for example"),
    "step_sizes-inf": ({"step_sizes": (1e-6, math.inf)}, ValueError, "Invalid step sizes: 1e-06, inf"),
    "step_sizes-nan": ({"step_sizes": (math.nan, 50)}, ValueError, "Invalid step sizes: nan, 50.0"),
    "step_sizes-one": ({"step_sizes": [1.0]}, ValueError, "Invalid step sizes: 1.0. step_sizes must be"),
    "step_sizes-none": ({"step_sizes": None}, TypeError, "step_sizes must be a pair of numbers, got None"),
    "weight_decay-negative": (
        {"weight_decay": -0.1},
        ValueError,
        "Invalid weight_decay value: -0.1. weight_decay must",
    ),
    "weight_decay-text": ({"weight_decay": "0"}, TypeError, "weight_decay must be made of numbers, got '0'"),
    "weight_decay-huge": ({"weight_decay": 10**400}, ValueError, "Invalid weight_decay value: inf. weight_decay must"),
    "variant": ({"variant": "foo"}, ValueError, r"Invalid variant: 'foo'. .* irprop-, irprop\+, rprop-, rprop\+"),
    "variant-enum": ({"variant": _Name.foo}, ValueError, "Invalid variant: 'foo'"),
    "variant-none": ({"variant": None}, ValueError, "Invalid variant: None"),
    "max_iter-0": ({"max_iter": 0}, ValueError, "max_iter must be an integer >= 1, got 0"),
    "max_iter-float": ({"max_iter": 1.5}, TypeError, r"max_iter must be an integer >= 1, got 1.5 \(float\)"),
    "retreat-text": ({"retreat": "yes"}, TypeError, "retreat must be one of True, False, None, got 'yes'"),
    "maximize-text": ({"maximize": "false"}, TypeError, "maximize must be one of True, False, got 'false'"),
    "foreach-text": ({"foreach": "no"}, TypeError, "foreach must be one of True, False, None, got 'no'"),
    "capturable-none": ({"capturable": None}, TypeError, "capturable must be one of True, False, got None"),
    "fused-text": ({"fused": "yes"}, TypeError, "fused must be one of True, False, None, got 'yes'"),
    "fused-foreach": ({"fused": True, "foreach": True}, ValueError, "`fused` and `foreach` cannot be `True` together"),
    "fused-differentiable": (
        {"fused": True, "differentiable": True},
        ValueError,
        "`fused` does not support `differentiable`. Leave fused=None",
    ),
    "both": (
        {"foreach": True, "differentiable": True},
        ValueError,
        "foreach=True does not support differentiable=True",
    ),
}

# The implementations by the value of foreach that selects them. The default, None, selects a fused kernel.
PATHS = {"single": False, "foreach": True, "fused": None}
BY_PATH = pytest.mark.parametrize("foreach", PATHS.values(), ids=PATHS)

# Whether the fused kernel is Triton's, run by its interpreter as in test_triton.py, instead of Numba's.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Arguments that the dtype of a parameter cannot represent.
BAD_IN_DTYPE = {
    "etaminus-bfloat16": (
        {"etas": (0.9981, 1.2)},
        torch.bfloat16,
        r"Invalid eta values: 0.9981, 1.2. One of etas rounds",
    ),
    "etaminus-float16": ({"etas": (0.9998, 1.2)}, torch.float16, "rounds to 1 in torch.float16, the dtype of"),
    "etaminus-float32": ({"etas": (0.99999998, 1.2)}, torch.float32, "rounds to 1 in torch.float32, the dtype of"),
    "etaplus-bfloat16": (
        {"etas": (0.5, 1.0039)},
        torch.bfloat16,
        "choose etas further from 1, or parameters of a wider",
    ),
    "etas-complex32": ({"etas": (0.9998, 1.2)}, torch.complex32, "rounds to 1 in torch.complex32"),
    "max-float16": ({"step_sizes": (1e-6, 1e5)}, torch.float16, "finite in torch.float16, .* largest number is 65504"),
    "lr-float32": ({"lr": 1e300}, torch.float32, "lr, etas and step_sizes must be finite in torch.float32"),
    "lr-float16": ({"lr": 1e5}, torch.float16, "lr, etas and step_sizes must be finite in torch.float16"),
}
# Arguments just inside those limits.
GOOD_IN_DTYPE = {
    "etaminus-bfloat16": ({"etas": (0.998, 1.2)}, torch.bfloat16),
    "etaminus-float16": ({"etas": (0.9997, 1.2)}, torch.float16),
    "etaminus-float32": ({"etas": (0.9999999, 1.2)}, torch.float32),
    "etaplus-bfloat16": ({"etas": (0.5, 1.004)}, torch.bfloat16),
    "max-float16": ({"step_sizes": (1e-6, 6e4)}, torch.float16),
}

# Values of the types that config libraries pass, and the values that the groups must hold.
FROM_CONFIG = {
    "list": ({"etas": [0.4, 1.3]}, {"etas": (0.4, 1.3)}),
    "ListConfig": ({"etas": OmegaConf.create([0.4, 1.3])}, {"etas": (0.4, 1.3)}),
    "numpy": (
        {"lr": np.float32(0.5), "step_sizes": np.array([0.25, 4.0]), "max_iter": np.int64(1)},
        {"lr": 0.5, "step_sizes": (0.25, 4.0), "max_iter": 1},
    ),
    "int": ({"lr": 1, "step_sizes": (0, 50)}, {"lr": 1.0, "step_sizes": (0.0, 50.0)}),
    "enum": ({"variant": Enum("V", {"a": "irprop-"}, type=str).a}, {"variant": "irprop-"}),
}


def normal_sampler(dtype: torch.dtype, seed: int) -> Callable[..., torch.Tensor]:
    """Return a function that draws a normal tensor of the given shape."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)

    return normal


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Return parameters of many shapes and memory formats, including 0-dim and empty ones."""
    normal = normal_sampler(dtype, seed)
    leaves = OrderedDict(
        scalar=normal(),
        empty=normal(0, 3),
        vector=normal(7),
        matrix=normal(5, 3),
        transposed=normal(4, 6).T,
        sliced=normal(6, 8)[::2, 1::3],
        channels_last=normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        negative_zero=(normal(3) * 0).neg(),
    )
    return [leaf.detach().requires_grad_() for leaf in leaves.values()]


def dense_parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return parameters without gaps in their memory, which fused kernels support, in several memory formats."""
    normal = normal_sampler(dtype, seed=0)
    leaves = [
        normal(),
        normal(0, 3),
        normal(50),
        normal(5, 3),
        normal(16),
        normal(10, 7).T,
        normal(2, 3, 2, 3).contiguous(memory_format=torch.channels_last),
        normal(3, 1, 11),
        normal(0),
    ]
    return [leaf.detach().requires_grad_() for leaf in leaves]


def gradients(params: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Return gradients with exact zeros and frequent sign changes, large enough that products do not underflow."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: torch.Size) -> torch.Tensor:
        signs = torch.randint(-1, 2, shape, generator=generator)
        return signs * (0.05 + 2 * torch.rand(shape, generator=generator))

    return [
        (torch.complex(random(p.shape), random(p.shape)) if p.is_complex() else random(p.shape)).to(p.dtype)
        for p in map(torch.Tensor.detach, params)
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have equal values and, if real, equal signs of zeros.

    The signs of complex zeros are ignored: torch negates a complex 0 to 0 or -0, depending on the element's position.
    """
    if a.is_complex():
        return a.dtype == b.dtype and torch.equal(torch.view_as_real(a), torch.view_as_real(b))
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def assert_same(a: SimpleNamespace, b: SimpleNamespace) -> None:
    """Assert that two runs have the same parameters and optimizer state, bit for bit."""
    for i, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
        assert same_bits(p.detach(), q.detach()), f"parameter {i} differs"
        assert a.optimizer.state[p].keys() == b.optimizer.state[q].keys()
        for key, value in a.optimizer.state[p].items():
            assert same_bits(value, b.optimizer.state[q][key]), f"{key} of parameter {i} differs"


def set_gradients(params: list[torch.Tensor], seed: int) -> None:
    for p, grad in zip(params, gradients(params, seed), strict=True):
        p.grad = grad


def train(
    optimizer_class: type, params: list[torch.Tensor], steps: int, seed: int = 1, **kwargs: object
) -> SimpleNamespace:
    """Build an optimizer and take steps with random gradients."""
    optimizer = optimizer_class(params, **kwargs)
    return train_more(SimpleNamespace(optimizer=optimizer, params=params), steps, seed)


def train_more(run: SimpleNamespace, steps: int, seed: int) -> SimpleNamespace:
    """Take more steps with random gradients."""
    for step in range(steps):
        set_gradients(run.params, seed * 1000 + step)
        run.optimizer.step()
    return run


def take_dense_steps(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: int, seed: int, **kwargs: object
) -> None:
    """Take steps with random gradients in the memory format of the parameters."""
    for step in range(steps):
        for p, grad in zip(params, gradients(params, seed * 1000 + step), strict=True):
            p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step(**kwargs)


def through_file(state: object) -> object:
    """Return the state after a round trip through torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
