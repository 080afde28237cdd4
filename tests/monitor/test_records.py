"""StepSizeMonitor's records: their keys, values and steps."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from monitor_runs import (
    BOUNDS,
    CLOSE,
    FLOAT32,
    NAMES,
    TakingTurns,
    make_ours,
    make_torch,
    published,
    quiet_monitor,
)
from monitor_truth import DEFAULT, Truth
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop
from lightning_rprop.monitor import _record as record


@pytest.mark.parametrize("make", [make_ours, make_torch], ids=["ours", "torch"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_record_matches_plain_python(make, manual, tmp_path):
    """Keys in order, values and steps, over all parameters, per group and per parameter."""
    log, truth = Recorder(), Truth()
    names = (*DEFAULT, "median", "q10", "q97.5", "std_log10")
    callback = quiet_monitor(statistics=names, per_parameter=True, per_group=True)
    trainer = make_trainer(tmp_path, [truth, callback], logger=log, log_every_n_steps=2)
    trainer.fit(Net(make, manual), Batches(5))
    assert [step for step, _ in log.records()] == [1, 3, 5, 7, 9, 11, 13]
    for step, metrics in log.records():
        right = truth.expected(step, names, BOUNDS, NAMES, {"group0": NAMES})
        assert list(metrics) == list(right)
        logarithms = {key for key in right if key.endswith("std_log10")}
        exact = {key: value for key, value in right.items() if key not in logarithms}
        assert {key: metrics[key] for key in exact} == pytest.approx(exact, **CLOSE)
        # the monitor takes logarithms in float32
        assert {key: metrics[key] for key in logarithms} == pytest.approx({k: right[k] for k in logarithms}, **FLOAT32)
    assert len({metrics["step_size/sign_changed"] for _, metrics in log.records()}) > 2  # the values do vary
    assert published(trainer) == pytest.approx(truth.expected(14, names, BOUNDS, (), {"group0": NAMES}), **FLOAT32)


def test_default_record_holds_only_totals(tmp_path):
    log, truth = Recorder(), Truth()
    trainer = make_trainer(tmp_path, [quiet_monitor(), truth], logger=log, log_every_n_steps=1, max_epochs=1)
    trainer.fit(Net(make_ours), Batches(2))
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
def test_per_parameter_selects_by_name(chosen, names, tmp_path):
    log = Recorder()
    callback = quiet_monitor(per_parameter=chosen, statistics=["max", "min"])
    make_trainer(tmp_path, [callback], logger=log, log_every_n_steps=1, max_epochs=1).fit(Net(make_ours), Batches(1))
    scopes = ["", *(f"{name}/" for name in names)]
    ((_, metrics),) = log.records()
    assert list(metrics) == [f"step_size/{scope}{name}" for scope in scopes for name in ("max", "min")]
    # a separate call: passing this many values through self.log would cost more than the step
    assert not [key for key in log.calls[0][1] if "loss" in key]


def test_parameters_stay_out_of_callback_metrics(tmp_path):
    callback = quiet_monitor(per_parameter=True, per_group=True, statistics=["max"])
    trainer = make_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(Net(make_ours), Batches(1))
    assert set(published(trainer)) == {"step_size/max", "step_size/group0/max"}


def test_unmatched_pattern_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, [quiet_monitor(per_parameter=["net.0.*", "net.1.*"])])
    with pytest.raises(MisconfigurationException, match=r"per_parameter: 'net.1.\*' matches none .*: net.0.weight"):
        trainer.fit(Net(make_ours), Batches(1))
    assert trainer.global_step == 0


def test_accumulated_batches_make_one_record(tmp_path):
    """The step is the one that Lightning logs its own metrics at."""
    log, truth = Recorder(), Truth()
    callbacks = [truth, quiet_monitor()]
    trainer = make_trainer(tmp_path, callbacks, logger=log, log_every_n_steps=1, accumulate_grad_batches=3)
    trainer.fit(Net(make_ours), Batches(7))
    steps = [step for step, _ in log.records()]
    assert steps == list(range(9))  # 3 steps per epoch: after batches 3 and 6 and, at its end, 7
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
def test_interval_decides_recorded_steps(options, steps, tmp_path):
    log, truth = Recorder(), Truth()
    trainer = make_trainer(tmp_path, [truth, quiet_monitor(**options)], logger=log, log_every_n_steps=5)
    trainer.fit(Net(make_ours), Batches(5))
    assert [step for step, _ in log.records()] == steps
    for step, metrics in log.records():
        right = truth.expected(step, options.get("statistics", DEFAULT), BOUNDS)
        assert metrics == pytest.approx(right, **CLOSE)


@pytest.mark.parametrize("log_every_n_steps", [0, 7])
def test_nothing_is_computed_between_records(log_every_n_steps, tmp_path, monkeypatch):
    """The last step of a run is measured too, for callback_metrics, but not logged."""
    seen = []

    def spy(name):
        original = getattr(record, name)

        def call(*args, **kwargs):
            seen.append((name, trainer.global_step))
            return original(*args, **kwargs)

        return call

    for name in ("summarize_gradients", "measure"):
        monkeypatch.setattr(f"lightning_rprop.monitor.callback.{name}", spy(name))
    log = Recorder()
    trainer = make_trainer(tmp_path, [quiet_monitor()], logger=log, log_every_n_steps=log_every_n_steps, max_epochs=2)
    trainer.fit(Net(make_ours), Batches(5))
    records = [("summarize_gradients", 6), ("measure", 7)] if log_every_n_steps else []
    assert seen == [*records, ("summarize_gradients", 9), ("measure", 10)]
    assert [step for step, _ in log.records()] == ([6] if log_every_n_steps else [])


def test_only_rprops_of_several_are_measured(tmp_path):
    def make(module):
        first, last = module.net[0], module.net[2]
        return [
            Rprop([{"params": first.weight, "name": "weights"}, {"params": first.bias, "lr": 0.5}], lr=0.25),
            torch.optim.SGD([last.bias]),
            torch.optim.Rprop([last.weight], lr=0.5, step_sizes=(0.5, 0.75)),
        ]

    log = Recorder()
    callback = quiet_monitor(every_n_steps=1, per_parameter=True, per_group=True)
    trainer = make_trainer(tmp_path, [callback], logger=log, max_epochs=1)
    trainer.fit(Net(make, manual=True), Batches(1))
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


def test_only_stepped_optimizer_has_gradient(tmp_path):
    def make(module):
        return [Rprop(module.net[0].parameters()), Rprop(module.net[2].parameters())]

    log = Recorder()
    callback = quiet_monitor(every_n_steps=1, per_group=True, statistics=["mean", "zero_gradient"])
    make_trainer(tmp_path, [callback], logger=log, max_epochs=1).fit(TakingTurns(make, manual=True), Batches(3))
    groups = [{k for k in m if "optimizer" in k and "zero" in k} for _, m in log.records()]
    assert groups == [{f"step_size/optimizer{i}.group0/zero_gradient"} for i in (0, 1, 0)]
    assert {"step_size/optimizer0.group0/mean", "step_size/optimizer1.group0/mean"} <= log.records()[2][1].keys()


def test_full_batch_record_uses_whole_gradient(tmp_path):
    """The loss in the history is that of the whole data set, too."""
    log, truth = Recorder(), Truth()
    callback = quiet_monitor(every_n_steps=1)
    callbacks = [callback, truth, FullBatch(log_as="loss")]
    trainer = make_trainer(tmp_path, callbacks, logger=log, max_epochs=1, log_every_n_steps=1)
    trainer.fit(Regression(lambda params: Rprop(params, lr=0.1)), FullBatchLoader(make_data(30), 7, steps_per_epoch=6))
    assert [step for step, _ in log.records()] == [*range(6)]
    for step, metrics in log.records():
        assert metrics == pytest.approx(truth.expected(step), **CLOSE)
    losses = [m["loss"] for _, m in log.calls if "loss" in m]
    steps, drawn = callback._history.series()["loss"]
    assert steps == [*range(6)]
    assert drawn == pytest.approx(losses, **FLOAT32)


def test_last_closure_evaluation_counts(tmp_path):
    log, truth = Recorder(), Truth()
    callback = quiet_monitor(every_n_steps=1)
    trainer = make_trainer(tmp_path, [truth, callback], logger=log, max_epochs=1)
    trainer.fit(Net(lambda module: Rprop(module.parameters(), lr=0.1, step_sizes=BOUNDS, max_iter=4)), Batches(5))
    assert [step for step, _ in log.records()] == [*range(5)]
    for step, metrics in log.records():
        assert metrics == pytest.approx(truth.expected(step, bounds=BOUNDS), **CLOSE)


def test_compiled_module_keeps_plain_names(tmp_path):
    log = Recorder()
    module = Net(make_ours)
    module.net = torch.compile(module.net, backend="eager")
    callback = quiet_monitor(per_parameter=True, statistics=["mean"])
    make_trainer(tmp_path, [callback], logger=log, log_every_n_steps=1, max_epochs=1).fit(module, Batches(1))
    assert {f"step_size/{name}/mean" for name in NAMES} == log.records()[0][1].keys() - {"step_size/mean"}


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # once per process, so not always here
def test_run_without_gradients_has_no_record(tmp_path):
    """Lightning counts its steps, but no parameter has a step size."""

    class Frozen(Net):
        def training_step(self, batch, batch_idx):
            return None

    log = Recorder()
    trainer = make_trainer(tmp_path, [quiet_monitor(every_n_steps=1)], logger=log, max_epochs=1)
    trainer.fit(Frozen(make_ours), Batches(2))
    assert log.records() == []
    assert published(trainer) == {}
    assert trainer.global_step == 2
