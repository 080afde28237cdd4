"""While Converged is active, ``max_iter`` of Rprop ends where the inner loop of torch's LBFGS would."""

import math

import pytest
import torch
from fitting import DATA, fit, stay
from lit import trainer
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression

from lightning_rprop import Converged, Rprop

MAX_ITER = 15


def loop(steps, change, grad, every=1):
    """Train in a plain loop with the rule written out.

    Args:
        steps: Number of steps.
        change: ``tolerance_change``.
        grad: ``tolerance_grad``.
        every: The step ends only after this number of comparisons, or a multiple.

    Returns:
        The parameters, and the number of evaluations of each step.
    """
    module = Regression(lambda params: Rprop(params, lr=0.01))
    optimizer = module.configure_optimizers()
    x, y = DATA
    counts = []
    for _ in range(steps):
        before, is_done = math.nan, False
        for i in range(MAX_ITER):
            optimizer.zero_grad()
            loss = (module.net(x) - y).square().mean()
            loss.backward()
            loss = loss.item()
            changed_little = change is not None and abs(loss - before) <= change * max(abs(loss), abs(before))
            largest = max(p.grad.abs().max().item() for p in module.parameters())
            is_done |= i > 0 and (changed_little or (grad is not None and largest <= grad))
            if is_done and i % every == 0:
                break
            optimizer.step()
            before = loss
        counts.append(i + 1)
    return list(module.parameters()), counts


class Counting(Regression):
    """Counts the evaluations of each step."""

    def __init__(self, **options):
        super().__init__(lambda params: Rprop(params, **{"lr": 0.01, "max_iter": MAX_ITER, **options}))
        self.counts = []

    def on_train_batch_start(self, batch, batch_idx):
        self.counts.append(0)

    def training_step(self, batch, batch_idx):
        self.counts[-1] += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("full_batch", [True, False], ids=["FullBatch", "one batch"])
@pytest.mark.parametrize(("change", "grad"), [(2e-3, None), (None, 0.04), (2e-3, 0.04)])
def test_max_iter_ends_where_lbfgs_would(change, grad, full_batch, tmp_path):
    params, counts = loop(12, change, grad)
    assert len({*counts}) > 3  # different steps end at different evaluations
    assert MAX_ITER in counts
    module, converged = Counting(), Converged(change, grad, patience=20)
    if full_batch:
        fit(tmp_path, module, None, steps=12, callbacks=[converged])
    else:
        loader = DataLoader(TensorDataset(*DATA), batch_size=103)
        trainer(tmp_path, [converged], max_steps=12, max_epochs=-1).fit(module, loader)
    assert module.counts == counts
    assert all(map(torch.equal, module.parameters(), params))


def test_step_criterion_leaves_max_iter_alone(tmp_path):
    module = Counting(step_sizes=(1e-3, 1e-3))
    fit(tmp_path, module, None, steps=3, callbacks=[Converged(None, None, tolerance_step=0.1, patience=2)])
    assert module.counts == [MAX_ITER] * 2


def test_device_is_read_every_n_evaluations(on_device, tmp_path):
    """A comparison in between counts too."""
    params, counts = loop(12, 2e-3, 0.04, every=3)
    assert {4, 10, MAX_ITER} <= {*counts}
    assert counts != loop(12, 2e-3, 0.04)[1]
    module = Counting()
    fit(tmp_path, module, None, steps=12, callbacks=[Converged(2e-3, 0.04, patience=20, every_n_steps=3)])
    assert module.counts == counts
    assert all(map(torch.equal, module.parameters(), params))


def test_device_is_read_every_n_steps(on_device, monkeypatch, tmp_path):
    """The reason names the step of convergence."""
    reads = []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: reads.append(self.dtype) or original(self))
    module, converged = Regression(stay), Converged(1e-3, None, patience=3, every_n_steps=5)
    fitter = fit(tmp_path, module, None, steps=30, callbacks=[converged])
    assert fitter.global_step == 5
    assert converged.reason.endswith("for 3 steps in a row, up to step 4")
    assert reads.count(torch.int64) == 1
