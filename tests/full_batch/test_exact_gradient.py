"""FullBatch computes the loss and gradient of the whole data set, whatever the micro-batches."""

import copy
from itertools import pairwise

import pytest
import torch
from fitting import DATA, Losses, fit, loop
from lightning.pytorch.plugins.precision import MixedPrecision
from lit import all_equal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, exact, network, relative_error

from lightning_rprop import FullBatch, Rprop


class Seen(Losses):
    """Also records the gradients and the order of hooks that a callback sees."""

    def __init__(self):
        super().__init__()
        self.gradients, self.calls = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.calls.append("backward")

    def on_after_backward(self, trainer, pl_module):
        self.calls.append("after")
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.calls.append("zero_grad")

    def on_train_batch_end(self, *args):
        self.calls.append("end")
        super().on_train_batch_end(*args)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [None, 1, 8, 50, 102, 103, 1000])
def test_any_micro_batch_size_is_exact(size, reduction, tmp_path):
    module = Regression(reduction=reduction)
    loss, gradient = exact(module.net, DATA)
    seen = Seen()
    fit(tmp_path, module, size, callbacks=[seen], full_batch=FullBatch(reduction))
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32 rounding
    assert all(all_equal(a, b) for a, b in zip(seen.gradients, module.gradients, strict=True))
    assert seen.losses[0] == pytest.approx(loss, rel=1e-6)  # float32 rounding


def test_single_batch_equals_plain_loop(tmp_path):
    module, plain, seen = Regression(), Regression(), Losses()
    fit(tmp_path, module, None, steps=200, callbacks=[seen])
    losses = loop(plain, 200)
    assert all_equal(module.parameters(), plain.parameters())
    assert seen.losses == losses


@pytest.mark.parametrize("size", [8, 50])
def test_long_run_follows_plain_loop(size, tmp_path):
    module, seen = Regression(), Losses()
    fit(tmp_path, module, size, steps=300, callbacks=[seen])
    losses = loop(Regression(), 300)
    # equal signs give equal parameters; the runs may part once a gradient is as small as its rounding error
    assert seen.losses[:50] == pytest.approx(losses[:50], rel=1e-5)
    assert seen.losses[-1] == pytest.approx(losses[-1], rel=0.05)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("size", [None, 10])
def test_lbfgs_always_evaluates_the_whole_set(line_search, size, tmp_path):
    def lbfgs(params):
        return torch.optim.LBFGS(params, lr=0.5, max_iter=10, line_search_fn=line_search)

    double = [t.double() for t in DATA]
    module, plain = (Regression(lbfgs, net=network().double()) for _ in range(2))
    seen = Losses()
    fit(tmp_path, module, size, steps=3, callbacks=[seen], data=double)
    losses = loop(plain, 3, double)
    if size is None:
        assert seen.losses == losses
        assert all_equal(module.parameters(), plain.parameters())
    else:  # float64 rounding, amplified by LBFGS
        assert seen.losses == pytest.approx(losses, rel=1e-8)


@pytest.mark.parametrize("variant", ["irprop-", "irprop+"])
def test_max_iter_takes_its_steps_in_one_batch(variant, tmp_path):
    often, once = (Regression(lambda p, k=k: Rprop(p, variant=variant, max_iter=k)) for k in (5, 1))
    seen = Seen()
    assert fit(tmp_path, often, 50, steps=4, callbacks=[seen]).global_step == 4
    fit(tmp_path, once, 50, steps=20)
    assert all_equal(often.parameters(), once.parameters())
    assert len(often.targets) == 4 * 5 * 3
    assert seen.calls == (["zero_grad", "backward", "after"] * 5 + ["end"]) * 4  # as without FullBatch


def test_step_that_calls_super_twice_steps_twice(tmp_path):
    class Twice(Rprop):
        def step(self, closure=None):
            def wrapped():
                return closure()

            super().step(wrapped)
            return super().step(closure)

    module, once = (Regression(lambda p, kind=kind: kind(p, variant="irprop+")) for kind in (Twice, Rprop))
    fit(tmp_path, module, 10, steps=4)
    fit(tmp_path, once, 10, steps=8)
    assert all_equal(module.parameters(), once.parameters())


def test_irprop_plus_gets_the_loss_of_all_samples(tmp_path):
    plus = lambda params: Rprop(params, lr=0.5, variant="irprop+")  # noqa: E731
    module, plain = Regression(plus), Regression(plus)
    fit(tmp_path, module, 7, steps=40)
    losses = loop(plain, 40)
    assert any(b > a for a, b in pairwise(losses))  # otherwise the loss would not matter
    assert all_equal(module.parameters(), plain.parameters())


@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}]
)
def test_clipping_sees_the_whole_gradient(clip, tmp_path):
    class Clipped(Regression):
        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            self.clipped.append([p.grad.clone() for p in self.parameters()])
            self.log("clipped", self.clipped[0][0].norm())

    for evaluations in (1, 3):
        # steps of 1e-30, so that all evaluations see the same gradient
        module = Clipped(lambda p, n=evaluations: Rprop(p, lr=1e-30, step_sizes=(1e-30, 1e-30), max_iter=n))
        module.clipped = []
        _, gradient = exact(module.net, DATA)
        fit(tmp_path, module, 10, steps=1, **clip)
        expected = [nn.Parameter(g) for g in gradient]
        for p, g in zip(expected, gradient, strict=True):
            p.grad = g.clone()
        if "gradient_clip_algorithm" in clip:
            nn.utils.clip_grad_value_(expected, 1e-3)
        else:
            nn.utils.clip_grad_norm_(expected, 0.1)
        assert len(module.clipped) == evaluations
        for clipped in module.clipped:
            assert relative_error(clipped, [p.grad for p in expected]) < 1e-6  # float32 rounding


class Penalized(Regression):
    """Adds the gradient of a penalty before the backward pass of the loss."""

    def on_before_backward(self, loss):
        self.net[0].weight.square().sum().backward()


class Keeping(Regression):
    """Keeps the gradients of every other step."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


def test_gradients_from_elsewhere_are_not_scaled(tmp_path):
    def sgd(params):
        return torch.optim.SGD(params, lr=0.05)

    data = [t[:20].double() for t in DATA]
    for kind in (Penalized, Keeping):
        ends = []
        for size in (None, 7):
            module = kind(sgd).double()
            fit(tmp_path, module, size, data, steps=4)
            ends.append(list(module.parameters()))
        for p, q in zip(*ends, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # float64 rounding; the sums differ in order


@pytest.mark.parametrize(("data", "size"), [(DATA, 10), (DataLoader(TensorDataset(*DATA), batch_size=10), None)])
def test_64_true_converts_every_micro_batch(data, size, tmp_path):
    module = Regression()
    _, gradient = exact(module.net, DATA)
    fit(tmp_path, module, size, data=data, precision="64-true")
    assert relative_error(module.gradients[0], gradient) < 1e-14  # float64 rounding


def test_bf16_mixed_agrees_with_one_batch(tmp_path):
    # bfloat16 rounds each sample's contribution to 2^-9, whatever the micro-batches
    gradients = []
    for size in (None, 10):
        module = Regression()
        fit(tmp_path, module, size, precision="bf16-mixed")
        gradients.append(module.gradients[0])
    assert relative_error(gradients[1], [g.double() for g in gradients[0]]) < 4e-3


def state_of(module):
    return module.optimizers().optimizer.state.values()


@pytest.mark.parametrize("variant", ["irprop-", "irprop+"])
def test_fp16_scaler_keeps_loss_and_gradient(variant, tmp_path):
    module, seen = Regression(lambda p: Rprop(p, variant=variant)), Losses()
    loss, gradient = exact(module.net, DATA)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fit(tmp_path, module, 10, steps=20, callbacks=[seen], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert relative_error(module.gradients[0], gradient) < 2e-3  # float16 rounding of each sample's contribution
    assert seen.losses[0] == pytest.approx(loss, rel=2e-3)
    assert seen.losses[-1] < 0.9 * loss
    if variant == "irprop+":
        state = next(iter(state_of(module)))
        assert state["prev_loss"].item() == pytest.approx(seen.losses[-1], rel=1e-6)


def test_scaler_overflow_skips_only_that_step(tmp_path):
    def overflow(steps):
        module = Regression(lambda p: Rprop(p, variant="irprop+"))
        start = copy.deepcopy(list(module.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        fit(tmp_path, module, 10, steps=steps, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return module, start

    module, start = overflow(1)
    assert all_equal(module.parameters(), start)  # infinite gradients: the scaler skips the step
    module, _ = overflow(3)
    assert [state["step"].item() for state in state_of(module)] == [2.0] * 4
