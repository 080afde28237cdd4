"""KeepBest: the ends of a fit, what others see, what it follows, and the setups that it refuses."""

import copy
import gc
import pickle
import signal
import weakref

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from fitting import DATA, fit
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lit import Recorder, all_equal, trainer
from torch import nn
from whole_set import Regression, network

from lightning_rprop import FullBatch, FullBatchLoader, KeepBest, Rprop

# Lightning warns about checkpoints of OnExceptionCheckpoint and about resuming without the callback that saved
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def rising(params):
    """Return an optimizer that first finds lower losses and then higher ones."""
    return torch.optim.SGD(params, lr=0.05)


class Rising(Regression):
    """Raises its loss from a step on, and records parameters, buffers and losses of each evaluation."""

    def __init__(self, make=rising, turn=4, net=None):
        super().__init__(make, net=net)
        self.turn = turn
        self.seen, self.losses = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        loss = loss if self.trainer.global_step < self.turn else 9 - loss
        self.losses.append(loss.item())
        self.seen.append([value.detach().clone() for value in self.state_dict().values()])
        return loss

    def best(self):
        return self.losses.index(min(self.losses))

    def ends_at_its_best(self):
        return all_equal(self.state_dict().values(), self.seen[self.best()])


class Ending(pl.Callback):
    """Does something when a step begins; keeps the parameters that other callbacks see at the end."""

    def __init__(self, step=None, action=None):
        self.step, self.action, self.end = step, action, None

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.action(trainer)

    def on_train_end(self, trainer, pl_module):
        self.end = [param.detach().clone() for param in pl_module.parameters()]

    def on_exception(self, trainer, pl_module, exception):
        self.on_train_end(trainer, pl_module)


def fail(trainer):
    raise ArithmeticError("failed")


def run_out_of_time(trainer):
    trainer.should_stop = True


ENDS = {
    "steps": (None, None),
    "stopped": (None, run_out_of_time),
    "exception": (ArithmeticError, fail),
    "Ctrl-C": ((SystemExit, KeyboardInterrupt), lambda trainer: signal.raise_signal(signal.SIGINT)),
}


@pytest.mark.parametrize("net", [network, lambda: network(nn.BatchNorm1d(8))], ids=["plain", "buffers"])
@pytest.mark.parametrize("end", ENDS)
def test_every_end_restores_the_best(end, net, tmp_path):
    error, action = ENDS[end]
    keep, module, other = KeepBest(), Rising(net=net()), Ending(8, action or (lambda trainer: None))
    saves = [
        ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1),
        OnExceptionCheckpoint(tmp_path, "failed"),
    ]
    handler = signal.getsignal(signal.SIGINT)
    fits = lambda: fit(tmp_path, module, None, steps=10, callbacks=[keep, other, *saves], enable_checkpointing=True)  # noqa: E731
    if error is None:
        fits()
    else:
        with pytest.raises(error):
            fits()
        signal.signal(signal.SIGINT, handler)
    assert 0 < module.best() < len(module.losses) - 1
    assert module.ends_at_its_best()
    assert (keep.best_loss, keep.best_step) == (min(module.losses), module.best())
    path = tmp_path / ("last.ckpt" if error is None else "failed.ckpt")  # the state that resumes
    saved = torch.load(path, weights_only=True)
    assert all(
        torch.equal(saved["state_dict"][name], other.end[i]) for i, (name, _) in enumerate(module.named_parameters())
    )
    assert not all_equal(other.end, module.parameters())
    assert saved["callbacks"]["KeepBest"]["step"] == module.best()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    "make", [rising, lambda p: Rprop(p, lr=0.02, max_iter=3), lambda p: torch.optim.LBFGS(p, 0.1, 3)]
)
def test_resume_ends_as_the_whole_run(make, tmp_path):
    net = lambda: network(nn.BatchNorm1d(8))  # noqa: E731
    every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, keep = Rising(make, net=net()), KeepBest()
    fit(tmp_path, whole, None, steps=8, callbacks=[keep, every], enable_checkpointing=True)
    assert 0 < keep.best_step < 7
    for step in range(1, 9):  # the last one resumes at the end
        module, again = Rising(make, net=net()), KeepBest()
        fit(tmp_path, module, None, steps=8, callbacks=[again], ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all_equal(module.state_dict().values(), whole.state_dict().values()), step
        assert (again.best_loss, again.best_step) == (keep.best_loss, keep.best_step), step


def test_restore_false_only_reports(tmp_path):
    module, keep, other = Rising(), KeepBest(restore=False), Ending()
    fit(tmp_path, module, None, steps=8, callbacks=[keep, other])
    assert all_equal(module.parameters(), other.end)
    assert (keep.best_loss, keep.best_step) == (min(module.losses), module.best())


class Validated(Rising):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", (self.net(batch[0]) - batch[1]).square().mean())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_later_stages_change_nothing(tmp_path):
    module, keep = Validated(), KeepBest()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fitter = fit(tmp_path, module, None, steps=8, callbacks=[keep, saves], enable_checkpointing=True)
    found = keep.best_loss, keep.best_step
    test = lambda **options: fitter.test(module, FullBatchLoader(DATA), verbose=False, **options)[0]["test_loss"]  # noqa: E731
    assert test() == pytest.approx(found[0], rel=1e-6)  # a mean in float32
    assert test(ckpt_path=tmp_path / "step=2.ckpt") > found[0]
    assert (keep.best_loss, keep.best_step) == found
    again = Rising(turn=2)
    fit(tmp_path, again, None, steps=3, callbacks=[keep])  # afresh, though its losses are higher
    assert again.ends_at_its_best()
    assert (keep.best_loss, keep.best_step) == (min(again.losses), 1) > found


class Watcher(pl.Callback):
    """Records ``best/loss`` as other callbacks see it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(trainer.callback_metrics["best/loss"].item())


@pytest.mark.parametrize("per_epoch", [1, 3])
@pytest.mark.parametrize("max_iter", [1, 2])
def test_best_loss_is_logged_in_each_step(per_epoch, max_iter, tmp_path):
    module, logger, watcher = Rising(lambda p: Rprop(p, max_iter=max_iter)), Recorder(), Watcher()
    saves = ModelCheckpoint(tmp_path, monitor="best/loss", every_n_train_steps=1, save_top_k=1)
    callbacks = [watcher, KeepBest(), EarlyStopping("best/loss", patience=9), saves]
    fit(
        tmp_path, module, None, steps=6, callbacks=callbacks, per_epoch=per_epoch,
        full_batch=FullBatch(log_as='now'), enable_checkpointing=True, logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    lowest = [min(module.losses[: max_iter * (i + 1)]) for i in range(6)]
    assert watcher.seen == lowest
    records = [(step, metrics) for step, metrics in logger.calls if "best/loss" in metrics]
    assert [step for step, _ in records] == [*range(6)]
    assert [metrics["best/loss"] for _, metrics in records] == pytest.approx(lowest)  # loggers get float32
    assert all("now" in metrics for _, metrics in records)  # in the same call as Lightning's own values
    assert saves.best_model_score.item() == lowest[-1]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_exception"])
def test_copies_leave_the_model_out(hook, tmp_path):
    class Copying(pl.Callback):
        copies = ()

        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 5:
                pickled = pickle.dumps(keep)
                assert len(pickled) < 1000  # no parameters
                self.copies = copy.deepcopy(keep), pickle.loads(pickled)
                if hook == "on_exception":
                    fail(trainer)

    module, keep, copying = Rising(), KeepBest(), Copying()
    watched = [weakref.ref(param) for param in module.parameters()]
    try:
        fit(tmp_path, module, None, steps=8, callbacks=[keep, copying])
    except ArithmeticError:
        assert hook == "on_exception"
    for copied in copying.copies:
        assert (copied.best_loss, copied.best_step) == (min(module.losses[:5]), 3)
    assert len(copying.copies) == 2
    del module, copying  # Lightning has bound the callback's log to the module
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_highest_loss_is_best_when_maximized(tmp_path):
    class Falling(Rising):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)

    module, keep = Falling(lambda p: torch.optim.SGD(p, lr=0.05, maximize=True)), KeepBest()
    assert (keep.best_loss, keep.best_step) == (float("inf"), None)
    fit(tmp_path, module, None, steps=8, callbacks=[keep])
    assert module.ends_at_its_best()
    assert (keep.best_loss, keep.best_step) == (-min(module.losses), module.best())


def test_new_optimizer_and_layers_are_followed(tmp_path):
    class Growing(Rising):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net.append(nn.Linear(1, 1))
                nn.init.ones_(self.net[-1].weight)
                nn.init.zeros_(self.net[-1].bias)
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.01)]

    module, keep = Growing(turn=7), KeepBest()
    fit(tmp_path, module, None, steps=10, callbacks=[keep], per_epoch=3)
    assert module.best() > 3
    assert len(module.seen[module.best()]) == 6
    assert module.ends_at_its_best()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pytorch_lightning_trainer_works(tmp_path):
    class Plain(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.losses = network(), []

        def training_step(self, batch, batch_idx):
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return Rprop(self.parameters(), lr=0.5)

    module, keep = Plain(), KeepBest()
    fitter = trainer(tmp_path, [keep, FullBatch()], pytorch_lightning, max_epochs=5)
    fitter.fit(module, FullBatchLoader(DATA))
    assert (module.net(DATA[0]) - DATA[1]).square().mean().item() == keep.best_loss == min(module.losses)
    assert fitter.callback_metrics["best/loss"].item() == keep.best_loss


def test_no_evaluation_restores_nothing(tmp_path):
    class Skipping(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    module, keep = Skipping(), KeepBest()
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match="KeepBest restores no weights, because no evaluation gave a finite loss"):
        fit(tmp_path, module, None, max_epochs=1, steps=-1, callbacks=[keep])
    assert all_equal(module.state_dict().values(), before.values())
    assert (keep.best_loss, keep.best_step) == (float("inf"), None)


def test_empty_fit_forgets_the_one_before(tmp_path):
    keep = KeepBest()
    fit(tmp_path, Regression(), None, callbacks=[keep])
    assert keep.best_step is not None
    fit(tmp_path, Regression(), None, steps=0, callbacks=[keep])
    assert (keep.best_loss, keep.best_step) == (float("inf"), None)
