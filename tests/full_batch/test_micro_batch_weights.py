"""FullBatch weights each micro-batch by its samples or by a user's function, in losses and logs."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fitting import DATA, Losses, stay
from fitting import fit as fit_data
from lit import all_equal, trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, exact, make_data, relative_error

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

N = 24
X = make_data(N)[0].double()
LABELS = torch.arange(N) % 2
IGNORED = -100  # cross_entropy's ignore_index


class Classifier(Regression):
    """Trains with the cross-entropy, whose mean over no labels is NaN."""

    def __init__(self, make=Rprop, **log):
        torch.manual_seed(0)
        super().__init__(make, net=nn.Linear(5, 2).double(), **log)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.targets.append(y)
        loss = cross_entropy(self.net(x), y)
        if self.log_options:
            self.log("loss", loss, **self.log_options)
        return loss


def labelled(batch):
    return (batch[1] != IGNORED).sum()


def only(first, last):
    """Return the labels with those outside of [first, last) ignored."""
    labels = LABELS.clone()
    labels[:first] = IGNORED
    labels[last:] = IGNORED
    return labels


def fit(folder, labels, size, weight=labelled, steps=20, module=None, data=None, **options):
    module = module or Classifier()
    fitter = trainer(folder, [FullBatch(weight=weight, log_as="full")], max_steps=steps, max_epochs=-1, **options)
    fitter.fit(module, data or FullBatchLoader((X, labels), size, steps_per_epoch=5))
    return module, fitter.callback_metrics


@pytest.mark.parametrize("part", [(0, 16), (8, 24), (8, 16), (0, 3)])
@pytest.mark.parametrize("how", ["tensor", "int", "numpy"])
def test_zero_weights_are_left_out(part, how, tmp_path):
    kinds = {
        "tensor": labelled,
        "int": lambda batch: int(labelled(batch)),
        "numpy": lambda batch: np.int64(labelled(batch)),
    }
    whole, expected = fit(tmp_path, only(*part), None)
    module, metrics = fit(tmp_path, only(*part), 8, kinds[how])
    assert len(module.targets) == 20 * 3  # they run nevertheless
    assert metrics["full"].item() == pytest.approx(expected["full"].item(), rel=1e-6)
    assert all(p.isfinite().all() for g in module.gradients for p in g)
    for a, b in zip(module.gradients[0], whole.gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)  # float64 rounding; sums differ in order
    assert all_equal(module.parameters(), whole.parameters())


def test_sum_reduction_leaves_zero_weights_out(tmp_path):
    class Sums(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self.net(x), y) * labelled(batch)  # NaN * 0

    module = Sums()
    loader = FullBatchLoader((X, only(0, 16)), 8)
    trainer(tmp_path, [FullBatch("sum", weight=labelled)], max_epochs=3).fit(module, loader)
    whole, _ = fit(tmp_path, only(0, 16), None, steps=3)
    assert all_equal(module.parameters(), whole.parameters())


@pytest.mark.parametrize("size", [None, 8])
def test_weights_of_only_zero_are_an_error(size, tmp_path):
    module = Classifier()
    start = copy.deepcopy(list(module.parameters()))
    with pytest.raises(ValueError, match="weight returned 0 for every micro-batch: at least one must count"):
        fit(tmp_path, torch.full((N,), IGNORED), size, module=module)
    assert all_equal(module.parameters(), start)


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize(
    "value",
    [-1, -0.5, float("nan"), float("inf"), None, "3", "many", [1], 1j]
    + [torch.tensor(v) for v in (-1.0, float("nan"), float("inf"), -float("inf"), 1j)]
    + [torch.tensor([1.0, 2.0]), torch.tensor([])],
    ids=str,
)
def test_invalid_weight_is_an_error(value, size, tmp_path):
    module = Classifier()
    start = copy.deepcopy(list(module.parameters()))
    with pytest.raises(ValueError, match=r"weight must return (a finite number >= 0|one number) for each"):
        fit(tmp_path, LABELS, size, lambda batch: value, module=module)
    assert all_equal(module.parameters(), start)


@pytest.mark.parametrize("value", [True, 3, 2.5, torch.tensor(3), torch.tensor([[3.0]]), np.float32(2)], ids=str)
def test_any_constant_weight_cancels_out(value, tmp_path):
    module, _ = fit(tmp_path, LABELS, 8, lambda batch: value, steps=3)
    expected, _ = fit(tmp_path, LABELS, 8, None, steps=3)
    assert all_equal(module.parameters(), expected.parameters())


@pytest.mark.parametrize("log", [{"on_step": True, "on_epoch": True}, {"on_step": True}, {"on_epoch": True}])
def test_log_leaves_zero_weights_out(log, tmp_path):
    for part in ((0, 16), (8, 24)):
        module = Classifier(stay, **log)
        _, metrics = fit(tmp_path, only(*part), 8, module=module, steps=5)
        expected = cross_entropy(module.net(X[slice(*part)]), LABELS[slice(*part)]).item()
        for name, value in metrics.items():
            assert value.item() == pytest.approx(expected, rel=1e-6), name


def test_log_uses_the_weights(tmp_path):
    labels = only(0, 17)  # the last micro-batch has one label, the others have eight
    module = Classifier(stay, on_step=True, on_epoch=True)
    _, metrics = fit(tmp_path, labels, 8, module=module, steps=5)
    for name in ("loss_step", "loss_epoch"):
        assert metrics[name].item() == pytest.approx(metrics["full"].item(), rel=1e-6)


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


class Graphs:
    """Like a PyTorch Geometric batch, whose tensors are longer than its number of graphs."""

    def __init__(self, x, y):
        self.x, self.y, self.num_graphs = x, y, len(y)

    def to(self, device, **kwargs):
        return self


class OfObjects(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


@pytest.mark.parametrize("make", [Batch, Graphs])
@pytest.mark.parametrize("weight", [None, lambda batch: len(batch.y)])
def test_batch_objects_count_their_samples(make, weight, tmp_path):
    def collate(samples):
        x, y = zip(*samples, strict=True)
        return make(torch.stack(x), torch.stack(y))

    source = DataLoader(TensorDataset(X, LABELS), batch_size=16, collate_fn=collate)
    module = OfObjects(stay, on_step=True, on_epoch=True)
    _, metrics = fit(tmp_path, None, None, weight, module=module, data=FullBatchLoader(source), steps=2)
    expected = cross_entropy(module.net(X), LABELS).item()
    for name in ("full", "loss_step", "loss_epoch"):
        assert metrics[name].item() == pytest.approx(expected, rel=1e-6), name


class TimeFirst(Classifier):
    """Trains on sequences of three steps, time first, with one label per sequence."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x.mean(dim=0), y[0]), batch_idx)


def time_first(samples):
    x, y = zip(*samples, strict=True)
    return torch.stack(x).expand(3, -1, -1), torch.stack(y).expand(3, -1)


def test_time_axis_is_not_counted_as_samples(tmp_path):
    source = FullBatchLoader(DataLoader(TensorDataset(X, LABELS), batch_size=16, collate_fn=time_first))
    with pytest.raises(ValueError, match=r"cannot be counted.*DataLoader's batch_size.*weight=lambda batch"):
        fit(tmp_path, None, None, None, module=TimeFirst(), data=source)
    _, metrics = fit(tmp_path, None, None, lambda b: b[0].shape[1], module=TimeFirst(), data=source, steps=1)
    expected = cross_entropy(Classifier().net(X), LABELS).item()
    assert metrics["full"].item() == pytest.approx(expected, rel=1e-6)


def test_single_batch_needs_no_sample_count(tmp_path):
    class Uncountable(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    data = {"x": X, "y": LABELS, "edges": torch.zeros(2, 7)}
    module = Uncountable(on_epoch=True)
    _, metrics = fit(tmp_path, None, None, None, module=module, data=FullBatchLoader(data), steps=3)
    expected, _ = fit(tmp_path, LABELS, None, None, steps=3)
    assert all_equal(module.parameters(), expected.parameters())
    assert metrics["loss"].isfinite()


def test_masked_samples_are_weighted_exactly(tmp_path):
    mask = (torch.rand(103, generator=torch.Generator().manual_seed(3)) < 0.4).float().unsqueeze(1)

    class Masked(Regression):
        def training_step(self, batch, batch_idx):
            x, y, mask = batch
            return ((self.net(x) - y).square() * mask).sum() / mask.sum()

    chosen = mask.flatten() > 0
    loss, gradient = exact(Masked().net, [t[chosen] for t in DATA])
    for weight in (lambda batch: batch[2].sum(dim=0), lambda batch: int(batch[2].sum())):
        module, seen = Masked(), Losses()
        fit_data(tmp_path, module, 20, (*DATA, mask), callbacks=[seen], full_batch=FullBatch(weight=weight))
        assert relative_error(module.gradients[0], gradient) < 1e-6  # float32 rounding
        assert seen.losses[0] == pytest.approx(loss, rel=1e-6)


def test_overflowing_weight_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="weight must return a finite number"):
        fit_data(tmp_path, Regression(), full_batch=FullBatch(weight=lambda batch: 10**400))


def test_first_counted_micro_batch_calls_hook(tmp_path):
    losses = []

    class Seeing(Regression):
        def on_before_backward(self, loss):
            losses.append(loss.item())

    x, y = make_data(20)
    y = torch.where(torch.arange(20).unsqueeze(1) < 6, torch.nan, y)
    full_batch = FullBatch(weight=lambda batch: batch[1].isfinite().sum())
    fit_data(tmp_path, Seeing(), 7, (x, y), steps=1, full_batch=full_batch)
    assert len(losses) == 1
