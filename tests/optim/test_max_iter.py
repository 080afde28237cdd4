"""The option max_iter: several steps in one call, and the errors of unsuitable closures."""

import pytest
import torch
from cases import VARIANTS
from lit import Batches, Net, all_equal, trainer
from tapes import INF, NAN, descend

from lightning_rprop import Rprop


@pytest.mark.parametrize("variant", VARIANTS)
def test_max_iter_makes_that_many_steps(variant):
    expected, one, _, losses = descend(variant, 12)
    w, optimizer, _, first = descend(variant, 3, max_iter=4)
    assert torch.equal(w, expected)
    assert first == losses[0::4]
    assert optimizer.state[w]["step"] == one.state[expected]["step"] == 12


@pytest.mark.parametrize("set_to_none", [True, False])
def test_max_iter_accepts_both_zero_grad_modes(set_to_none):
    expected, *_ = descend("irprop-", 8)
    w, optimizer, closure, _ = descend("irprop-", 0, max_iter=4)

    def zeroing_closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        zero_grad = optimizer.zero_grad
        optimizer.zero_grad = lambda: None
        try:
            return closure()
        finally:
            optimizer.zero_grad = zero_grad

    for _ in range(2):
        optimizer.step(zeroing_closure)
    assert torch.equal(w, expected)


def test_max_iter_demands_a_closure():
    w, optimizer, closure, _ = descend("irprop-", 0, max_iter=3)
    before = w.detach().clone()
    loss = closure()
    for call in (optimizer.step, lambda: optimizer.step(closure, loss=loss), lambda: optimizer.step(loss=loss)):
        with pytest.raises(RuntimeError, match=r"max_iter=3 .* Call step\(closure\) .* use max_iter=1 .*GradScaler"):
            call()
    assert torch.equal(w, before)


def test_max_iter_rejects_grad_scaler():
    w, optimizer, _, _ = descend("irprop-", 0, max_iter=3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(w.square().sum()).backward()
    with pytest.raises(RuntimeError, match="max_iter=3"):
        scaler.step(optimizer)


@pytest.mark.parametrize("kind", ["accumulates", "does nothing"])
def test_max_iter_rejects_closure_without_zero(kind):
    w, optimizer, _, _ = descend("irprop-", 2, max_iter=2)
    before, grad = w.detach().clone(), w.grad

    def wrong():
        if kind == "accumulates":
            loss = w.square().sum()
            loss.backward()
            return loss
        return w.square().sum()

    with pytest.raises(
        RuntimeError, match=r"max_iter=2 .* did not zero the gradients\. .* accumulation .* use max_iter=1"
    ):
        optimizer.step(wrong)
    assert torch.equal(w, before)
    assert w.grad is grad
    assert optimizer.state[w]["step"] == 4


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_max_iter_accepts_nan_gradients(factor, set_to_none):
    """The check sets the gradients to infinity before the closure, so zeroing them in place must not leave NaN."""
    w, optimizer, _, _ = descend("irprop-", 2, max_iter=2, retreat=False)
    before = w.detach().clone()

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = (w.square().sum() * 0 + 1) * factor
        (loss + w.sum() * NAN).backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(factor, nan_ok=True)
    assert torch.equal(w, before)
    assert w.grad.isnan().all()


def test_max_iter_keeps_gradient_if_closure_fails():
    w, optimizer, _, _ = descend("irprop-", 1, max_iter=2)
    grad = w.grad

    def failing():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    assert w.grad is grad


@pytest.mark.parametrize("how", ["zero_grad", "autograd.grad", "None"])
def test_max_iter_skips_unused_parameters(how):
    """One parameter is frozen, another is not part of the loss."""
    used, unused, frozen = torch.ones(3, requires_grad=True), torch.ones(1, requires_grad=True), torch.zeros(1)
    optimizer = Rprop([used, unused, frozen], max_iter=2, lr=0.25, etas=(0.5, 2.0))

    def closure():
        loss = used.square().sum()
        if how == "autograd.grad":
            (used.grad,) = torch.autograd.grad(loss, used)
            return loss
        if how == "zero_grad":
            optimizer.zero_grad()
        else:
            used.grad = None
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert used.tolist() == [1 - 0.25 - 0.5] * 3
    assert unused.tolist() == [1.0]
    assert unused.grad is None
    assert frozen.grad is None


def test_lr_0_does_not_waive_the_closure():
    for options in ({"max_iter": 3}, {"variant": "irprop+"}):
        w = torch.ones(1, requires_grad=True)
        w.grad = torch.ones(1)
        with pytest.raises(RuntimeError, match="Call step"):
            Rprop([w], lr=0.0, **options).step()
        assert w.item() == 1.0


def test_max_iter_must_be_equal_in_all_groups():
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="max_iter must be the same in all parameter groups, got 3 after 1"):
        Rprop([{"params": a}, {"params": b, "max_iter": 3}])


@pytest.mark.parametrize(("manual", "accumulate"), [(False, 1), (False, 2), (True, 1)])
def test_max_iter_works_in_lightning(manual, accumulate, tmp_path):
    def make(module):
        return Rprop(module.parameters(), lr=0.1, max_iter=5)

    def plain(module):
        return Rprop(module.parameters(), lr=0.1)

    fit = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    module = Net(make, manual)
    if manual or accumulate > 1:
        with pytest.raises(RuntimeError, match=r"max_iter=5 .* did not zero the gradients"):
            fit.fit(module, Batches(2))
        return
    fit.fit(module, Batches(2))
    whole = Net(plain)
    trainer(tmp_path, max_epochs=1).fit(whole, Batches(20))
    assert all_equal(module.parameters(), whole.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_max_iter_accepts_partial_nan_gradients(set_to_none, dtype):
    p, q = torch.nn.Parameter(torch.ones(2, dtype=dtype)), torch.nn.Parameter(torch.zeros(2))
    optimizer = Rprop([p, q], max_iter=3)
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = p.abs().square().sum() + torch.where(q > 0, q.sqrt(), torch.zeros(())).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert q.grad.isnan().all()
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_max_iter_rejects_accumulation(dtype):
    p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = Rprop([p], max_iter=3)
    before = p.grad = torch.full_like(p, 5)

    def closure():
        loss = p.abs().square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="did not zero the gradients"):
        optimizer.step(closure)
    assert p.grad is before
    assert (before == 5).all()
