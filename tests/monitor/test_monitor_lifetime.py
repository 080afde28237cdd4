"""What StepSizeMonitor keeps after a fit, after an exception, in a copy, and next to another monitor."""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer

from lightning_rprop import Rprop, StepSizeMonitor
from lightning_rprop.monitor._warnings import TOPICS

HOOKS = ("on_fit_start", "on_before_optimizer_step", "on_train_epoch_end", "on_train_end")


def make(module):
    return Rprop(module.parameters(), lr=0.1)


def monitor(**options):
    return StepSizeMonitor(**{"every_n_steps": 1, "silence": TOPICS, "per_parameter": True} | options)


class Stopping(Net):
    """Raise in the given hook: on_before_optimizer_step in the second epoch, the others at their first call."""

    def __init__(self, hook=None, error=RuntimeError):
        super().__init__(make)
        self.hook, self.error = hook, error

    def stop(self, hook):
        if hook == self.hook:
            raise self.error("stop")

    def on_fit_start(self):
        self.stop("on_fit_start")

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 4:
            self.stop("on_before_optimizer_step")

    def on_train_epoch_end(self):
        self.stop("on_train_epoch_end")

    def on_train_end(self):
        self.stop("on_train_end")


@pytest.mark.parametrize("hook", [None, *HOOKS])
def test_fit_leaves_no_reference_to_the_model(hook, tmp_path):
    callback = monitor()
    module = Stopping(hook)
    watched = [weakref.ref(p) for p in module.parameters()]
    trainer = make_trainer(tmp_path, [callback])
    with pytest.raises(RuntimeError, match="stop") if hook else nullcontext():
        trainer.fit(module, Batches(3))
    watched.append(weakref.ref(trainer.optimizers[0]))
    del trainer, module
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_pickle_after_a_fit_is_small(tmp_path):
    class Large(Net):
        def __init__(self):
            super().__init__(make)
            self.net.append(torch.nn.Linear(1, 100_000))

    callback = monitor()
    make_trainer(tmp_path, [callback], max_epochs=1).fit(Large(), Batches(2))
    pickled = pickle.dumps(callback)
    assert len(pickled) < 50_000
    again = pickle.loads(pickled)
    assert again._history.series() == callback._history.series()
    again.plot()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copy_during_a_fit_excludes_the_model(duplicate, tmp_path):
    copies = []

    class Copying(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            copies.append(duplicate(callback))

    callback, log = monitor(), Recorder()
    make_trainer(tmp_path, [callback, Copying()], logger=log, max_epochs=1).fit(Net(make), Batches(3))
    assert len(log.records()) == len(copies) == 3
    for step, each in enumerate(copies):
        assert not each._listing.rows
        assert not each._gradients
        assert len(each._history) == step
    again = Recorder()
    make_trainer(tmp_path, [copies[-1]], logger=again, max_epochs=1).fit(Net(make), Batches(3))
    assert again.records() == log.records()


@pytest.mark.parametrize("stop", ["error", "Ctrl-C", "should_stop", "max_time"])
def test_fit_after_a_stopped_fit_starts_fresh(stop, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if stop == "should_stop" and trainer.global_step == 2:
                trainer.should_stop = True

    callback, log, right = monitor(), Recorder(), Recorder()
    error = {"error": RuntimeError, "Ctrl-C": KeyboardInterrupt}.get(stop)
    module = Stopping("on_before_optimizer_step" if error else None, error)
    trainer = make_trainer(tmp_path, [callback, Stop()], max_time={"seconds": 0} if stop == "max_time" else None)
    with pytest.raises((RuntimeError, SystemExit)) if error else nullcontext():  # Lightning exits on Ctrl-C
        trainer.fit(module, Batches(3))
    make_trainer(tmp_path, [callback], logger=log).fit(Net(make), Batches(3))
    make_trainer(tmp_path, [monitor()], logger=right).fit(Net(make), Batches(3))
    assert len(log.records()) == 9
    assert log.records() == right.records()
    assert callback._history.series()["step_size/mean"][0] == [*range(9)]


def test_history_survives_an_exception(tmp_path):
    callback = monitor()
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(tmp_path, [callback]).fit(Stopping("on_before_optimizer_step"), Batches(3))
    assert callback._history.series()["step_size/mean"][0] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_two_monitors_keep_separate_records(tmp_path):
    """In a checkpoint too. At a common step they log the same values."""

    def fit(epochs, checkpoint=None):
        each, epoch = monitor(statistics=["mean"]), monitor(every_n_steps=None, logging_interval="epoch")
        log, save = Recorder(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(tmp_path, [each, epoch, save], logger=log, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(Net(make), Batches(2), ckpt_path=checkpoint)
        means = [(step, metrics["step_size/mean"]) for step, metrics in log.records()]
        assert len(dict(means)) == len({*means})
        return [list(m._history.series()["step_size/mean"][0]) for m in (each, epoch)]

    assert fit(2) == [[0, 1, 2, 3], [1, 3]]
    assert fit(3, tmp_path / "epoch=1.ckpt") == [[0, 1, 2, 3, 4, 5], [1, 3, 5]]


def test_resume_of_finished_run_keeps_records(tmp_path):
    trainer = make_trainer(tmp_path, [monitor()], max_epochs=2)
    trainer.fit(Net(make), Batches(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = monitor()
    make_trainer(tmp_path, [callback], max_epochs=2).fit(Net(make), Batches(2), ckpt_path=tmp_path / "last.ckpt")
    assert callback._history.series()["step_size/mean"][0] == [0, 1, 2, 3]
