"""Without a working compiler, steps use another implementation after one warning."""

import pytest
from numba_programs import STEP, run_code


def test_compilers_are_imported_lazily():
    program = """
import sys, torch
import lightning_rprop.optim
print([name for name in ("numba", "llvmlite", "triton", "lightning_rprop.optim._triton") if name in sys.modules])
"""
    assert run_code(program) == "[]"


WITHOUT_COMPILER = """
import sys, torch, warnings
from lightning_rprop import Rprop
sys.modules[MISSING] = sys.modules["llvmlite.binding"] = None
params = [torch.nn.Parameter(torch.zeros(10, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
for param in params:
    param.grad = torch.ones_like(param)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Rprop(params, fused=False).step()
    assert not caught
    for _ in range(2):
        Rprop(params).step()
    assert [-round(param[0].item(), 6) for param in params] == [0.03, 0.03]
    try:
        Rprop(params, fused=True)
    except RuntimeError as error:
        print(error)
print(len(caught), caught[0].message)
"""


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_missing_compiler_warns_once(missing, tmp_path):
    """Steps still work, and fused=True raises an error with the reason."""
    program = WITHOUT_COMPILER.replace("MISSING", repr(missing))
    error, warning = run_code(program, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert error.startswith("fused=True, but no fused kernel supports parameter 0: its compiler cannot be imported: ")
    assert missing in error
    assert warning.startswith("1 Rprop cannot use its faster fused kernel, because the compiler cannot be imported: ")
    assert missing in warning
    assert warning.endswith("or set fused=False to silence this warning.")


def test_failing_compiler_warns_once(tmp_path):
    program = """
import warnings
from lightning_rprop.optim import _machine_code
def fail(*_):
    raise OSError("no compiler today")
_machine_code.load = fail
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
""" + "\n".join("    " + line for line in STEP.strip().splitlines())
    program += """
    optimizer.step()
print(len(caught), caught[0].message)
"""
    first, second = run_code(program, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert first == "plain loaded"
    assert second == (
        "1 Rprop cannot use its fused kernel for torch.float32 on cpu: OSError('no compiler today'). It uses its plain "
        "loop unless fused=True. Report this to lightning_rprop, and set fused=False to silence this warning."
    )
