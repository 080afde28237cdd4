"""The CUDA kernel without a GPU: run by Triton's interpreter, and compiled for a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import run

TESTS = Path(__file__).parent

# The tests of the fused path, except those that only repeat others: on longer trajectories, for complex parameters,
# which the kernel gets as real ones, for initial step sizes, which it does not set, or in two more dtypes.
SELECTION = (
    "fused and not function and not maximizing and not complex and not lr- "
    "and not ((tapes_match or bad_losses_match) and (torch.float32 or torch.float16))"
)
FILES = (
    "test_parity.py",
    "test_rules.py",
    "test_rule_mutants.py",
    "test_retreat.py",
    "test_step.py",
    "test_step_loss.py",
    "test_fused.py",
    "test_fused_steps.py",
    "test_members.py",
    "test_self_check.py",
    "test_checked_kernels.py",
)


def test_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *FILES],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 350


LAUNCHES = """
import torch
from lightning_rprop import Rprop
from lightning_rprop.optim import _triton

launches = []
kernel = _triton._kernel
class Counting:
    def __getitem__(self, grid):
        launches.append(grid)
        return kernel[grid]
_triton._kernel = Counting()
params = [torch.zeros(3, dtype=dtype, requires_grad=True) for dtype in [torch.float32, torch.float64] * 10]
grads = [[torch.ones_like(p) for p in params] for _ in range(2)]
optimizer = Rprop(params, fused=True)
for which in (0, 1, 0, 1, 0):
    for p, g in zip(params, grads[which]):
        p.grad = g
    launches.clear()
    tables = dict(_triton._tables)
    optimizer.step()
    print(len(launches), len(_triton._tables.keys() - tables.keys()))
"""


def test_each_dtype_needs_one_launch():
    *new, third, fourth, fifth = run(".", "-c", LAUNCHES, environment={"TRITON_INTERPRET": "1"}).splitlines()
    assert new == ["2 2"] * 2  # new gradients need new tables
    assert third == fourth == fifth == "2 0"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_member", [False, True])
def test_kernel_compiles_for_a_gpu(dtype, by_member):
    """The code has no fused multiply-add, which rounds differently, and loads and stores 16 bytes at a time."""
    import triton.language as tl
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_rprop.optim import _triton

    fixed = {
        "ROWS": 256,
        "BLOCK": _triton._BLOCK,
        "STORED": _triton._STORED[dtype],
        "NUMBER": tl.float64 if dtype == torch.float64 else tl.float32,
        "BY_MEMBER": by_member,
    }
    types = {"table": "*i64", "rows": "i32", "members": "i32", "take_back_at": "*i1", "retreat_at": "*i1"}
    types |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(_triton._kernel, types, constexprs=fixed, attrs={(0,): [["tt.divisibility", 16]]})
    kernel = compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": False})
    text = kernel.asm["ptx"]
    assert kernel.asm["cubin"]
    assert "fma." not in text
    # only whole blocks at aligned addresses
    per_thread = _triton._BLOCK // 256 * dtype.itemsize // 16
    wide = ".v2.b64" if dtype == torch.float64 else ".v4.b32"
    assert text.count(f"ld.global{wide}") == 4 * per_thread
    assert text.count(f"st.global{wide}") == 3 * per_thread
