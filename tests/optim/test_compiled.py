"""Steps under ``torch.compile`` are one graph and equal the eager steps bit for bit, with inductor too."""

import shutil

import pytest
import torch
from cases import TORCH_2_8, VARIANTS, assert_same, set_gradients, train

from lightning_rprop import Rprop

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.skipif(TORCH_2_8, reason="torch 2.8 cannot compile named tuple slices"),
]

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
    ),
]


def make(dtypes, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(9, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]
    return train(Rprop, params, 0, **options)


def assert_compiled_is_same(backend, dtypes, steps=8, losses=(0.0, 1.0, 2.0), **options):
    """With bfloat16 or float16, a move by an unrounded step size shows within a few steps."""
    torch._dynamo.reset()
    compiled, plain = make(dtypes, **options), make(dtypes, foreach=False, **options)
    step = torch.compile(lambda loss: compiled.optimizer.step(loss=loss), backend=backend, fullgraph=True)
    for i in range(steps):
        for one in (compiled, plain):
            set_gradients(one.params, i)
        loss = torch.tensor(losses[i % 3], dtype=torch.float64)
        step(loss)
        plain.optimizer.step(loss=loss)
    assert_same(compiled, plain)
    assert compiled.optimizer.retreats == plain.optimizer.retreats


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_are_bit_exact(backend):
    assert_compiled_is_same(
        backend, [torch.bfloat16, torch.float32, torch.float16, torch.float64], variant="irprop+", weight_decay=0.3
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_retreat_is_bit_exact(backend):
    assert_compiled_is_same(backend, [torch.bfloat16, torch.float32], losses=(1.0, 2.0, torch.nan))


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_are_bit_exact(backend):
    """Each of the nine weights of a parameter is a member with its own losses."""
    nan, inf = torch.nan, torch.inf
    losses = ([1.0, 2.0, nan, 4.0, 5.0, inf, -inf, 2.0, nan], [2.0] * 9, [3.0, 1.0, 1.0, nan, 9.0, 1.0, 1.0, 3.0, nan])
    assert_compiled_is_same(backend, [torch.bfloat16, torch.float32], losses=losses, variant="irprop+")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_bit_exact(variant):
    assert_compiled_is_same("aot_eager", [torch.bfloat16, torch.float32], variant=variant, maximize=True)
