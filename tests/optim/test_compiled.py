"""Steps under ``torch.compile``: one graph, and the same bits as every other path, with inductor too."""

import shutil

import pytest
import torch
from cases import assert_same, gradients, run

from lightning_rprop import Rprop
from lightning_rprop.optim._rule import AT_FLIP

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

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
    return run(Rprop, params, 0, **options)


def assert_compiled_is_same(backend, dtypes, steps=8, **options):
    """A move by a step size that is not rounded before it shows within a few steps in a dtype of 8 or 11 bits."""
    torch._dynamo.reset()
    compiled, plain = make(dtypes, **options), make(dtypes, foreach=False, **options)
    step = torch.compile(lambda loss: compiled.optimizer.step(loss=loss), backend=backend, fullgraph=True)
    for i in range(steps):
        for one in (compiled, plain):
            for p, grad in zip(one.params, gradients(one.params, i), strict=True):
                p.grad = grad
        loss = torch.tensor(float(i % 3), dtype=torch.float64)
        step(loss)
        plain.optimizer.step(loss=loss)
    assert_same(compiled, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_dtypes_in_one_graph_are_bit_exact(backend):
    assert_compiled_is_same(
        backend, [torch.bfloat16, torch.float32, torch.float16, torch.float64], variant="irprop+", weight_decay=0.3
    )


@pytest.mark.parametrize("variant", AT_FLIP)
def test_every_variant_is_bit_exact(variant):
    assert_compiled_is_same("aot_eager", [torch.bfloat16, torch.float32], variant=variant, maximize=True)
