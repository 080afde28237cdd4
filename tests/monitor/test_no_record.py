"""Runs without a record: StepSizeMonitor warns, and plot() says why and what to change."""

import re
import warnings

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer

from lightning_rprop import Rprop, StepSizeMonitor

NOTHING_LOGGED = r"log_every_n_steps=0\) turns logging off\. Set StepSizeMonitor\(every_n_steps=1\)"


def make(module):
    return Rprop(module.parameters())


def run(tmp_path, monitor, batches=4, module=None, callbacks=(), checkpoint=None, **options):
    """Return the monitor's warnings during a fit, and the Trainer."""
    trainer = make_trainer(tmp_path, [monitor, *callbacks], **{"logger": Recorder(), "max_epochs": 1} | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module or Net(make), Batches(batches), ckpt_path=checkpoint)
    return [str(w.message) for w in caught if "StepSizeMonitor" in str(w.message)], trainer


def test_logging_turned_off_is_warned_about(tmp_path):
    monitor = StepSizeMonitor()
    ((message,), _) = run(tmp_path, monitor, log_every_n_steps=0)
    assert "Set StepSizeMonitor(every_n_steps=1)" in message
    assert "silence=['no_record']" in message
    with pytest.raises(ValueError, match=NOTHING_LOGGED):
        monitor.plot()


@pytest.mark.parametrize("options", [{"every_n_steps": 1}, {"logging_interval": "epoch"}], ids=str)
def test_own_interval_overrides_the_trainers(options, tmp_path):
    """PINA, for example, sets ``log_every_n_steps=0``."""
    messages, trainer = run(tmp_path, StepSizeMonitor(**options), log_every_n_steps=0)
    assert messages == []
    assert trainer.logger.records()[-1][0] == 3


@pytest.mark.parametrize(("options", "interval"), [({}, 50), ({"every_n_steps": 41}, 41)], ids=str)
def test_run_shorter_than_interval_warns(options, interval, tmp_path):
    monitor = StepSizeMonitor(**options)
    ((message,), _) = run(tmp_path, monitor, 40)
    reason = f"recorded none of the 40 steps, because it records every {interval} steps. Set "
    assert reason + "StepSizeMonitor(every_n_steps=4), for example" in message
    with pytest.raises(ValueError, match=re.escape(f"there is no record to plot: StepSizeMonitor {reason}")):
        monitor.plot()
    messages, trainer = run(tmp_path, StepSizeMonitor(every_n_steps=4), 40)  # follow the remedy
    assert messages == []
    assert len(trainer.logger.records()) == 10


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {}], ids=str)
def test_no_record_warning_can_be_silenced(options, tmp_path):
    assert run(tmp_path, StepSizeMonitor(silence=["no_record"]), **options)[0] == []


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {}], ids=str)
@pytest.mark.filterwarnings("ignore:.*fast_dev_run")
def test_fast_dev_run_is_not_warned_about(options, tmp_path):
    assert run(tmp_path, StepSizeMonitor(), fast_dev_run=True, **options)[0] == []


def test_early_stopped_run_is_warned_about(tmp_path):
    stop = EarlyStopping("step_size/max", stopping_threshold=1.0, patience=100, check_on_train_epoch_end=True)
    ((message,), trainer) = run(tmp_path, StepSizeMonitor(), callbacks=[stop], max_epochs=5)
    assert trainer.current_epoch == 1
    assert "none of the 4 steps" in message


@pytest.mark.parametrize("more", [3, 9])
def test_resumed_run_with_records_is_silent(more, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="first")
    run(tmp_path, StepSizeMonitor(), 4, callbacks=[save], log_every_n_steps=4, enable_checkpointing=True)
    monitor = StepSizeMonitor()
    checkpoint = tmp_path / "first.ckpt"
    messages, _ = run(tmp_path, monitor, 4, checkpoint=checkpoint, log_every_n_steps=50, max_epochs=more)
    assert messages == []
    assert monitor._history.series()["step_size/mean"][0] == [3]


def test_resumed_run_counts_only_its_own_steps(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(Net(make), Batches(30))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    ((message,), _) = run(tmp_path, StepSizeMonitor(), 30, checkpoint=tmp_path / "plain.ckpt", max_epochs=3)
    assert "none of the 30 steps" in message


def test_continued_fit_is_not_warned_about(tmp_path):
    monitor = StepSizeMonitor(every_n_steps=4)
    messages, trainer = run(tmp_path, monitor, 4)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Net(make), Batches(3))
    assert messages == []
    assert monitor._history.series()["step_size/mean"][0] == [3]


def test_plot_before_any_fit_says_why():
    with pytest.raises(ValueError, match=r"no optimizer step in this process\. Pass it to Trainer\(callbacks=\[moni"):
        StepSizeMonitor().plot()


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_plot_without_training_says_why(function, tmp_path):
    class Evaluated(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.net(batch).mean())

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.net(batch).mean())

        def predict_step(self, batch):
            return self.net(batch)

    monitor = StepSizeMonitor()
    getattr(make_trainer(tmp_path, [monitor]), function)(Evaluated(make), Batches(2))
    with pytest.raises(ValueError, match="no optimizer step in this process"):
        monitor.plot()


def test_plot_during_a_fit_counts_past_steps(tmp_path):
    class Plotting(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                with pytest.raises(ValueError, match="none of the 3 steps, because it records every 5 steps"):
                    monitor.plot()

    monitor = StepSizeMonitor(every_n_steps=5)
    assert run(tmp_path, monitor, 5, Plotting(make))[0] == []


class Idle(Net):
    """Train nothing."""

    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"every_n_steps": 2},
            "no step sizes, although it recorded every 2 steps. Check that training_step returns a loss",
        ),
        ({"logging_interval": "epoch"}, "at the end of an epoch, and found no step sizes there. Check that an epoch"),
    ],
    ids=str,
)
def test_plot_without_gradients_says_why(options, message, tmp_path):
    monitor = StepSizeMonitor(**options)
    assert run(tmp_path, monitor, 4, Idle(make))[0] == []
    with pytest.raises(ValueError, match=message):
        monitor.plot()
