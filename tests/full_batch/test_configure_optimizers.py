"""Rprop returned by configure_optimizers: fit, checkpoint, resume, two processes."""

import pytest
import torch
from lit import Batches, Net, all_equal, fit_in_two_parts, trainer
from programs import HELPERS, run

from lightning_rprop import Rprop


def ours(module):
    return Rprop(module.parameters(), lr=0.1)


def torchs(module):
    return torch.optim.Rprop(module.parameters(), lr=0.1)


@pytest.mark.parametrize(("first", "second"), [(ours, ours), (torchs, ours), (ours, torchs)])
def test_resumed_run_equals_whole_run(first, second, tmp_path):
    whole, half, resumed = fit_in_two_parts(tmp_path, ours, first, second, batches=3)
    assert not all_equal(whole, half)
    assert all_equal(whole, resumed)


def test_automatic_and_manual_optimization_agree(tmp_path):
    modules = [Net(ours), Net(ours, manual=True), Net(torchs)]
    for module in modules:
        trainer(tmp_path).fit(module, Batches(5))
    assert all_equal(modules[0].parameters(), modules[1].parameters())
    assert all_equal(modules[0].parameters(), modules[2].parameters())


SCRIPT = """
import sys
import torch
from lit import Batches, Net, trainer
from lightning_rprop import Rprop, StepSizeMonitor

def make(module):
    return Rprop(module.parameters(), lr=0.1)

if __name__ == "__main__":
    processes, strategy, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    fit = trainer(folder, [StepSizeMonitor()], devices=processes, strategy=strategy, max_epochs=10)
    module = Net(make)
    fit.fit(module, Batches(5))
    torch.save(list(module.parameters()), f"{folder}/{strategy}-{fit.global_rank}.pt")
    print(fit.callback_metrics["step_size/mean"].item())
    if torch.distributed.is_initialized():  # else torch may abort the process at exit
        torch.distributed.destroy_process_group()
"""


def test_two_ddp_processes_equal_one(tmp_path):
    """The mean of two equal gradients is exact, so both ranks must agree bit for bit."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for processes, strategy in ((1, "auto"), (2, "ddp")):
        path = {"PYTHONPATH": str(HELPERS)}
        run(tmp_path, "script.py", processes, strategy, tmp_path, environment=path, timeout=180)
    single, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("auto-0", "ddp-0", "ddp-1"))
    assert all(all_equal(single, rank) for rank in ranks)
