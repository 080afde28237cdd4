"""StepSizeMonitor: the numbers, when they are logged, and where they arrive."""

import csv

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lit import Batches, Net, ValidatedNet, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_rprop import Rprop, StepSizeMonitor
from lightning_rprop.monitor.statistics import summarize

NAMES = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")


def ours(module):
    return Rprop(module.parameters(), lr=0.1)


def torchs(module):
    return torch.optim.Rprop(module.parameters(), lr=0.1)


class Recorder(Logger):
    """A logger that keeps the calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name, version = "recorder", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def records(self):
        return [(step, metrics) for step, metrics in self.calls if "step_size/mean" in metrics]


class Truth(pl.Callback):
    """Keep the step sizes after every optimizer step, by Lightning's own count of them."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state
        if state:
            sizes = {n: state[p]["step_size"].clone() for n, p in pl_module.named_parameters()}
            self.after[trainer.global_step - 1] = sizes


def expected(sizes):
    whole = torch.cat([s.flatten() for s in sizes.values()]).double()
    parts = {"": whole} | {f"{name}/": s.double() for name, s in sizes.items()}
    functions = {"mean": torch.mean, "min": torch.min, "max": torch.max}
    return {f"step_size/{part}{f}": functions[f](values).item() for part, values in parts.items() for f in functions}


def test_summary_by_hand():
    overall, each = summarize(
        {
            "a": torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
            "empty": torch.empty(0),
            "half": torch.tensor([0.5], dtype=torch.float16),
            "double": torch.tensor(8.0, dtype=torch.float64),
            "complex": torch.tensor([1 + 3j]),
        }
    )
    assert each == {
        "a": {"mean": 3.0, "min": 1.0, "max": 6.0},
        "half": {"mean": 0.5, "min": 0.5, "max": 0.5},
        "double": {"mean": 8.0, "min": 8.0, "max": 8.0},
        "complex": {"mean": 2.0, "min": 1.0, "max": 3.0},
    }
    assert overall == {"mean": 24.5 / 8, "min": 0.5, "max": 8.0}
    assert summarize({"empty": torch.empty(0)}) == summarize({}) == ({}, {})


def test_summary_of_half_precision_keeps_its_digits():
    overall, _ = summarize({"a": torch.full((100_000,), 0.1, dtype=torch.float16)})
    assert overall["mean"] == overall["min"] == overall["max"] == torch.tensor(0.1, dtype=torch.float16).item()


@pytest.mark.parametrize("make", [ours, torchs], ids=["ours", "torch"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_every_record_is_right(make, manual, tmp_path):
    log, truth = Recorder(), Truth()
    fit = trainer(tmp_path, [truth, StepSizeMonitor()], logger=log, log_every_n_steps=2)
    fit.fit(Net(make, manual), Batches(5))
    assert [step for step, _ in log.records()] == [1, 3, 5, 7, 9, 11, 13]
    for step, metrics in log.records():
        # the means of float32 are summed in another order here, in float64: 1e-12 is far above that rounding
        assert metrics == pytest.approx(expected(truth.after[step]), rel=1e-12, abs=0)
    last = expected(truth.after[14])
    seen = {name: value.item() for name, value in fit.callback_metrics.items() if name.startswith("step_size")}
    assert seen == pytest.approx(last, rel=1e-6, abs=0)  # callback_metrics are float32


def test_a_record_is_one_call_at_lightnings_step_and_accumulation_is_no_step(tmp_path):
    log = Recorder()
    fit = trainer(tmp_path, [StepSizeMonitor()], logger=log, log_every_n_steps=1, accumulate_grad_batches=3)
    fit.fit(Net(ours), Batches(7))
    steps = [step for step, _ in log.records()]
    assert steps == list(range(9))  # 3 steps an epoch: after 3, 6 and, at its end, 7 batches
    assert steps == [step for step, metrics in log.calls if "loss" in metrics]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 4}, [3, 7, 11]),
        ({"logging_interval": "step"}, [4, 9, 14]),
        ({"logging_interval": "epoch"}, [4, 9, 14]),
        ({"logging_interval": "epoch", "statistics": ["max"]}, [4, 9, 14]),
    ],
    ids=str,
)
def test_intervals(options, steps, tmp_path):
    log = Recorder()
    name = f"step_size/{options.get('statistics', ['mean'])[0]}"
    fit = trainer(tmp_path, [StepSizeMonitor(**options)], logger=log, log_every_n_steps=5)
    fit.fit(Net(ours), Batches(5))
    assert [step for step, metrics in log.calls if name in metrics] == steps


def test_chosen_statistics_and_totals_only(tmp_path):
    log = Recorder()
    monitor = StepSizeMonitor(statistics=["max", "min"], per_parameter=False)
    trainer(tmp_path, [monitor], logger=log, log_every_n_steps=1).fit(Net(ours), Batches(1))
    names = {name for _, metrics in log.calls for name in metrics if name.startswith("step_size")}
    assert names == {"step_size/max", "step_size/min"}


def test_csv_and_tensorboard_files(tmp_path):
    truth = Truth()
    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(tmp_path, "tb", "0")]
    trainer(tmp_path, [StepSizeMonitor(), truth], logger=loggers, log_every_n_steps=3).fit(Net(ours), Batches(3))

    with (tmp_path / "csv" / "0" / "metrics.csv").open() as file:
        rows = {int(r["step"]): r for r in csv.DictReader(file) if r["step_size/mean"]}
    assert list(rows) == [2, 5, 8]
    events = EventAccumulator(str(tmp_path / "tb" / "0")).Reload()
    for name, value in expected(truth.after[8]).items():
        assert float(rows[8][name]) == pytest.approx(value, rel=1e-12)  # as above
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [2, 5, 8]
        assert scalars[-1].value == pytest.approx(value, rel=1e-6)  # TensorBoard keeps float32


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
@pytest.mark.parametrize("validate", [False, True])
def test_early_stopping_sees_fresh_values(log_every_n_steps, validate, tmp_path):
    """With one step an epoch and no record due, and wherever EarlyStopping stands among the callbacks."""
    truth = Truth()
    stop = EarlyStopping("step_size/max", mode="max", stopping_threshold=0.2)
    fit = trainer(tmp_path, [stop, truth, StepSizeMonitor()], max_epochs=50, log_every_n_steps=log_every_n_steps)
    fit.fit(*([ValidatedNet(ours), Batches(1), Batches(1)] if validate else [Net(ours), Batches(1)]))
    largest = [max(s.max().item() for s in sizes.values()) for sizes in truth.after.values()]
    assert len(largest) == fit.current_epoch < 50
    assert largest[-1] > 0.2
    assert all(value <= 0.2 for value in largest[:-1])


def test_fresh_before_a_validation_in_mid_epoch(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append((trainer.global_step - 1, trainer.callback_metrics["step_size/mean"].item()))

    truth = Truth()
    callbacks = [Look(), truth, StepSizeMonitor()]
    fit = trainer(tmp_path, callbacks, max_epochs=1, val_check_interval=2)
    fit.fit(ValidatedNet(ours), Batches(6), Batches(1))
    assert [step for step, _ in seen] == [1, 3, 5]
    for step, value in seen:
        assert value == pytest.approx(expected(truth.after[step])["step_size/mean"], rel=1e-6)  # float32


def test_fresh_when_max_steps_ends_the_run(tmp_path):
    truth = Truth()
    stop = EarlyStopping("step_size/mean", check_on_train_epoch_end=True)
    fit = trainer(tmp_path, [stop, truth, StepSizeMonitor()], max_steps=3, max_epochs=-1)
    fit.fit(Net(ours), Batches(10))
    value = expected(truth.after[2])["step_size/mean"]
    assert fit.callback_metrics["step_size/mean"].item() == pytest.approx(value, rel=1e-6)  # float32


def test_several_optimizers_only_the_rprops(tmp_path):
    def make(module):
        first, last = module.net[0], module.net[2]
        return [
            Rprop(first.parameters(), lr=0.25),
            torch.optim.SGD([last.bias]),
            torch.optim.Rprop([last.weight], lr=0.5),
        ]

    log = Recorder()
    fit = trainer(tmp_path, [StepSizeMonitor(every_n_steps=1)], logger=log, max_epochs=1)
    fit.fit(Net(make, manual=True), Batches(1))
    ((step, metrics),) = log.records()
    assert step == 0
    assert {k: v for k, v in metrics.items() if k.endswith("mean")} == {
        "step_size/mean": (16 * 0.25 + 4 * 0.5) / 20,
        "step_size/net.0.weight/mean": 0.25,
        "step_size/net.0.bias/mean": 0.25,
        "step_size/net.2.weight/mean": 0.5,
    }


def test_names_without_the_compilers_prefix(tmp_path):
    log = Recorder()
    module = Net(ours)
    module.net = torch.compile(module.net, backend="eager")
    trainer(tmp_path, [StepSizeMonitor()], logger=log, log_every_n_steps=1, max_epochs=1).fit(module, Batches(1))
    assert {f"step_size/{name}/mean" for name in NAMES} <= log.records()[0][1].keys()


@pytest.mark.parametrize("make", [lambda m: torch.optim.SGD(m.parameters(), lr=0.1), lambda m: None])
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_rprop_is_an_error_before_training(make, tmp_path):
    fit = trainer(tmp_path, [StepSizeMonitor()])
    with pytest.raises(
        MisconfigurationException, match=r"needs an Rprop optimizer, .*returned: .*Return lightning_rprop"
    ):
        fit.fit(Net(make), Batches(1))
    assert fit.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logging_interval": "batch"}, "logging_interval must be 'step', 'epoch' or None, got 'batch'"),
        ({"every_n_steps": 0}, "every_n_steps must be a number of steps >= 1, or None, got 0"),
        (
            {"every_n_steps": 5, "logging_interval": "epoch"},
            "every_n_steps=5 needs logging_interval='step', got 'epoch'",
        ),
        (
            {"statistics": ["mean", "mode"]},
            r"statistics must be a list of some of mean, min, max, got \['mean', 'mode'\]",
        ),
        ({"statistics": "mean"}, "statistics must be a list of some of mean, min, max, got 'mean'"),
        ({"statistics": []}, r"statistics must be a list of some of mean, min, max, got \[\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        StepSizeMonitor(**options)


def test_in_the_trainer_of_pytorch_lightning(tmp_path):
    class Foreign(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return Rprop(self.parameters(), lr=0.25)

    fit = trainer(tmp_path, [StepSizeMonitor()], package=pytorch_lightning, max_epochs=1)
    fit.fit(Foreign(), Batches(1))
    assert fit.callback_metrics["step_size/layer.weight/max"].item() == 0.25


def test_resumed_run_goes_on_counting(tmp_path):
    whole, second = Recorder(), Recorder()
    trainer(tmp_path, [StepSizeMonitor(every_n_steps=2)], logger=whole, max_epochs=4).fit(Net(ours), Batches(3))
    first = trainer(tmp_path, [StepSizeMonitor(every_n_steps=2)], max_epochs=2)
    first.fit(Net(ours), Batches(3))
    first.save_checkpoint(tmp_path / "half.ckpt")
    fit = trainer(tmp_path, [StepSizeMonitor(every_n_steps=2)], logger=second, max_epochs=4)
    fit.fit(Net(ours), Batches(3), ckpt_path=tmp_path / "half.ckpt")
    assert second.records() == [(step, metrics) for step, metrics in whole.records() if step >= 6]
    assert len(second.records()) == 3


def test_a_second_run_measures_anew(tmp_path):
    """The same callback in another run: nothing of the first is shown for the second, and nothing is left out."""
    monitor = StepSizeMonitor()
    for lr in (0.25, 0.5):
        log = Recorder()
        fit = trainer(tmp_path, [monitor], logger=log, log_every_n_steps=1, max_epochs=1)
        fit.fit(Net(lambda m, lr=lr: Rprop(m.parameters(), lr=lr)), Batches(1))
        assert fit.callback_metrics["step_size/mean"].item() == lr
        assert [metrics["step_size/mean"] for _, metrics in log.records()] == [lr]
