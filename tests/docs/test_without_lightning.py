"""The package without Lightning, without any dependency but torch, or with a broken Lightning."""

import pytest
from programs import run

HIDE = """
import importlib.abc, sys


class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hide())
"""
LIGHTNING = 'HIDDEN = ("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")' + HIDE
ALL_BUT_TORCH = LIGHTNING.replace(")", ', "hydra", "omegaconf", "numba", "llvmlite")', 1)


@pytest.mark.parametrize("name", ["Converged", "FullBatch", "KeepBest", "StepSizeMonitor", "hydra_ddp"])
def test_missing_lightning_error_says_so(name, tmp_path):
    error = run(tmp_path, "-c", f"{LIGHTNING}\nfrom lightning_rprop import {name}", fails=True)
    assert error.splitlines()[-1] == (
        f"ModuleNotFoundError: lightning_rprop.{name} needs Lightning, which is not installed: pip install lightning. "
        "Rprop, BestWeights, Convergence, Stacked and the Hydra configs work without it."
    )


def test_plain_loops_work_without_lightning(tmp_path):
    code = """
import torch
from hydra.utils import instantiate
from lightning_rprop import BestWeights, Convergence, FullBatchConf, Rprop, RpropConf, StepSizeMonitorConf
from lightning_rprop.best import BestWeights as same
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
optimizer = instantiate(RpropConf(lr=0.25))([weight])
optimizer.step()
assert isinstance(optimizer, Rprop)
assert torch.equal(weight, torch.full((2,), 0.75))
best, convergence = BestWeights([weight]), Convergence(patience=1)
best.update(1.0)
assert convergence.update(1.0, optimizer) is False
assert convergence.update(1.0, optimizer) is True
assert same is BestWeights
"""
    run(tmp_path, "-c", LIGHTNING + code)


def test_plain_loops_need_only_torch(tmp_path):
    code = """
import torch
from lightning_rprop import BestWeights, Convergence, Rprop, Stacked
from lightning_rprop.optim import rprop
x = torch.linspace(-3, 3, 50).unsqueeze(1)
model = Stacked(lambda: torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)), n=3)
optimizer = Rprop(model.parameters(), variant="irprop+")
best, convergence = BestWeights(model), Convergence(patience=5)
for _ in range(50):
    optimizer.zero_grad()
    losses = (model(x) - x.sin()).square().mean(dim=(1, 2))
    losses.sum().backward()
    best.update(losses)
    convergence.update(losses, optimizer)
    optimizer.step(loss=losses)
best.restore()
assert (best.loss < 0.3).all(), best.loss
assert sys.modules.keys().isdisjoint(HIDDEN)
"""
    output = run(tmp_path, "-c", ALL_BUT_TORCH + code, streams="both")
    assert output.count("Numba") == 1, output  # the warning that steps are slower


def test_broken_lightning_error_is_not_hidden(tmp_path):
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("import missing_part\n")
    error = run(tmp_path, "-c", "from lightning_rprop import FullBatch", fails=True)
    assert error.splitlines()[-1] == "ModuleNotFoundError: No module named 'missing_part'"
