"""StepSizeMonitor: the numbers, when they are logged, and where they arrive."""

import csv
import json
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lit import Batches, Net, Recorder, ValidatedNet, trainer
from monitor_truth import DEFAULT, Truth
from programs import HELPERS, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor
from lightning_rprop.monitor import _record as record
from lightning_rprop.monitor._history import LIMIT
from lightning_rprop.monitor._warnings import TOPICS

NAMES = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")
BOUNDS = (0.03, 0.2)  # which the step sizes of these small runs reach

# the rounding of float64 sums, which have another order here; of float32, as callback_metrics and TensorBoard are
CLOSE = {"rel": 1e-12, "abs": 1e-15}
FLOAT32 = {"rel": 1e-6, "abs": 1e-7}


def ours(module):
    return Rprop(module.parameters(), lr=0.1, step_sizes=BOUNDS, weight_decay=0.01)


def torchs(module):
    return torch.optim.Rprop(module.parameters(), lr=0.1, step_sizes=BOUNDS)


def monitor(**options):
    """A monitor that gives no advice, which has tests of its own."""
    return StepSizeMonitor(silence=TOPICS, **options)


def published(fit):
    return {name: value.item() for name, value in fit.callback_metrics.items() if name.startswith("step_size")}


@pytest.mark.parametrize("make", [ours, torchs], ids=["ours", "torch"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_every_record_is_right(make, manual, tmp_path):
    """Names, values and steps, in their order: over all parameters, of the group and of each."""
    log, truth = Recorder(), Truth()
    names = (*DEFAULT, "median", "q10", "q97.5", "std_log10")
    callback = monitor(statistics=names, per_parameter=True, per_group=True)
    fit = trainer(tmp_path, [truth, callback], logger=log, log_every_n_steps=2)
    fit.fit(Net(make, manual), Batches(5))
    assert [step for step, _ in log.records()] == [1, 3, 5, 7, 9, 11, 13]
    for step, metrics in log.records():
        right = truth.expected(step, names, BOUNDS, NAMES, {"group0": NAMES})
        assert list(metrics) == list(right)
        logarithms = {key for key in right if key.endswith("std_log10")}
        exact = {key: value for key, value in right.items() if key not in logarithms}
        assert {key: metrics[key] for key in exact} == pytest.approx(exact, **CLOSE)
        # logarithms are taken in float32
        assert {key: metrics[key] for key in logarithms} == pytest.approx({k: right[k] for k in logarithms}, **FLOAT32)
    assert len({metrics["step_size/sign_changed"] for _, metrics in log.records()}) > 2  # there is something to see
    assert published(fit) == pytest.approx(truth.expected(14, names, BOUNDS, (), {"group0": NAMES}), **FLOAT32)


def test_by_default_the_totals_alone(tmp_path):
    log, truth = Recorder(), Truth()
    fit = trainer(tmp_path, [monitor(), truth], logger=log, log_every_n_steps=1, max_epochs=1)
    fit.fit(Net(ours), Batches(2))
    assert [list(metrics) for _, metrics in log.records()] == [[f"step_size/{name}" for name in DEFAULT]] * 2
    assert log.records()[1][1] == pytest.approx(truth.expected(1, bounds=BOUNDS), **CLOSE)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (True, NAMES),
        ("net.0.*", NAMES[:2]),
        (["*.bias", "net.2.weight"], NAMES[1:]),
        (False, ()),
        ([], ()),
    ],
    ids=str,
)
def test_parameters_are_chosen_by_their_names(chosen, names, tmp_path):
    log = Recorder()
    callback = monitor(per_parameter=chosen, statistics=["max", "min"])
    trainer(tmp_path, [callback], logger=log, log_every_n_steps=1, max_epochs=1).fit(Net(ours), Batches(1))
    scopes = ["", *(f"{name}/" for name in names)]
    ((_, metrics),) = log.records()
    assert list(metrics) == [f"step_size/{scope}{name}" for scope in scopes for name in ("max", "min")]
    # parameters go to the loggers alone: self.log of so many values would cost more than the step
    assert not [key for key in log.calls[0][1] if "loss" in key]


def test_parameters_are_not_published(tmp_path):
    fit = trainer(tmp_path, [monitor(per_parameter=True, per_group=True, statistics=["max"])], max_epochs=1)
    fit.fit(Net(ours), Batches(1))
    assert set(published(fit)) == {"step_size/max", "step_size/group0/max"}


def test_a_pattern_that_fits_nothing_is_an_error(tmp_path):
    fit = trainer(tmp_path, [monitor(per_parameter=["net.0.*", "net.1.*"])])
    with pytest.raises(MisconfigurationException, match=r"per_parameter: 'net.1.\*' fits none .*: net.0.weight, net.0"):
        fit.fit(Net(ours), Batches(1))
    assert fit.global_step == 0


def test_a_record_is_one_call_at_lightnings_step_and_accumulation_is_no_step(tmp_path):
    log, truth = Recorder(), Truth()
    fit = trainer(tmp_path, [truth, monitor()], logger=log, log_every_n_steps=1, accumulate_grad_batches=3)
    fit.fit(Net(ours), Batches(7))
    steps = [step for step, _ in log.records()]
    assert steps == list(range(9))  # 3 steps an epoch: after 3, 6 and, at its end, 7 batches
    assert steps == [step for step, metrics in log.calls if "loss" in metrics]
    for step, metrics in log.records():
        assert metrics == pytest.approx(truth.expected(step, bounds=BOUNDS), **CLOSE)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 4}, [3, 7, 11]),
        ({"logging_interval": "step"}, [4, 9, 14]),
        ({"logging_interval": "epoch"}, [4, 9, 14]),
        ({"logging_interval": "epoch", "statistics": ["sign_changed"]}, [4, 9, 14]),
    ],
    ids=str,
)
def test_intervals(options, steps, tmp_path):
    log, truth = Recorder(), Truth()
    fit = trainer(tmp_path, [truth, monitor(**options)], logger=log, log_every_n_steps=5)
    fit.fit(Net(ours), Batches(5))
    assert [step for step, _ in log.records()] == steps
    for step, metrics in log.records():
        right = truth.expected(step, options.get("statistics", DEFAULT), BOUNDS)
        assert metrics == pytest.approx(right, **CLOSE)


@pytest.mark.parametrize("log_every_n_steps", [0, 7])
def test_nothing_is_computed_at_other_steps(log_every_n_steps, tmp_path, monkeypatch):
    """Nor is anything written; only the last step of a run is measured, for callback_metrics."""
    seen = []

    def spy(name):
        original = getattr(record, name)

        def call(*args, **kwargs):
            seen.append((name, fit.global_step))
            return original(*args, **kwargs)

        return call

    for name in ("look", "measure"):
        monkeypatch.setattr(f"lightning_rprop.monitor.callback.{name}", spy(name))
    log = Recorder()
    fit = trainer(tmp_path, [monitor()], logger=log, log_every_n_steps=log_every_n_steps, max_epochs=2)
    fit.fit(Net(ours), Batches(5))
    records = [("look", 6), ("measure", 7)] if log_every_n_steps else []
    assert seen == [*records, ("look", 9), ("measure", 10)]
    assert [step for step, _ in log.records()] == ([6] if log_every_n_steps else [])


def test_csv_and_tensorboard_files(tmp_path):
    truth = Truth()
    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(tmp_path, "tb", "0")]
    callback = monitor(per_parameter=True)
    trainer(tmp_path, [callback, truth], logger=loggers, log_every_n_steps=3).fit(Net(ours), Batches(3))

    with (tmp_path / "csv" / "0" / "metrics.csv").open() as file:
        rows = {int(r["step"]): r for r in csv.DictReader(file) if r["step_size/mean"]}
    assert list(rows) == [2, 5, 8]
    events = EventAccumulator(str(tmp_path / "tb" / "0")).Reload()
    right = {step: truth.expected(step, bounds=BOUNDS, parameters=NAMES) for step in rows}
    assert len(right[8]) == 50
    for name in right[8]:
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [2, 5, 8]
        for scalar in scalars:
            assert float(rows[scalar.step][name]) == pytest.approx(right[scalar.step][name], **CLOSE)
            assert scalar.value == pytest.approx(right[scalar.step][name], **FLOAT32)


def test_histograms_in_tensorboard(tmp_path):
    truth = Truth()
    logger = TensorBoardLogger(tmp_path, "tb", "0")
    callback = monitor(histogram=True, per_parameter="net.0.weight")
    trainer(tmp_path, [callback, truth], logger=logger, log_every_n_steps=3).fit(Net(ours), Batches(3))
    events = EventAccumulator(str(tmp_path / "tb" / "0"), size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {"step_size/log10", "step_size/net.0.weight/log10"}
    for name, members in (("step_size/log10", NAMES), ("step_size/net.0.weight/log10", NAMES[:1])):
        found = events.Histograms(name)
        assert [h.step for h in found] == [2, 5, 8]
        for h in found:
            sizes = torch.cat([truth.after[h.step][m].flatten() for m in members]).double().log10()
            value = h.histogram_value
            assert value.num == len(sizes) == sum(value.bucket)
            assert value.min <= sizes.min() + 1e-6
            assert value.max >= sizes.max() - 1e-6
            for limit in value.bucket_limit:  # as many below each limit; not where float32 rounds one to the other side
                if (sizes - limit).abs().min() > 1e-6:
                    below = sum(n for n, end in zip(value.bucket, value.bucket_limit, strict=True) if end <= limit)
                    assert below == (sizes < limit).sum()
            width = value.bucket_limit[-1] - value.bucket_limit[-2]
            assert value.sum == pytest.approx(sizes.sum().item(), abs=width * len(sizes) / 2)


SERVICES = """
import json, sys
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lit import Batches, Net, Recorder, trainer
from lightning_rprop import Rprop, StepSizeMonitor

folder = sys.argv[1]
wandb = WandbLogger(save_dir=folder, offline=True, project="p")
mlflow = MLFlowLogger("e", tracking_uri=f"file:{folder}/mlflow")
log = Recorder()
monitor = StepSizeMonitor(per_parameter=True, histogram=True, every_n_steps=2)
fit = trainer(folder, [monitor], logger=[wandb, mlflow, log], max_epochs=1)
calls = []
original = wandb.experiment.log
wandb.experiment.log = lambda *args, **kwargs: calls.append((args, kwargs)) or original(*args, **kwargs)
fit.fit(Net(lambda module: Rprop(module.parameters())), Batches(5))
summary = dict(wandb.experiment.summary)
histogram = summary["step_size/net.0.weight/log10"]
mlflows = {
    key: [(point.step, point.value) for point in mlflow.experiment.get_metric_history(mlflow.run_id, key)]
    for key in log.records()[0][1]
}
wandb.experiment.finish()
print(json.dumps({
    "records": log.records(),
    "wandb": {key: value for key, value in summary.items() if isinstance(value, (int, float))},
    "calls": [len(args[0]) for args, _ in calls if "step_size/mean" in args[0]],
    "histogram": [sum(histogram["values"]), len(histogram["bins"])],
    "mlflow": mlflows,
}))
"""


def test_weights_and_biases_and_mlflow_offline(tmp_path):
    """The real ones, which write to files: one call a record, at its step; histograms where there are such."""
    environment = {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_SILENT": "true", "PYTHONPATH": str(HELPERS)}
    output = run(tmp_path, "-c", SERVICES, tmp_path, environment=environment, timeout=120)
    seen = json.loads(output.splitlines()[-1])
    records = dict(seen["records"])
    assert list(records) == [1, 3]
    assert len(records[1]) == 50
    for key, value in records[3].items():
        assert seen["wandb"][key] == value
        assert seen["mlflow"][key] == [[1, records[1][key]], [3, value]]
    assert seen["wandb"]["trainer/global_step"] == 3
    assert seen["calls"] == [50 + 5 + 1] * 2  # the metrics, the histograms of all and of each parameter, and the step
    assert seen["histogram"] == [12, 61]


def test_progress_bar_shows_what_was_chosen(tmp_path):
    seen = []

    class Bar(pl.callbacks.ProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({k: v for k, v in self.get_metrics(trainer, pl_module).items() if k.startswith("step")})

    truth = Truth()
    callback = monitor(prog_bar=["median"], statistics=["max", "median"], every_n_steps=2)
    fit = trainer(tmp_path, [truth, callback, Bar()], max_epochs=1, enable_progress_bar=True)
    fit.fit(Net(ours), Batches(4))
    medians = {step: truth.expected(step, ["median"], BOUNDS) for step in (1, 3)}
    assert seen[0] == {}
    assert seen[1] == seen[2] == pytest.approx(medians[1], **CLOSE)
    assert seen[3] == pytest.approx(medians[3], **CLOSE)


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
@pytest.mark.parametrize("validate", [False, True])
def test_early_stopping_sees_fresh_values(log_every_n_steps, validate, tmp_path):
    """With one step an epoch and no record due, and wherever EarlyStopping stands among the callbacks."""
    truth = Truth()
    stop = EarlyStopping("step_size/max", mode="max", stopping_threshold=0.2)
    make = lambda module: Rprop(module.parameters(), lr=0.1)  # noqa: E731
    fit = trainer(tmp_path, [stop, truth, monitor()], max_epochs=50, log_every_n_steps=log_every_n_steps)
    fit.fit(*([ValidatedNet(make), Batches(1), Batches(1)] if validate else [Net(make), Batches(1)]))
    largest = [max(s.max().item() for s in sizes.values()) for sizes in truth.after.values()]
    assert len(largest) == fit.current_epoch < 50
    assert largest[-1] > 0.2
    assert all(value <= 0.2 for value in largest[:-1])


def test_checkpoints_see_fresh_values(tmp_path):
    """Also those that look in the middle of an epoch, between two records."""
    truth = Truth()
    save = ModelCheckpoint(tmp_path, "{step}", "step_size/mean", save_top_k=-1, every_n_train_steps=2)
    trainer(tmp_path, [truth, monitor(), save], max_epochs=1, enable_checkpointing=True).fit(Net(ours), Batches(6))
    means = [truth.expected(step, ["mean"], BOUNDS)["step_size/mean"] for step in (1, 3, 5)]
    assert [v.item() for v in save.best_k_models.values()] == pytest.approx(means, **FLOAT32)


def test_schedulers_see_fresh_values(tmp_path):
    seen = []

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = ours(self)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            scheduler = {"scheduler": plateau, "monitor": "step_size/mean", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

        def lr_scheduler_step(self, scheduler, metric):
            seen.append(metric.item())

    truth = Truth()
    trainer(tmp_path, [truth, monitor()], max_epochs=1).fit(Scheduled(ours), Batches(6))
    means = [truth.expected(step, ["mean"], BOUNDS)["step_size/mean"] for step in range(6)]
    assert seen == pytest.approx(means, **FLOAT32)


def test_several_optimizers_only_the_rprops(tmp_path):
    def make(module):
        first, last = module.net[0], module.net[2]
        return [
            Rprop([{"params": first.weight, "name": "weights"}, {"params": first.bias, "lr": 0.5}], lr=0.25),
            torch.optim.SGD([last.bias]),
            torch.optim.Rprop([last.weight], lr=0.5, step_sizes=(0.5, 0.75)),
        ]

    log = Recorder()
    callback = monitor(every_n_steps=1, per_parameter=True, per_group=True)
    fit = trainer(tmp_path, [callback], logger=log, max_epochs=1)
    fit.fit(Net(make, manual=True), Batches(1))
    ((step, metrics),) = log.records()
    assert step == 0
    assert {k: v for k, v in metrics.items() if k.endswith("mean")} == {
        "step_size/mean": (12 * 0.25 + 8 * 0.5) / 20,
        "step_size/optimizer0.weights/mean": 0.25,
        "step_size/optimizer0.group1/mean": 0.5,
        "step_size/optimizer2.group0/mean": 0.5,
        "step_size/net.0.weight/mean": 0.25,
        "step_size/net.0.bias/mean": 0.5,
        "step_size/net.2.weight/mean": 0.5,
    }
    assert metrics["step_size/lower_bound"] == 1e-6
    assert metrics["step_size/optimizer2.group0/lower_bound"] == 0.5
    assert metrics["step_size/at_lower_bound"] == 4 / 20


def test_of_optimizers_that_take_turns_only_the_one_that_stepped_has_a_gradient(tmp_path):
    class Turns(Net):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(self.net(batch).square().mean())
            optimizer.step()

    def make(module):
        return [Rprop(module.net[0].parameters()), Rprop(module.net[2].parameters())]

    log = Recorder()
    callback = monitor(every_n_steps=1, per_group=True, statistics=["mean", "zero_gradient"])
    trainer(tmp_path, [callback], logger=log, max_epochs=1).fit(Turns(make, manual=True), Batches(3))
    groups = [{k for k in m if "optimizer" in k and "zero" in k} for _, m in log.records()]
    assert groups == [{f"step_size/optimizer{i}.group0/zero_gradient"} for i in (0, 1, 0)]
    assert {"step_size/optimizer0.group0/mean", "step_size/optimizer1.group0/mean"} <= log.records()[2][1].keys()


def test_with_full_batch_the_gradient_of_all_samples_and_its_loss(tmp_path):
    log, truth = Recorder(), Truth()
    callback = monitor(every_n_steps=1)
    fit = trainer(tmp_path, [callback, truth, FullBatch(log_as="loss")], logger=log, max_epochs=1)
    fit.fit(Regression(lambda params: Rprop(params, lr=0.1)), FullBatchLoader(make_data(30), 7, steps_per_epoch=6))
    assert [step for step, _ in log.records()] == [*range(6)]
    for step, metrics in log.records():
        assert metrics == pytest.approx(truth.expected(step), **CLOSE)
    losses = [m["loss"] for _, m in log.calls if "loss" in m]
    steps, drawn = callback._history.series()["loss"]
    assert steps == [*range(6)]
    assert drawn[: len(losses)] == pytest.approx(losses, **FLOAT32)


def test_last_evaluation_of_a_step_counts(tmp_path):
    log, truth = Recorder(), Truth()
    callback = monitor(every_n_steps=1)
    fit = trainer(tmp_path, [truth, callback], logger=log, max_epochs=1)
    fit.fit(Net(lambda module: Rprop(module.parameters(), lr=0.1, step_sizes=BOUNDS, max_iter=4)), Batches(5))
    assert [step for step, _ in log.records()] == [*range(5)]
    for step, metrics in log.records():
        assert metrics == pytest.approx(truth.expected(step, bounds=BOUNDS), **CLOSE)


def test_names_without_the_compilers_prefix(tmp_path):
    log = Recorder()
    module = Net(ours)
    module.net = torch.compile(module.net, backend="eager")
    callback = monitor(per_parameter=True, statistics=["mean"])
    trainer(tmp_path, [callback], logger=log, log_every_n_steps=1, max_epochs=1).fit(module, Batches(1))
    assert {f"step_size/{name}/mean" for name in NAMES} == log.records()[0][1].keys() - {"step_size/mean"}


def test_in_the_trainer_of_pytorch_lightning(tmp_path):
    class Foreign(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return Rprop(self.parameters(), lr=0.25)

    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, "tb", "0")
    callback = monitor(every_n_steps=1, histogram=True)
    fit = trainer(tmp_path, [callback], package=pytorch_lightning, max_epochs=1, logger=logger)
    fit.fit(Foreign(), Batches(1))
    assert fit.callback_metrics["step_size/max"].item() == 0.25
    events = EventAccumulator(str(tmp_path / "tb" / "0")).Reload()
    assert events.Scalars("step_size/max")[0].value == 0.25
    assert events.Tags()["histograms"] == ["step_size/log10"]


def test_resumed_run_goes_on(tmp_path):
    """The records, what was said, and the picture are those of a run that was not stopped."""

    def fit(log, epochs, checkpoint=None):
        callback = monitor(every_n_steps=2, per_parameter=True)
        fitter = trainer(tmp_path, [callback], logger=log, max_epochs=epochs)
        fitter.fit(Net(ours), Batches(3), ckpt_path=checkpoint)
        return fitter, callback

    whole, first, second = Recorder(), Recorder(), Recorder()
    _, undisturbed = fit(whole, 4)
    fitter, _ = fit(first, 2)
    fitter.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    _, resumed = fit(second, 4, tmp_path / "half.ckpt")
    assert second.records() == [(step, metrics) for step, metrics in whole.records() if step >= 6]
    assert len(second.records()) == 3
    assert resumed._history.series() == undisturbed._history.series()
    assert len(resumed._history.series()["loss"][0]) == 6


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")  # its batches are all the same
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_in_the_middle_of_an_epoch_its_record_is_whole(tmp_path):
    """With what the last step's gradient gives, though Lightning starts no epoch there."""

    def fit(checkpoint=None):
        log = Recorder()
        watching = monitor(logging_interval="epoch", statistics=["mean", "sign_changed"])
        every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fitter = trainer(tmp_path, [watching, every], logger=log, max_epochs=2, enable_checkpointing=True)
        fitter.fit(Net(ours), Batches(4), ckpt_path=checkpoint)
        return log.records()

    whole = fit()
    assert [step for step, _ in whole] == [3, 7]
    assert all("step_size/sign_changed" in metrics for _, metrics in whole)
    assert fit(tmp_path / "step=2.ckpt") == whole


@pytest.mark.filterwarnings("ignore:The loaded state replaced options")
def test_bounds_are_those_in_force(tmp_path):
    """Those that a checkpoint brings, and those that a program changes."""

    class Widening(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.optimizers[0].param_groups[0]["step_sizes"] = (1e-3, 7.0)

    first = trainer(tmp_path, max_epochs=1)
    first.fit(Net(ours), Batches(2))
    first.save_checkpoint(tmp_path / "first.ckpt")
    log = Recorder()
    fit = trainer(tmp_path, [Widening(), monitor(every_n_steps=1)], logger=log, max_epochs=2)
    fit.fit(Net(lambda m: Rprop(m.parameters())), Batches(2), ckpt_path=tmp_path / "first.ckpt")
    seen = [(metrics["step_size/lower_bound"], metrics["step_size/upper_bound"]) for _, metrics in log.records()]
    assert seen == [BOUNDS, (1e-3, 7.0)]


def test_a_test_of_a_checkpoint_leaves_what_was_seen(tmp_path):
    class Tested(Net):
        def test_step(self, batch, batch_idx):
            self.log("test", self.net(batch).mean())

    callback = monitor(every_n_steps=1, statistics=["mean"])
    fit = trainer(tmp_path, [callback], max_epochs=2)
    module = Tested(ours)
    fit.fit(module, Batches(3))
    fit.save_checkpoint(tmp_path / "early.ckpt")
    fit.fit_loop.max_epochs = 4
    fit.fit(module, Batches(3))
    seen = callback._history.series()
    assert seen["step_size/mean"][0] == [*range(12)]
    fit.test(module, Batches(1), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert callback._history.series() == seen


def test_a_second_run_measures_anew(tmp_path):
    """The same callback in another run: nothing of the first is shown for the second, and nothing is left out."""
    callback = monitor()
    for lr in (0.25, 0.5):
        log = Recorder()
        fit = trainer(tmp_path, [callback], logger=log, log_every_n_steps=1, max_epochs=1)
        fit.fit(Net(lambda m, lr=lr: Rprop(m.parameters(), lr=lr)), Batches(1))
        assert fit.callback_metrics["step_size/mean"].item() == lr
        assert [metrics["step_size/mean"] for _, metrics in log.records()] == [lr]
        assert callback._history.series()["step_size/mean"] == ([0], [lr])


def test_the_picture_of_a_long_run_is_of_all_of_it_and_bounded(tmp_path):
    log = Recorder()
    callback = monitor(every_n_steps=1, statistics=["mean"])
    trainer(tmp_path, [callback], logger=log, max_epochs=1).fit(Net(ours), Batches(4 * LIMIT + 7))
    steps, values = callback._history.series()["step_size/mean"]
    recorded = {step: metrics["step_size/mean"] for step, metrics in log.records()}
    assert len(recorded) == 4 * LIMIT + 7
    assert LIMIT <= len(steps) <= 2 * LIMIT
    assert steps[0] <= 8
    assert steps[-1] == 4 * LIMIT + 6
    assert max(b - a for a, b in pairwise(steps)) <= 8
    assert values == [recorded[step] for step in steps]
    kept = callback.state_dict()["history"]
    assert len(kept["steps"]) == len(steps)


def test_a_validation_after_each_record_does_not_push_it_out_of_the_picture(tmp_path):
    callback = monitor(every_n_steps=2, statistics=["mean"])
    steps = 4 * LIMIT + 2
    fit = trainer(tmp_path, [callback], max_epochs=1, val_check_interval=2)
    fit.fit(ValidatedNet(ours), Batches(steps), Batches(1))
    seen = callback._history.series() | callback._validations.series()
    assert set(seen) == {"loss", "step_size/mean", "val_loss"}
    assert all(LIMIT <= len(series) <= 2 * LIMIT for series, _ in seen.values())


def test_a_loss_that_is_no_number_is_a_gap_in_the_picture(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1)

    callback = monitor(every_n_steps=1, statistics=["mean"])
    trainer(tmp_path, [callback], max_epochs=1).fit(Broken(ours), Batches(4))
    steps, losses = callback._history.series()["loss"]
    assert steps == [0, 1, 2, 3]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]


def test_plot_draws_the_run(tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    log = Recorder()
    names = ["median", "q10", "q90", "lower_bound", "upper_bound"]
    callback = monitor(every_n_steps=2, per_parameter=True, statistics=names)
    with pytest.raises(ValueError, match="StepSizeMonitor"):
        callback.plot()
    fit = trainer(tmp_path, [callback], logger=log, max_epochs=4, num_sanity_val_steps=1)
    fit.fit(ValidatedNet(ours), Batches(3), Batches(1))
    fig, axes = callback.plot()
    records = log.records()
    drawn = {tuple(line.get_ydata()) for line in axes[-1].lines}
    for name in NAMES:
        assert tuple(metrics[f"step_size/{name}/median"] for _, metrics in records) in drawn
    labels = {text.get_text() for text in axes[0].get_legend().get_texts()}
    assert labels == {"loss", "val_loss"}
    assert {tuple(line.get_xdata()) for line in axes[0].lines} == {(1, 3, 5, 7, 9, 11), (2, 5, 8, 11)}
    plt.close(fig)


def test_nothing_to_measure_is_no_record(tmp_path):
    """A parameter without a gradient has no step size; a run without steps leaves nothing."""

    class Frozen(Net):
        def training_step(self, batch, batch_idx):
            return None

    log = Recorder()
    fit = trainer(tmp_path, [monitor(every_n_steps=1)], logger=log, max_epochs=1)
    with pytest.warns(UserWarning, match="returned `None`"):
        fit.fit(Frozen(ours), Batches(2))
    assert log.records() == []
    assert published(fit) == {}
    assert math.isfinite(fit.global_step)
