"""A run that is resumed, fails or is interrupted ends like an undisturbed run."""

import os
import random
import signal
import threading

import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lit import all_equal, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, make_data, network

from lightning_rprop import FullBatch, FullBatchLoader, Rprop
from lightning_rprop.full_batch._atomic_step import Interrupts

# Lightning warns about checkpoints of OnExceptionCheckpoint and about resuming without the callback that saved
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.mark.parametrize("make", [lambda p: Rprop(p, variant="irprop+"), lambda p: Rprop(p, max_iter=3)])
def test_resume_at_any_step_is_exact(make, tmp_path):
    every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = Regression(make)
    fit(tmp_path, whole, 10, steps=10, callbacks=[every], enable_checkpointing=True)
    for step in range(1, 10):
        resumed = Regression(make)
        fitter = fit(tmp_path, resumed, 10, steps=10, ckpt_path=tmp_path / f"step={step}.ckpt")
        evaluations = fitter.optimizers[0].param_groups[0]["max_iter"]
        assert len(resumed.gradients) == (10 - step) * evaluations
        assert all_equal(whole.parameters(), resumed.parameters())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("first", ["full", "plain"])
@pytest.mark.parametrize("second", ["full", "plain"])
def test_checkpoint_moves_to_another_loader(first, second, tmp_path):
    data = make_data(20)
    repeated = TensorDataset(*(t.repeat(5, 1) for t in data))  # five batches of all samples

    def part(kind, steps, callbacks=(), ckpt_path=None):
        callbacks = [*callbacks, *([FullBatch()] if kind == "full" else [])]
        loader = FullBatchLoader(data, steps_per_epoch=5) if kind == "full" else DataLoader(repeated, batch_size=20)
        fitter = trainer(tmp_path, callbacks, max_epochs=-1, max_steps=steps, enable_checkpointing=bool(callbacks))
        module = Regression()
        fitter.fit(module, loader, ckpt_path=ckpt_path)
        return module

    whole = part("full", 15)
    part(first, 10, [ModelCheckpoint(tmp_path, "half", every_n_train_steps=8, save_top_k=-1)])
    resumed = part(second, 15, ckpt_path=tmp_path / "half.ckpt")
    assert all_equal(resumed.parameters(), whole.parameters())


class Failing(Regression):
    """Fails in one call of training_step."""

    def __init__(self, make, fail_at, net=None):
        super().__init__(make, net=net)
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if len(self.targets) == self.fail_at:
            raise ArithmeticError("failed")
        return super().training_step(batch, batch_idx)


def normalized():
    return network(nn.BatchNorm1d(8))


@pytest.mark.filterwarnings("ignore:net.1 normalizes by the statistics of a micro-batch")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: Rprop(p),
        lambda p: Rprop(p, variant="irprop+", max_iter=3),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
    ids=["Rprop", "max_iter", "LBFGS"],
)
def test_exception_in_a_step_saves_whole_steps(make, tmp_path):
    whole = Regression(make, net=normalized())
    fit(tmp_path, whole, 26, steps=5)
    calls = len(whole.targets)
    for at in range(1, calls, 5):
        failing = Failing(make, at, normalized())
        saves = [OnExceptionCheckpoint(tmp_path, f"failed{at}")]
        with pytest.raises(ArithmeticError, match="failed"):
            fit(tmp_path, failing, 26, steps=5, callbacks=saves, enable_checkpointing=True)
        resumed = Regression(make, net=normalized())
        fit(tmp_path, resumed, 26, steps=5, ckpt_path=tmp_path / f"failed{at}.ckpt")
        saved, expected = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(saved[key], expected[key]) for key in expected), at


@pytest.mark.parametrize("max_iter", [1, 3])
def test_exception_after_a_step_keeps_the_step(max_iter, tmp_path):
    class Scheduled(Regression):
        fails = False

        def lr_scheduler_step(self, scheduler, metric):  # called after the step is counted, before the batch ends
            if self.fails and self.trainer.global_step == 3:
                raise ArithmeticError("failed")

        def configure_optimizers(self):
            optimizer = Rprop(self.parameters(), max_iter=max_iter)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    whole, failing, resumed = Scheduled(), Scheduled(), Scheduled()
    fit(tmp_path, whole, 26, steps=5)
    failing.fails = True
    saves = [OnExceptionCheckpoint(tmp_path, "failed")]
    with pytest.raises(ArithmeticError, match="failed"):
        fit(tmp_path, failing, 26, steps=5, callbacks=saves, enable_checkpointing=True)
    fit(tmp_path, resumed, 26, steps=5, ckpt_path=tmp_path / "failed.ckpt")
    assert len(resumed.gradients) == 2 * max_iter
    assert all_equal(whole.parameters(), resumed.parameters())


@pytest.mark.parametrize("plugins", [[], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]])
def test_ctrl_c_waits_for_the_end_of_the_step(plugins, tmp_path):
    class Interrupted(Rprop):
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)
            return result

    handler = signal.getsignal(signal.SIGINT)
    saves = [OnExceptionCheckpoint(tmp_path, "interrupted")]
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(tmp_path, Regression(Interrupted), 26, callbacks=saves, enable_checkpointing=True, plugins=plugins)
    finally:
        signal.signal(signal.SIGINT, handler)
    saved = torch.load(tmp_path / "interrupted.ckpt")
    assert saved["global_step"] == 1
    assert {state["step"].item() for state in saved["optimizer_states"][0]["state"].values()} == {1.0}


# Python drops an interrupt that arrives in a garbage collector callback, such as Hypothesis's, and only reports it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("max_iter", [1, 10])
def test_ctrl_c_at_any_moment_saves_whole_steps(max_iter, tmp_path):
    make = lambda p: Rprop(p, max_iter=max_iter)  # noqa: E731
    steps = 240 // max_iter
    whole = Regression(make)
    fit(tmp_path, whole, 50, steps=steps, per_epoch=37)
    moments = random.Random(0)
    interrupted = 0
    for attempt in range(8):
        path = tmp_path / f"interrupted{attempt}.ckpt"
        saves = [OnExceptionCheckpoint(tmp_path, path.stem)]
        timer = threading.Timer(moments.uniform(0.05, 0.5), os.kill, (os.getpid(), signal.SIGINT))
        handler = signal.getsignal(signal.SIGINT)
        try:
            timer.start()
            fit(tmp_path, Regression(make), 50, steps=steps, per_epoch=37, callbacks=saves, enable_checkpointing=True)
            timer.join()  # the interrupt may come after the fit
        except (SystemExit, KeyboardInterrupt):
            interrupted += 1
        finally:
            timer.cancel()
            signal.signal(signal.SIGINT, handler)
        if path.exists():
            resumed = Regression(make)
            fit(tmp_path, resumed, 50, steps=steps, per_epoch=37, ckpt_path=path)
            assert all_equal(whole.parameters(), resumed.parameters())
    assert interrupted >= 4


def test_second_ctrl_c_is_delivered_immediately():
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.release()
    interrupts.release()
