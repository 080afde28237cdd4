"""Losses of members that do not fit the parameters: errors that change nothing, and results that are no losses."""

import pickle

import pytest
import torch
from cases import VARIANTS

from lightning_rprop import Rprop


def build(*shapes, **options):
    """Return parameters with gradients, and an optimizer that has made a step."""
    params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    optimizer = Rprop([(f"w{i}", p) for i, p in enumerate(params)], **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    return params, optimizer


def assert_refused(params, optimizer, step, message):
    before = pickle.dumps((params, dict(optimizer.state)))
    with pytest.raises(ValueError, match=message):
        step()
    assert pickle.dumps((params, dict(optimizer.state))) == before


ALL_RETREAT = [{"variant": variant} for variant in VARIANTS] + [
    {"retreat": True},
    {"variant": "irprop+", "retreat": False},
]


@pytest.mark.parametrize("options", ALL_RETREAT, ids=str)
def test_wrong_number_of_losses_is_refused(options):
    params, optimizer = build((4, 2), (3,), **options)
    for losses in (torch.ones(4), torch.full((4,), torch.nan), torch.ones(4).double()):
        message = (
            r"loss has 4 elements, one for each member, but 'w1' has the shape \(3,\): its first dimension must be 4"
        )
        assert_refused(params, optimizer, lambda losses=losses: optimizer.step(loss=losses), message)
        assert_refused(params, optimizer, lambda losses=losses: optimizer.step(lambda: losses), message)
    assert_refused(params, optimizer, lambda: optimizer.step(loss=torch.ones(2)), r"loss has 2 .* 'w0' .* \(4, 2\)")


@pytest.mark.parametrize("options", [{"retreat": True}, {"variant": "irprop+"}], ids=str)
def test_vector_is_refused_where_losses_are_asked(options):
    """Although it fits no parameter, so that it may be something else."""
    params, optimizer = build((4, 2), (3,), **options)
    assert_refused(params, optimizer, lambda: optimizer.step(lambda: torch.ones(7)), "loss has 7 elements")


def test_parameters_without_dimension_are_refused():
    params, optimizer = build((), variant="irprop+")
    assert_refused(params, optimizer, lambda: optimizer.step(loss=torch.ones(2)), r"'w0' has the shape \(\)")


def test_frozen_parameter_with_state_is_refused():
    """It would store losses that its shape does not fit; one that was never trained has no state."""
    params, optimizer = build((4, 2), (3,), variant="irprop+")
    params[1].grad = None
    assert_refused(params, optimizer, lambda: optimizer.step(loss=torch.ones(4)), r"'w1' has the shape \(3,\)")
    trained, frozen = torch.zeros(4, 2, requires_grad=True), torch.zeros(3)
    optimizer = Rprop([trained, frozen], variant="irprop+")
    trained.grad = torch.ones(4, 2)
    optimizer.step(loss=torch.ones(4))
    assert trained.any()


def test_groups_that_ignore_losses_may_have_any_shape():
    stacked, other = torch.zeros(4, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = Rprop([{"params": [stacked], "variant": "irprop+"}, {"params": [other], "retreat": False}])
    for p in (stacked, other):
        p.grad = torch.ones_like(p)
    optimizer.step(loss=torch.ones(4))
    assert other.any()
    optimizer.param_groups[1]["retreat"] = None
    assert_refused([stacked, other], optimizer, lambda: optimizer.step(loss=torch.ones(4)), "parameter 0 has the shape")


@pytest.mark.parametrize("max_iter", [1, 2])
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_closure_may_return_other_vectors(value, max_iter):
    """Without irprop+ and retreat=True: such as losses of samples, whose number fits no parameter."""
    params, optimizer = build((4, 2), (3,), lr=1.0)
    for group in optimizer.param_groups:
        group["max_iter"] = max_iter

    def closure():
        optimizer.zero_grad()
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.full((7,), value)

    optimizer.step(closure)
    assert all(p.max() < -2 for p in params)  # the first step has moved by 1
    assert optimizer.retreats == 0


def test_local_losses_of_members_are_refused(monkeypatch):
    """irprop+ would compare different losses on each process; the default retreat is off, so anything fits."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    p = torch.zeros(4, 2, requires_grad=True)
    p.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="would compare a different loss on each of the 2 processes"):
        Rprop([p], variant="irprop+").step(loss=torch.ones(4))
    optimizer = Rprop([p])
    optimizer.step(loss=torch.full((5,), torch.nan))
    assert optimizer.retreats == 0


def test_fused_true_refuses_interleaved_members():
    p = torch.zeros(2, 4).T.detach().requires_grad_()
    optimizer = Rprop([("w", p)], fused=True)
    p.grad = torch.ones(2, 4).T
    message = r"no fused kernel supports 'w': its members are not in one piece of memory each: .*strides \(1, 4\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(loss=torch.ones(4))
    assert not optimizer.state
    optimizer.step(loss=torch.tensor(1.0))
    optimizer.param_groups[0]["retreat"] = False  # which ignores the losses
    optimizer.step(loss=torch.ones(4))
    assert optimizer.state[p]["step"] == 2


def test_one_member_is_an_ordinary_loss():
    p = torch.zeros(1, 3, requires_grad=True)
    optimizer = Rprop([p, other := torch.zeros(2, requires_grad=True)], variant="irprop+")
    p.grad, other.grad = torch.ones(1, 3), torch.ones(2)
    optimizer.step(loss=torch.ones(1))
    assert optimizer.state[p]["prev_loss"].shape == ()


def test_accumulating_closure_is_found_beside_a_nan():
    """max_iter checks the gradients of the members whose loss is finite."""
    p = torch.ones(3, 2, requires_grad=True)
    optimizer = Rprop([p], max_iter=2)
    p.grad = torch.ones(3, 2)

    def closure(zero):
        if zero:
            optimizer.zero_grad()
        losses = p.square().sum(dim=1) * torch.tensor([1.0, torch.nan, 1.0])
        losses.sum().backward()
        return losses

    with pytest.raises(RuntimeError, match="did not zero the gradients"):
        optimizer.step(lambda: closure(zero=False))
    assert p.tolist() == [[1.0] * 2] * 3
    optimizer.step(lambda: closure(zero=True))
    assert optimizer.state[p]["step"] == 2
