"""A fit leaves nothing behind in loader, optimizer, Trainer or process, however it ends."""

import gc
import os
import pickle
import signal
import threading

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lit import all_equal, trainer
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

DATA = make_data(40)


def left_behind(loader, module, full_batch):
    """Return the names of what a fit has left behind."""
    optimizer = module.optimizers().optimizer
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    loop = module.trainer.fit_loop.epoch_loop.automatic_optimization
    source = module.trainer.fit_loop._data_source
    found = {
        "hooks": hooks,
        "served": loader._served,
        "closure": "_make_closure" in vars(loop),
        "source": "dataloader" in vars(source),
        "fit": full_batch._fit is not None,
        "signal": signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, signal.SIG_IGN),
    }
    return {name for name, value in found.items() if value}


class Fails(pl.Callback):
    """Raises an error in a hook."""

    def __init__(self, hook, error):
        def fail(*args, **kwargs):
            raise error

        setattr(self, hook, fail)


@pytest.mark.parametrize("error", [ArithmeticError(), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_start",
        "on_train_batch_start",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
    ],
)
def test_failed_fit_leaves_nothing_behind(hook, error, tmp_path):
    module, full_batch = Regression(), FullBatch(take_over=True)
    loader = FullBatchLoader(DATA, 7, steps_per_epoch=2)
    handler = signal.getsignal(signal.SIGINT)
    fitter = trainer(tmp_path, [full_batch, Fails(hook, error)], max_epochs=2)
    try:
        with pytest.raises((ArithmeticError, SystemExit)):
            fitter.fit(module, loader)
        assert not left_behind(loader, module, full_batch)
    finally:
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(RuntimeError, match="gives only the first of them"):
        trainer(tmp_path).fit(Regression(), loader)
    again, expected = Regression(), Regression()
    trainer(tmp_path, [full_batch]).fit(again, loader)
    trainer(tmp_path, [FullBatch()]).fit(expected, FullBatchLoader(DATA, 7, steps_per_epoch=2))
    assert all_equal(again.parameters(), expected.parameters())


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "configure_optimizers"])
def test_failed_start_leaves_nothing_behind(hook, tmp_path):
    class Module(Regression):
        pass

    def fail(*args, **kwargs):
        raise ArithmeticError("failed")

    setattr(Module, hook, fail)
    full_batch, loader = FullBatch(take_over=True), FullBatchLoader(DATA, 7)
    fitter = trainer(tmp_path, [full_batch])
    with pytest.raises(ArithmeticError):
        fitter.fit(Module(), loader)
    module = Regression()
    fitter.fit(module, loader)
    assert fitter.global_step == 3
    assert not left_behind(loader, module, full_batch)


@pytest.mark.parametrize("stop", ["should_stop", "max_time", "EarlyStopping"])
def test_stopped_run_leaves_nothing_behind(stop, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 3

    callbacks = {
        "should_stop": [Stop()],
        "max_time": [Timer({"seconds": 0.2})],
        "EarlyStopping": [EarlyStopping("loss", stopping_threshold=1e9, check_on_train_epoch_end=True)],
    }
    module, full_batch = Regression(on_epoch=True), FullBatch()
    loader = FullBatchLoader(DATA, 7, steps_per_epoch=5)
    trainer(tmp_path, [full_batch, *callbacks[stop]], max_epochs=100_000, min_epochs=0).fit(module, loader)
    assert not left_behind(loader, module, full_batch)


@pytest.mark.parametrize("variant", ["irprop-", "irprop+"])
def test_optimizer_may_be_used_in_a_second_fit(variant, tmp_path):
    class Keeps(Regression):
        def __init__(self, fail_at):
            super().__init__()
            self.optimizer = Rprop(self.net.parameters(), variant=variant)
            self.fail_at = fail_at

        def configure_optimizers(self):
            return self.optimizer

        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == self.fail_at:
                raise ArithmeticError("failed")
            return super().training_step(batch, batch_idx)

    failing, whole = Keeps(2), Keeps(None)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, failing, 20, DATA)
    fit(tmp_path, whole, 20, DATA, steps=2)
    other = (DATA[0] * 2, DATA[1])
    for module in (failing, whole):
        module.fail_at, module.targets = None, []
        fit(tmp_path, module, 8, other, steps=3)
        assert len(module.targets) == 3 * 5
    assert all_equal(failing.parameters(), whole.parameters())


def test_failed_fit_ends_its_workers(tmp_path):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if len(self.targets) == 6:
                self.workers = set(children()) - before
                raise ArithmeticError("failed")
            return super().training_step(batch, batch_idx)

    for persistent in (True, False):
        how = {"num_workers": 1, "persistent_workers": persistent, "multiprocessing_context": "fork"}
        source = DataLoader(TensorDataset(*DATA), batch_size=10, **how)
        before = set(children())
        module = Failing()
        with pytest.raises(ArithmeticError, match="failed") as error:
            fit(tmp_path, module, None, source)
        assert module.workers
        assert set(children()) == before  # although the error still refers to the frames of the fit
        del error


def children():
    """Return the process ids of this thread's child processes."""
    gc.collect()
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as found:
        return [pid for pid in found.read().split() if os.path.exists(f"/proc/{pid}")]


def test_callback_copy_holds_no_fit(tmp_path):
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            copies.append(pickle.loads(pickle.dumps(trainer.callbacks[0])))

    full_batch = FullBatch(log_as="loss")
    trainer(tmp_path, [full_batch, Copy()], max_epochs=1).fit(Regression(), FullBatchLoader(DATA))
    assert isinstance(copies[0], FullBatch)
    assert copies[0]._fit is None
    assert copies[0].log_as == "loss"
    assert len(pickle.dumps(full_batch)) < 1000


def test_fit_restores_loader_and_optimizer(tmp_path):
    source = DataLoader(TensorDataset(*DATA), batch_size=20, num_workers=1, persistent_workers=True)
    loader = FullBatchLoader(source)
    fitter = trainer(tmp_path, [FullBatch()])
    fitter.fit(Regression(), loader)
    assert source._iterator is None  # as after a fit without FullBatch
    with pytest.raises(RuntimeError, match="gives only the first of them"):
        next(iter(loader))
    own = torch.tensor(3.0)
    assert fitter.optimizers[0].step(lambda: own) is own
