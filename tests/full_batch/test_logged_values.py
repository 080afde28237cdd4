"""The values of self.log, log_as, torchmetrics and the progress bar are those of the whole set."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from fitting import DATA, Losses, fit, stay
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lit import all_equal, trainer
from torch import nn
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

X, Y = make_data(20)


def csv(folder):
    """Return Trainer options that log every step into ``log/metrics.csv``."""
    return {"logger": CSVLogger(folder, name="", version="log"), "log_every_n_steps": 1}


def rows(folder):
    return [line.split(",") for line in (folder / "log" / "metrics.csv").read_text().splitlines()]


@pytest.mark.parametrize("size", [None, 10])
def test_self_log_averages_over_all_samples(size, tmp_path):
    module, seen = Regression(on_step=True, on_epoch=True), Losses()
    log_as = FullBatch(log_as="full")
    fit(tmp_path, module, size, steps=6, callbacks=[seen], per_epoch=3, full_batch=log_as, **csv(tmp_path))
    names, *values = rows(tmp_path)
    table = [dict(zip(names, row, strict=True)) for row in values]
    for key in ("loss_step", "full"):
        assert [float(row[key]) for row in table if row[key]] == pytest.approx(seen.losses, rel=1e-6)
    epochs = [sum(seen.losses[i : i + 3]) / 3 for i in (0, 3)]
    assert [float(row["loss_epoch"]) for row in table if row["loss_epoch"]] == pytest.approx(epochs, rel=1e-6)
    assert [int(row["step"]) for row in table if row["full"]] == list(range(6))


@pytest.mark.parametrize("size", [None, 10])
def test_value_logged_at_some_steps_persists(size, tmp_path):
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                self.log("even", float(batch_idx))
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Logs(), size, steps=4, **csv(tmp_path))
    assert [row[1] for row in rows(tmp_path)[1:]] == ["0.0", "0.0", "2.0", "2.0"]


@pytest.mark.parametrize("reduce", ["min", "max", "sum"])
def test_other_reductions_see_all_micro_batc(reduce, tmp_path):
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            self.log("target", getattr(batch[1], reduce)(), reduce_fx=reduce, on_step=True)
            return super().training_step(batch, batch_idx)

    metrics = fit(tmp_path, Logs(), 10, steps=2).callback_metrics
    expected = getattr(DATA[1], reduce)().item()
    assert metrics["target"].item() == pytest.approx(expected, rel=1e-5)  # float32 rounding; sums differ in order


def test_log_in_another_hook_resets_nothing(tmp_path):
    class Logs(Regression):
        def on_before_zero_grad(self, optimizer):
            self.log("zeroed", 1.0)

    seen = Losses()
    module = Logs(on_step=False, on_epoch=True)
    metrics = fit(tmp_path, module, 10, steps=1, callbacks=[seen], per_epoch=1).callback_metrics
    assert metrics["loss"].item() == pytest.approx(seen.losses[0], rel=1e-6)


def test_progress_bar_shows_steps_and_loss(tmp_path, capsys):
    full_batch = FullBatch(log_as="full", prog_bar=True)
    fit(tmp_path, Regression(), 10, steps=4, full_batch=full_batch, enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "4/4" in shown
    assert re.search(r"full[:=] ?1\.", shown)


@pytest.mark.parametrize("log_as", [3, True, "", b"loss", ["loss"]])
def test_log_as_must_be_a_name(log_as):
    with pytest.raises(ValueError, match=re.escape(f"or None, got {log_as!r}")):
        FullBatch(log_as=log_as)


@pytest.mark.parametrize("name", ["prog_bar", "take_over"])
def test_switches_must_be_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        FullBatch(log_as="loss", **{name: "no"})


@pytest.mark.parametrize(
    "log", [{"on_step": True}, {"on_epoch": True, "on_step": False}, {"on_step": True, "on_epoch": True}]
)
@pytest.mark.parametrize("size", [None, 7])
def test_log_as_must_differ_from_module_logs(log, size, tmp_path):
    module = Regression(**log)
    start = copy.deepcopy(list(module.parameters()))
    with pytest.raises(MisconfigurationException, match=r"log_as='loss'\) logs .* by a name that the module logs too"):
        fit(tmp_path, module, size, full_batch=FullBatch(log_as="loss"))
    assert all_equal(module.parameters(), start)


def test_log_as_works_in_a_second_fit(tmp_path):
    fitter = fit(tmp_path, Regression(), steps=2, full_batch=FullBatch(log_as="loss"))
    fitter.fit_loop.epoch_loop.max_steps = 4
    fitter.fit(Regression(), FullBatchLoader((X, Y), 7))
    assert fitter.global_step == 4


def test_subclass_may_log(tmp_path):
    class Logging(FullBatch):
        def on_train_batch_end(self, trainer, module, outputs, *args):
            super().on_train_batch_end(trainer, module, outputs, *args)
            self.log("twice", 2 * outputs["loss"])

    fitter = fit(tmp_path, Regression(), steps=2, full_batch=Logging(log_as="loss"))
    assert fitter.callback_metrics["twice"] == 2 * fitter.callback_metrics["loss"]


LABELS = (X.sum(dim=1) > 0).long()


class Measured(pl.LightningModule):
    """Logs torchmetrics objects in several ways."""

    def __init__(self, log_in="training_step"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 2)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2, average="micro")
        self.auc = torchmetrics.classification.MulticlassAUROC(2)  # stores all predictions
        scores = {"f1": torchmetrics.classification.MulticlassF1Score(2)}
        scores["precision"] = torchmetrics.classification.MulticlassPrecision(2)  # shares the state of f1
        self.scores = torchmetrics.MetricCollection(scores)
        self.log_in, self.seen, self.truth = log_in, [], []

    def metrics(self):
        return {"accuracy": self.accuracy, "auc": self.auc, **self.scores}

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.net(x)
        probabilities = output.detach().softmax(dim=1)
        self.accuracy(probabilities, y)
        self.auc(probabilities, y)
        self.scores(probabilities, y)
        if self.log_in == "training_step":
            self.log_all()
        return nn.functional.cross_entropy(output, y)

    def log_all(self):
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("auc", self.auc, on_step=True, on_epoch=True)
        self.log_dict(self.scores, on_step=True, on_epoch=True)

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            probabilities = self.net(X).softmax(dim=1)
        fresh = {name: metric.clone() for name, metric in self.metrics().items()}
        for metric in fresh.values():
            metric.reset()
            metric.update(probabilities, LABELS)
        self.truth.append({name: metric.compute().item() for name, metric in fresh.items()})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.log_in == "on_train_batch_end":
            self.log_all()

    def configure_optimizers(self):
        return Rprop(self.parameters())


@pytest.mark.parametrize("log_in", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize("size", [None, 7])
def test_torchmetrics_see_all_micro_batches(size, log_in, tmp_path):
    module = Measured(log_in)
    seen = []

    class Show(pl.Callback):
        def on_before_zero_grad(self, trainer, *args):  # of the next step, when the values of the last are complete
            seen.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.endswith("_step")})

    fitter = trainer(tmp_path, [FullBatch(), Show()], max_epochs=1)
    fitter.fit(module, FullBatchLoader((X, LABELS), size, steps_per_epoch=4))
    assert len(seen) == 4
    for shown, truth in zip(seen[1:], module.truth[:3], strict=True):
        assert shown == {f"{name}_step": pytest.approx(value, rel=1e-6) for name, value in truth.items()}
    metrics = fitter.callback_metrics
    accuracies = [truth["accuracy"] for truth in module.truth]
    assert metrics["accuracy_epoch"].item() == pytest.approx(sum(accuracies) / 4, rel=1e-6)
    assert all(not metric._forward_hooks for metric in module.metrics().values())


def test_torchmetrics_leave_out_zero_weights(tmp_path):
    y = torch.where(torch.arange(20).unsqueeze(1) < 13, Y, torch.nan)

    class Measuring(Regression):
        def __init__(self):
            super().__init__(stay)
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.error(self.net(x), y)
            self.log("error", self.error, on_step=True, on_epoch=True)
            return (self.net(x) - y).square().nanmean()

    module = Measuring()
    weighted = FullBatch(weight=lambda batch: batch[1].isfinite().sum())
    metrics = fit(tmp_path, module, 7, (X, y), steps=2, per_epoch=1, full_batch=weighted).callback_metrics
    expected = (module.net(X[:13]) - Y[:13]).square().mean().item()
    assert metrics["error_epoch"].item() == pytest.approx(expected, rel=1e-6)
    assert metrics["error_step"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["loss_step", "loss_epoch", "late"])
def test_log_as_must_not_hide_another_name(name, tmp_path):
    class Late(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                self.log("late", 1.0)
            return super().training_step(batch, batch_idx)

    module = Late(on_step=True, on_epoch=True)
    with pytest.raises(MisconfigurationException, match="by a name that the module logs too"):
        fit(tmp_path, module, steps=4, full_batch=FullBatch(log_as=name))
