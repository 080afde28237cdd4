"""Programs that take a fused step in a process of their own."""

from __future__ import annotations

from programs import run

# Takes a step, then prints whether the fused kernel was used and whether it was compiled or loaded from the cache.
STEP = """
import sys, torch
from lightning_rprop import Rprop
from lightning_rprop.optim._dispatch import fused_for
param = torch.nn.Parameter(torch.zeros(10))
param.grad = torch.ones(10)
optimizer = Rprop([param])
optimizer.step()
assert param.tolist() == [-torch.tensor(0.01).item()] * 10
fused = not isinstance(fused_for(*[param.detach()] * 4), str)
print("fused" if fused else "plain", "compiled" if "numba" in sys.modules else "loaded")
"""


def run_code(code: str, **environment: str) -> str:
    """Run Python code in a subprocess and return its output."""
    return run(".", "-c", code, environment=environment, timeout=120).strip()
