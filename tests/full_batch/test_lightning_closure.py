"""Every call of Lightning's closure evaluates the whole set and runs the usual hooks."""

import copy
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from fitting import DATA as FLOATS
from fitting import Losses
from fitting import fit as fit_steps
from lit import all_equal, trainer
from whole_set import Regression, exact, network, relative_error

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

DATA = tuple(t.double() for t in FLOATS)
SIZES = (None, 10)


def double():
    return network().double()


def fit(folder, module, size, callbacks=(), steps=6):
    fit_steps(folder, module, size, DATA, steps, callbacks, per_epoch=1)


def loop(make, switch_at, epochs=6):
    """Train in a plain loop that switches from Adam to a second optimizer; return the parameters."""
    net = double()
    x, y = DATA
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    for epoch in range(epochs):
        if epoch == switch_at:
            optimizer = make(net.parameters())
        optimizer.step(closure)
    return list(net.parameters())


SECOND = {
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=5),
    "max_iter": lambda params: Rprop(params, max_iter=5),
    "irprop+": lambda params: Rprop(params, lr=0.5, variant="irprop+"),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
}


def by_trainer(trainer, module, optimizer):
    trainer.optimizers = [optimizer]


def by_strategy(trainer, module, optimizer):
    trainer.strategy.optimizers = [optimizer]


def by_setup_optimizers(trainer, module, optimizer):
    module.make = lambda params: optimizer
    trainer.strategy.setup_optimizers(trainer)


class Switch(pl.Callback):
    """Replaces the optimizer in one hook, in epoch 2."""

    def __init__(self, make, how, hook):
        self.make, self.how, self.done = make, how, False
        setattr(self, hook, self.switch)

    def switch(self, trainer, module, *args):
        if trainer.current_epoch == 2 and not self.done:
            self.done = True
            self.how(trainer, module, self.make(module.parameters()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("how", [by_trainer, by_strategy, by_setup_optimizers])
def test_new_optimizer_gets_the_whole_set(how, second, size, tmp_path):
    module = Regression(lambda params: torch.optim.Adam(params, lr=1e-2), net=double())
    fit(tmp_path, module, size, [Switch(SECOND[second], how, "on_train_epoch_start")])
    expected = loop(SECOND[second], 2)
    if size is None:
        assert all_equal(module.parameters(), expected)
    else:  # float64 rounding, amplified by LBFGS and Adam
        for p, q in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_optimizer_may_change_within_a_step(hook, tmp_path):
    module = Regression(lambda params: torch.optim.Adam(params, lr=1e-2), net=double())
    fit(tmp_path, module, None, [Switch(SECOND["LBFGS"], by_trainer, hook)])
    # Lightning chooses the optimizer of a step between the two hooks
    expected = loop(SECOND["LBFGS"], 2 if hook == "on_train_batch_start" else 3)
    if hook == "on_train_batch_start":
        assert all_equal(module.parameters(), expected)
    else:
        for p, q in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q)


def test_two_new_optimizers_are_refused(tmp_path):
    class Two(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.optimizers = [Rprop(module.parameters()), Rprop(module.parameters())]

    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"needs one optimizer.*has 2"):
        fit(tmp_path, Regression(net=double()), None, [Two()])


class Sam(Regression):
    """Sharpness-aware minimization: steps with the gradient of a point uphill."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.first = optimizer_closure().item()
        moved = [0.05 * p.grad / p.grad.norm() for p in self.parameters()]
        with torch.no_grad():
            for p, e in zip(self.parameters(), moved, strict=True):
                p.add_(e)
        self.second = optimizer_closure().item()
        self.gradient = [p.grad.clone() for p in self.parameters()]
        self.uphill = [copy.deepcopy(self.net)]  # in a list, so that it is not registered as a submodule
        with torch.no_grad():
            for p, e in zip(self.parameters(), moved, strict=True):
                p.sub_(e)
        optimizer.step(optimizer_closure)


@pytest.mark.parametrize("size", SIZES)
def test_every_closure_call_sees_the_whole_set(size, tmp_path):
    module = Sam(net=double())
    fit(tmp_path, module, size, steps=1)
    assert module.first == pytest.approx(exact(double(), DATA)[0], rel=1e-12)
    loss, gradient = exact(module.uphill[0], DATA)
    assert module.second == pytest.approx(loss, rel=1e-12)
    assert relative_error(module.gradient, gradient) < 1e-12  # float64 rounding
    assert len(module.targets) == 3 * (1 if size is None else 11)


class Masking(Regression):
    """Keeps one entry of the first weight fixed by zeroing its gradient in a hook."""

    def __init__(self, make, hook):
        super().__init__(make, net=double())
        self.calls = 0
        setattr(self, hook, self.mask)

    def mask(self, *args, **kwargs):
        self.calls += 1
        self.net[0].weight.grad[0, 0] = 0

    def on_before_optimizer_step(self, optimizer):
        pass


class MaskingCallback(pl.Callback):
    def __init__(self, hook):
        setattr(self, hook, lambda trainer, module, *args: module.mask())


@pytest.mark.parametrize("make", [SECOND["LBFGS"], SECOND["max_iter"], Rprop])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"])
def test_hooks_may_change_every_gradient(hook, size, make, tmp_path):
    owners = ["module"] if hook == "configure_gradient_clipping" else ["module", "callback"]
    for owner in owners:
        module = Masking(make, hook if owner == "module" else "unused")
        start = module.net[0].weight.detach().clone()
        fit(tmp_path, module, size, [MaskingCallback(hook)] if owner == "callback" else [])
        assert torch.equal(module.net[0].weight[0, 0], start[0, 0])
        assert not torch.equal(module.net[0].weight, start)
        evaluations = len(module.targets) / (1 if size is None else 11)
        assert module.calls == evaluations


def test_hooks_run_in_lightning_order(tmp_path):
    names = ("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward")
    names += ("on_before_optimizer_step", "configure_gradient_clipping")

    def calls(loader, callbacks):
        seen = []

        class Module(Regression):
            def training_step(self, batch, batch_idx):
                seen.append("training_step")
                return super().training_step(batch, batch_idx)

        for name in names:

            def hook(self, *args, name=name, **kwargs):
                seen.append(name)
                return getattr(super(Module, self), name)(*args, **kwargs)

            setattr(Module, name, hook)
        module = Module(lambda params: Rprop(params, max_iter=2), net=double())
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader)
        return seen

    whole = FullBatchLoader(DATA)
    assert calls(whole, [FullBatch()]) == calls(whole, [])  # without micro-batches the loader needs no FullBatch


def test_batch_changed_by_a_hook_stays_changed(tmp_path):
    class Shift(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batch[0] = batch[0] + 1  # changes the list, not the held tensor

    x, y = DATA
    module = Regression(SECOND["LBFGS"], net=double())
    fitter = trainer(tmp_path, [Shift(), FullBatch()], max_epochs=3)
    fitter.fit(module, FullBatchLoader([x, y]))
    net = double()
    optimizer = SECOND["LBFGS"](net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (net(x + 1) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert all_equal(module.parameters(), net.parameters())


def test_loss_falls_after_switching_to_lbfgs(tmp_path):
    seen = Losses()
    module = Regression(lambda params: torch.optim.Adam(params, lr=1e-2), net=double())
    switch = Switch(SECOND["LBFGS"], by_trainer, "on_train_epoch_start")
    fit(tmp_path, module, 10, [switch, seen], steps=8)
    assert all(b < a for a, b in pairwise(seen.losses))  # LBFGS diverges if it sees only the first micro-batch


def test_transfer_hooks_see_every_micro_batch(tmp_path):
    class Transferring(Regression):
        calls = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.calls += ("before",)
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls += ("after",)
            return [batch[0] + 1, batch[1]]

    module = Transferring()
    _, gradient = exact(module.net, (FLOATS[0] + 1, FLOATS[1]))
    fit_steps(tmp_path, module, 50, steps=2)
    assert module.calls == ("before", "after") * 6
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32 rounding


def test_base_class_named_like_lightnings_counts(tmp_path):
    class LightningModule(Regression):
        calls = 0

        def on_after_backward(self):
            LightningModule.calls += 1

    class Derived(LightningModule):
        pass

    fit_steps(tmp_path, Derived(), steps=4)
    assert LightningModule.calls == 4
