"""StepSizeMonitor across runs: resuming, a second run, and the history that plot() draws."""

import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import Batches, Net, Recorder, ValidatedNet
from lit import trainer as make_trainer
from monitor_runs import BOUNDS, NAMES, make_ours, quiet_monitor

from lightning_rprop import Rprop
from lightning_rprop.monitor._history import LIMIT


def test_resumed_records_match_uninterrupted(tmp_path):
    """The history matches too."""

    def fit(log, epochs, checkpoint=None):
        callback = quiet_monitor(every_n_steps=2, per_parameter=True)
        trainer = make_trainer(tmp_path, [callback], logger=log, max_epochs=epochs)
        trainer.fit(Net(make_ours), Batches(3), ckpt_path=checkpoint)
        return trainer, callback

    whole, first, second = Recorder(), Recorder(), Recorder()
    _, uninterrupted = fit(whole, 4)
    trainer, _ = fit(first, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    _, resumed = fit(second, 4, tmp_path / "half.ckpt")
    assert second.records() == [(step, metrics) for step, metrics in whole.records() if step >= 6]
    assert len(second.records()) == 3
    assert resumed._history.series() == uninterrupted._history.series()
    assert len(resumed._history.series()["loss"][0]) == 6


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")  # all batches are equal
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_mid_epoch_resume_keeps_full_record(tmp_path):
    """Including gradient statistics, although Lightning does not call on_train_epoch_start there."""

    def fit(checkpoint=None):
        log = Recorder()
        callback = quiet_monitor(logging_interval="epoch", statistics=["mean", "sign_changed"])
        save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = make_trainer(tmp_path, [callback, save], logger=log, max_epochs=2, enable_checkpointing=True)
        trainer.fit(Net(make_ours), Batches(4), ckpt_path=checkpoint)
        return log.records()

    whole = fit()
    assert [step for step, _ in whole] == [3, 7]
    assert all("step_size/sign_changed" in metrics for _, metrics in whole)
    assert fit(tmp_path / "step=2.ckpt") == whole


@pytest.mark.filterwarnings("ignore:The loaded state replaced options")
def test_record_uses_bounds_in_force(tmp_path):
    """Those loaded from a checkpoint, and those changed during the run."""

    class Widening(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.optimizers[0].param_groups[0]["step_sizes"] = (1e-3, 7.0)

    first = make_trainer(tmp_path, max_epochs=1)
    first.fit(Net(make_ours), Batches(2))
    first.save_checkpoint(tmp_path / "first.ckpt")
    log = Recorder()
    trainer = make_trainer(tmp_path, [Widening(), quiet_monitor(every_n_steps=1)], logger=log, max_epochs=2)
    trainer.fit(Net(lambda m: Rprop(m.parameters())), Batches(2), ckpt_path=tmp_path / "first.ckpt")
    seen = [(metrics["step_size/lower_bound"], metrics["step_size/upper_bound"]) for _, metrics in log.records()]
    assert seen == [BOUNDS, (1e-3, 7.0)]


def test_testing_a_checkpoint_keeps_history(tmp_path):
    class Tested(Net):
        def test_step(self, batch, batch_idx):
            self.log("test", self.net(batch).mean())

    callback = quiet_monitor(every_n_steps=1, statistics=["mean"])
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    module = Tested(make_ours)
    trainer.fit(module, Batches(3))
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, Batches(3))
    seen = callback._history.series()
    assert seen["step_size/mean"][0] == [*range(12)]
    trainer.test(module, Batches(1), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert callback._history.series() == seen


def test_second_run_starts_fresh(tmp_path):
    """Reuse a callback: no value of the first run carries over, and no record of the second is missing."""
    callback = quiet_monitor()
    for lr in (0.25, 0.5):
        log = Recorder()
        trainer = make_trainer(tmp_path, [callback], logger=log, log_every_n_steps=1, max_epochs=1)
        trainer.fit(Net(lambda m, lr=lr: Rprop(m.parameters(), lr=lr)), Batches(1))
        assert trainer.callback_metrics["step_size/mean"].item() == lr
        assert [metrics["step_size/mean"] for _, metrics in log.records()] == [lr]
        assert callback._history.series()["step_size/mean"] == ([0], [lr])


def test_history_of_long_run_is_bounded(tmp_path):
    """It still covers the whole run evenly."""
    log = Recorder()
    callback = quiet_monitor(every_n_steps=1, statistics=["mean"])
    make_trainer(tmp_path, [callback], logger=log, max_epochs=1).fit(Net(make_ours), Batches(4 * LIMIT + 7))
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


def test_validations_do_not_crowd_out_records(tmp_path):
    callback = quiet_monitor(every_n_steps=2, statistics=["mean"])
    steps = 4 * LIMIT + 2
    trainer = make_trainer(tmp_path, [callback], max_epochs=1, val_check_interval=2)
    trainer.fit(ValidatedNet(make_ours), Batches(steps), Batches(1))
    seen = callback._history.series() | callback._validations.series()
    assert set(seen) == {"loss", "step_size/mean", "val_loss"}
    assert all(LIMIT <= len(series) <= 2 * LIMIT for series, _ in seen.values())


def test_nan_loss_leaves_a_gap_in_history(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1)

    callback = quiet_monitor(every_n_steps=1, statistics=["mean"])
    make_trainer(tmp_path, [callback], max_epochs=1).fit(Broken(make_ours), Batches(4))
    steps, losses = callback._history.series()["loss"]
    assert steps == [0, 1, 2, 3]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]


def test_plot_draws_recorded_run(tmp_path):
    log = Recorder()
    names = ["median", "q10", "q90", "lower_bound", "upper_bound"]
    callback = quiet_monitor(every_n_steps=2, per_parameter=True, statistics=names)
    with pytest.raises(ValueError, match="StepSizeMonitor"):
        callback.plot()
    trainer = make_trainer(tmp_path, [callback], logger=log, max_epochs=4, num_sanity_val_steps=1)
    trainer.fit(ValidatedNet(make_ours), Batches(3), Batches(1))
    _, axes = callback.plot()
    records = log.records()
    drawn = {tuple(line.get_ydata()) for line in axes[-1].lines}
    for name in NAMES:
        assert tuple(metrics[f"step_size/{name}/median"] for _, metrics in records) in drawn
    labels = {text.get_text() for text in axes[0].get_legend().get_texts()}
    assert labels == {"loss", "val_loss"}
    assert {tuple(line.get_xdata()) for line in axes[0].lines} == {(1, 3, 5, 7, 9, 11), (2, 5, 8, 11)}
