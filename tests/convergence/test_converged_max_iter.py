"""While Converged is active, ``max_iter`` of Rprop ends where the inner loop of torch's LBFGS would."""

import math

import pytest
import torch
from fitting import DATA, fit
from lit import trainer
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression

from lightning_rprop import Converged, FullBatch, Rprop
from lightning_rprop.convergence import _small, criteria

MAX_ITER = 15


def loop(steps, change, grad, lr=0.01):
    """Train in a plain loop with the rule written out; return parameters, and the number of evaluations per step."""
    module = Regression(lambda params: Rprop(params, lr=lr))
    optimizer = module.configure_optimizers()
    x, y = DATA
    counts = []
    for _ in range(steps):
        before = math.nan
        for i in range(MAX_ITER):
            optimizer.zero_grad()
            loss = (module.net(x) - y).square().mean()
            loss.backward()
            loss = loss.item()
            changed_little = change is not None and abs(loss - before) <= change * max(abs(loss), abs(before))
            largest = max(p.grad.abs().max().item() for p in module.parameters())
            if i and (changed_little or (grad is not None and largest <= grad)):
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


def test_device_is_read_every_n_evaluations(monkeypatch, tmp_path):
    """And every n steps; the reason names the step at which the run has converged."""
    monkeypatch.setattr(_small, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(criteria, "is_on_host", lambda tensor: False)
    reads = []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: reads.append(self) or original(self))
    module, converged = Counting(lr=0.0, step_sizes=(0, 0.0)), Converged(1e-3, None, patience=3, every_n_steps=5)
    fitter = fit(tmp_path, module, None, steps=30, callbacks=[converged], full_batch=FullBatch())
    assert module.counts == [6] * 5  # nothing changes from the second evaluation on, the fifth comparison is read
    assert fitter.global_step == 5
    assert converged.reason.endswith("for 3 steps in a row, up to step 4")
    ours = [each for each in reads if each.dtype == torch.int64]
    assert len(ours) == 5 + 1
