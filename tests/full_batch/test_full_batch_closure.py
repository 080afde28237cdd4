"""Every call of Lightning's closure evaluates the whole set, whoever makes it, with the hooks that Lightning runs."""

import copy
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lit import all_equal, trainer
from torch import nn
from whole_set import Regression, exact, make_data, relative_error

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

DATA = tuple(t.double() for t in make_data(103))
SIZES = (None, 10)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def fit(folder, module, size, callbacks=(), epochs=6, **options):
    fitter = trainer(folder, [*callbacks, FullBatch(**options)], max_epochs=epochs)
    fitter.fit(module, FullBatchLoader(DATA, size))
    return fitter


def loop(net, make, switch_at, epochs=6):
    """The loop by hand, with the second optimizer from one epoch on."""
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
    """Replaces the optimizer at one hook, in epoch 2."""

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
def test_replaced_optimizer_gets_the_whole_set(how, second, size, tmp_path):
    module = Regression(lambda params: torch.optim.Adam(params, lr=1e-2), net=network())
    fit(tmp_path, module, size, [Switch(SECOND[second], how, "on_train_epoch_start")])
    expected = loop(network(), SECOND[second], 2)
    if size is None:
        assert all_equal(module.parameters(), expected)
    else:  # float64's rounding, which LBFGS and Adam amplify
        for p, q in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_optimizer_replaced_within_a_step(hook, tmp_path):
    module = Regression(lambda params: torch.optim.Adam(params, lr=1e-2), net=network())
    fit(tmp_path, module, None, [Switch(SECOND["LBFGS"], by_trainer, hook)])
    # Lightning has chosen the step's optimizer when the second hook is called
    expected = loop(network(), SECOND["LBFGS"], 2 if hook == "on_train_batch_start" else 3)
    if hook == "on_train_batch_start":
        assert all_equal(module.parameters(), expected)
    else:
        for p, q in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q)


def test_replacement_by_two_optimizers_is_an_error(tmp_path):
    class Two(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.optimizers = [Rprop(module.parameters()), Rprop(module.parameters())]

    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"needs one optimizer.*has 2"):
        fit(tmp_path, Regression(net=network()), None, [Two()])


class Sam(Regression):
    """Sharpness-aware minimization: the gradient at a point further up decides."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.first = optimizer_closure().item()
        moved = [0.05 * p.grad / p.grad.norm() for p in self.parameters()]
        with torch.no_grad():
            for p, e in zip(self.parameters(), moved, strict=True):
                p.add_(e)
        self.second = optimizer_closure().item()
        self.gradient = [p.grad.clone() for p in self.parameters()]
        self.there = [copy.deepcopy(self.net)]  # not as a module of this one
        with torch.no_grad():
            for p, e in zip(self.parameters(), moved, strict=True):
                p.sub_(e)
        optimizer.step(optimizer_closure)


@pytest.mark.parametrize("size", SIZES)
def test_closure_called_twice_evaluates_the_whole_set_twice(size, tmp_path):
    module = Sam(net=network())
    fit(tmp_path, module, size, epochs=1)
    assert module.first == pytest.approx(exact(network(), DATA)[0], rel=1e-12)
    loss, gradient = exact(module.there[0], DATA)
    assert module.second == pytest.approx(loss, rel=1e-12)
    assert relative_error(module.gradient, gradient) < 1e-12  # float64's rounding
    assert len(module.targets) == 3 * (1 if size is None else 11)


class Masking(Regression):
    """One weight of the first layer is to stay where it is."""

    def __init__(self, make, hook):
        super().__init__(make, net=network())
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
def test_hooks_change_gradients_at_each_evaluation(hook, size, make, tmp_path):
    owners = ["module"] if hook == "configure_gradient_clipping" else ["module", "callback"]
    for owner in owners:
        module = Masking(make, hook if owner == "module" else "unused")
        start = module.net[0].weight.detach().clone()
        fit(tmp_path, module, size, [MaskingCallback(hook)] if owner == "callback" else [])
        assert torch.equal(module.net[0].weight[0, 0], start[0, 0])
        assert not torch.equal(module.net[0].weight, start)
        evaluations = len(module.targets) / (1 if size is None else 11)
        assert module.calls == evaluations


def test_hooks_run_in_lightnings_order(tmp_path):
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
        module = Module(lambda params: Rprop(params, max_iter=2), net=network())
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader)
        return seen

    whole = FullBatchLoader(DATA)
    assert calls(whole, [FullBatch()]) == calls(whole, [])  # which gives all of the data without FullBatch, too


def test_batch_changed_in_a_hook_is_evaluated_each_time(tmp_path):
    class Shift(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batch[0] = batch[0] + 1  # a list: Lightning's batch, not the held data

    x, y = DATA
    module = Regression(SECOND["LBFGS"], net=network())
    fitter = trainer(tmp_path, [Shift(), FullBatch()], max_epochs=3)
    fitter.fit(module, FullBatchLoader([x, y]))
    net = network()
    optimizer = SECOND["LBFGS"](net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (net(x + 1) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert all_equal(module.parameters(), net.parameters())


def test_losses_fall_after_a_switch_to_lbfgs(tmp_path):
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    module = Regression(lambda params: torch.optim.Adam(params, lr=1e-2), net=network())
    switch = Switch(SECOND["LBFGS"], by_trainer, "on_train_epoch_start")
    fit(tmp_path, module, 10, [switch, Losses()], epochs=8)
    assert all(b < a for a, b in pairwise(losses))  # with the first micro-batch alone LBFGS diverges
