"""After an exception weights, state and buffers are those of whole steps, and nothing of the fit is left behind."""

import copy
import gc
import os
import pickle
import signal
import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint, Timer
from lightning.pytorch.plugins.precision import MixedPrecision
from lit import all_equal, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

DATA = make_data(40)

# what Lightning says to those who save on an exception, and to those who resume without the callback that saved
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.* normalizes by the statistics of a micro-batch"),
]


def fit(folder, module, loader=None, callbacks=(), steps=10, ckpt_path=None, **options):
    options = {"max_steps": steps, "max_epochs": -1} | options
    fitter = trainer(folder, [*callbacks, FullBatch()], **options)
    fitter.fit(module, loader or FullBatchLoader(DATA, 20, steps_per_epoch=5), ckpt_path=ckpt_path)
    return fitter


def everything(module):
    """All that a resumed run depends on, copied."""
    state = module.optimizers().optimizer.state_dict() if module._trainer is not None else {}
    return copy.deepcopy((module.state_dict(), state))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Breaking(Regression):
    """It fails in one call of training_step, and keeps what it was before each step."""

    def __init__(self, fail_at=None, make=Rprop):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        super().__init__(make, net=net)
        self.fail_at = fail_at
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("extremes", None, persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].train(self.current_epoch > 0)  # frozen at first
        self.before = everything(self), copy.deepcopy(dict(self.named_buffers()))

    def training_step(self, batch, batch_idx):
        if len(self.targets) == self.fail_at:
            raise ArithmeticError("broken off")
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(dim=0)  # assigned, not changed in place
        if self.current_epoch > 0:
            self.extremes = batch[0].amax(dim=0)  # which was None
        self.count += 1
        return super().training_step((batch[0] - self.mean, batch[1]), batch_idx)


MAKES = {
    "Rprop": Rprop,
    "max_iter": lambda params: Rprop(params, variant="irprop+", max_iter=3),
    "Adam": torch.optim.Adam,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("make", MAKES)
def test_every_buffer_is_put_back(make, tmp_path):
    whole = Breaking(make=MAKES[make])
    fit(tmp_path, whole)
    calls = len(whole.targets)
    for at in range(1, calls, max(1, calls // 4)):
        broken = Breaking(at, MAKES[make])
        saves = [OnExceptionCheckpoint(tmp_path, f"{make}-{at}")]
        with pytest.raises(ArithmeticError):
            fit(tmp_path, broken, callbacks=saves, enable_checkpointing=True)
        state, buffers = broken.before
        assert same(everything(broken), state)
        assert same(dict(broken.named_buffers()), buffers)
        resumed = Breaking(make=MAKES[make])
        fit(tmp_path, resumed, ckpt_path=tmp_path / f"{make}-{at}.ckpt")
        assert same(everything(resumed), everything(whole)), at


@pytest.mark.parametrize("make", MAKES)
def test_exception_behind_the_move_undoes_it(make, tmp_path):
    class Behind(Breaking):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 7:
                raise ArithmeticError("behind the move")

    module = Behind(make=MAKES[make])
    with pytest.raises(ArithmeticError, match="behind the move"):
        fit(tmp_path, module)
    assert same(everything(module), module.before[0])
    resumed, whole = Breaking(make=MAKES[make]), Breaking(make=MAKES[make])
    behind = Behind(make=MAKES[make])
    with pytest.raises(ArithmeticError):
        fit(tmp_path, behind, callbacks=[OnExceptionCheckpoint(tmp_path, "behind")], enable_checkpointing=True)
    fitter = fit(tmp_path, resumed, ckpt_path=tmp_path / "behind.ckpt")
    fit(tmp_path, whole)
    assert fitter.global_step == 10
    assert same(everything(resumed), everything(whole))


@pytest.mark.parametrize("fails_at", [0, 4])
def test_half_made_move_is_undone(fails_at, tmp_path):
    class OutOfMemory(Rprop):
        steps = 0

        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            if self.steps == fails_at:
                half = self.param_groups[0]["params"][:2]
                for p in half:  # some have moved, are counted, and have a state
                    p.data.add_(1)
                    self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
                raise torch.OutOfMemoryError("out of memory")
            self.steps += 1
            super().step()

    module = Breaking(make=OutOfMemory)
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, module)
    assert same(everything(module), module.before[0])
    assert bool(module.optimizers().optimizer.state) == (fails_at > 0)


def test_grad_scaler_is_put_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    class Behind(Regression):
        def optimizer_step(self, *args, **kwargs):
            self.before = scaler.state_dict()
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 5:
                raise ArithmeticError("behind the move")

    module = Behind()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.state_dict() == module.before
    assert module.before["scale"] > 2.0**10


def left_behind(loader, module, full_batch):
    """What a fit has left: hooks, a served loader, Lightning's closure replaced."""
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
def test_nothing_is_left_behind(hook, error, tmp_path):
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
def test_failing_start_leaves_nothing_behind(hook, tmp_path):
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
def test_run_that_is_stopped_leaves_nothing_behind(stop, tmp_path):
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
def test_second_fit_with_the_same_optimizer(variant, tmp_path):
    class Keeps(Regression):
        def __init__(self, fail_at):
            super().__init__()
            self.optimizer = Rprop(self.net.parameters(), variant=variant)
            self.fail_at = fail_at

        def configure_optimizers(self):
            return self.optimizer

        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == self.fail_at:
                raise ArithmeticError("broken off")
            return super().training_step(batch, batch_idx)

    broken, whole = Keeps(2), Keeps(None)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, broken)
    fit(tmp_path, whole, steps=2)
    other = (DATA[0] * 2, DATA[1])
    for module in (broken, whole):
        module.fail_at, module.targets = None, []
        fit(tmp_path, module, FullBatchLoader(other, 8), steps=3)
        assert len(module.targets) == 3 * 5
    assert all_equal(broken.parameters(), whole.parameters())


def test_workers_end_with_an_exception(tmp_path):
    source = DataLoader(TensorDataset(*DATA), batch_size=10, num_workers=1, persistent_workers=True)
    for workers in (source, DataLoader(TensorDataset(*DATA), batch_size=10, num_workers=1)):
        before = set(children())
        module = Breaking(fail_at=6)
        with pytest.raises(ArithmeticError, match="broken off") as error:
            fit(tmp_path, module, FullBatchLoader(workers))
        assert error.traceback  # whose frames are still there
        assert set(children()) == before


def children():
    gc.collect()
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as found:
        return [pid for pid in found.read().split() if os.path.exists(f"/proc/{pid}")]


def test_callback_holds_no_fit_in_copies(tmp_path):
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
