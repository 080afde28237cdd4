"""When a step retreats: which losses, calls, processes and options, and how retreats are counted."""

import copy
import pickle

import pytest
import torch
from tapes import INF, NAN, descend

from lightning_rprop import Rprop


def moved(**options):
    """Return a weight, its value before and after one step, and the optimizer."""
    w = torch.zeros(3, requires_grad=True)
    optimizer = Rprop([w], lr=0.5, **options)
    start = w.detach().clone()
    w.grad = torch.tensor([1.0, -1.0, 0.0])
    optimizer.step(loss=1.0)
    return w, start, w.detach().clone(), optimizer


FORMS = {
    "float": lambda optimizer, loss: optimizer.step(loss=loss),
    "tensor": lambda optimizer, loss: optimizer.step(loss=torch.tensor(loss)),
    "shape (1,)": lambda optimizer, loss: optimizer.step(loss=torch.tensor([loss], requires_grad=True)),
    "closure": lambda optimizer, loss: optimizer.step(lambda: torch.tensor(loss)),
    "closure of a float": lambda optimizer, loss: optimizer.step(lambda: loss),
}


@pytest.mark.parametrize("loss", [NAN, INF])
@pytest.mark.parametrize("step", FORMS.values(), ids=FORMS)
def test_every_form_of_loss_retreats(step, loss):
    w, start, _, optimizer = moved()
    step(optimizer, loss)
    assert torch.equal(w, start)
    assert torch.equal(optimizer.state[w]["step_size"], torch.full((3,), 0.25))  # of the weight that stayed too
    assert not optimizer.state[w]["prev"].any()
    assert optimizer.retreats == 1


@pytest.mark.parametrize("call", ["step()", "closure returns None", "closure returns text", "finite", "-inf"])
def test_other_steps_do_not_retreat(call):
    w, _, after, optimizer = moved(step_sizes=(0.5, 0.5))
    {
        "step()": optimizer.step,
        "closure returns None": lambda: optimizer.step(lambda: None),
        "closure returns text": lambda: optimizer.step(lambda: "nan"),
        "finite": lambda: optimizer.step(loss=3e38),
        "-inf": lambda: optimizer.step(loss=-INF),
    }[call]()
    assert torch.equal(w, after - w.grad.sign() * 0.5)
    assert optimizer.retreats == 0


def test_retreat_of_false_never_acts():
    w, _, after, optimizer = moved(retreat=False)
    optimizer.step(loss=NAN)
    assert not torch.equal(w, after)
    assert optimizer.retreats == 0


@pytest.mark.parametrize(
    ("retreat", "processes", "shared", "expected"),
    [
        (None, 1, False, True),
        (None, 2, False, False),
        (None, 2, True, True),
        (True, 2, False, True),
        (False, 2, True, False),
    ],
)
def test_default_needs_a_shared_loss(retreat, processes, shared, expected, monkeypatch):
    w, start, _, optimizer = moved(retreat=retreat)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    optimizer.shared_loss = shared
    optimizer.step(loss=NAN)
    assert torch.equal(w, start) == expected


def test_each_group_follows_its_own_options():
    ws = [torch.zeros(1, requires_grad=True) for _ in range(4)]
    options = ({}, {"retreat": False}, {"maximize": True}, {"variant": "rprop-"})
    optimizer = Rprop([{"params": [w], **more} for w, more in zip(ws, options, strict=True)], lr=1.0)
    for loss in (1.0, INF):
        for w in ws:
            w.grad = torch.ones(1)
        optimizer.step(loss=loss)
    assert [w.item() for w in ws] == pytest.approx([0.0, -2.2, 2.2, 0.0])  # 1 + 1.2, rounded to float32
    assert optimizer.retreats == 1


@pytest.mark.parametrize("max_iter", [1, 3])
@pytest.mark.parametrize("known", [True, False], ids=["number", "tensor"])
def test_closure_may_skip_backward(max_iter, known, monkeypatch):
    """Many closures do so if the loss is not finite; all gradients are then None."""
    if not known:
        monkeypatch.setattr("lightning_rprop.optim._loss._is_known", lambda loss: False)
    z = torch.full((2,), 3 + 1j, requires_grad=True)
    w = torch.full((2,), 1.5, requires_grad=True)
    optimizer = Rprop([w, z], lr=2.0, max_iter=max_iter)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = (w - w.log()).sum() + (torch.view_as_real(z) - 1).square().sum()
        seen.append((w.detach().clone(), loss.item()))
        if loss.isfinite():
            loss.backward()
        return loss

    for _ in range(300 // max_iter):
        optimizer.step(closure)
    bad = [i for i, (_, loss) in enumerate(seen) if loss != loss]
    assert len(bad) == optimizer.retreats >= 1
    assert all(torch.equal(seen[i + 1][0], seen[i - 1][0]) for i in bad)
    assert torch.allclose(w, torch.ones(2), atol=1e-3)  # float32
    assert torch.allclose(z, torch.full((2,), 1 + 1j), atol=1e-3)


def test_finite_loss_without_gradient_is_no_op(monkeypatch):
    monkeypatch.setattr("lightning_rprop.optim._loss._is_known", lambda loss: False)
    w, _, after, optimizer = moved()
    state = {key: value.clone() for key, value in optimizer.state[w].items()}
    w.grad = None
    optimizer.step(loss=2.0)
    assert torch.equal(w, after)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[w].items())


def test_parameter_outside_the_loss_stays():
    """Its last move cannot be the reason for the bad loss."""
    used, unused = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = Rprop([used, unused], lr=1.0)
    used.grad, unused.grad = torch.ones(1), torch.ones(1)
    optimizer.step(loss=1.0)
    unused.grad = None
    optimizer.step(loss=NAN)
    assert (used.item(), unused.item()) == (0.0, -1.0)


@pytest.mark.parametrize("retreat", [True, None, False])
def test_wrong_losses_are_refused(retreat):
    w, _, after, optimizer = moved(retreat=retreat)
    complex_losses = torch.ones(3, dtype=torch.complex64)
    for wrong in (torch.ones(3, 1), "0.5", torch.ones(0), complex_losses[0], complex_losses):
        with pytest.raises(ValueError, match="loss must be a number, a tensor of one element, or"):
            optimizer.step(loss=wrong)
    if retreat:
        with pytest.raises(ValueError, match="loss must be a number, a tensor of one element, or"):
            optimizer.step(lambda: torch.ones(3, 1))
    assert torch.equal(w, after)
    assert optimizer.state[w]["step"] == 1


def test_max_iter_retreats_within_a_step():
    w = torch.tensor([1.5, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = Rprop([w], lr=2.0, max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = (w - w.log()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.retreats >= 1
    assert torch.allclose(w, torch.ones_like(w), atol=2e-6)  # the smallest step size is 1e-6
    assert optimizer.state[w]["step"] == 100


@pytest.mark.parametrize("known", [True, False], ids=["number", "tensor"])
def test_count_is_copied_but_not_saved(known, monkeypatch):
    if not known:
        monkeypatch.setattr("lightning_rprop.optim._loss._is_known", lambda loss: False)
    w, _, _, optimizer = moved()
    for _ in range(2):
        optimizer.step(loss=NAN)
    assert [int(each.retreats) for each in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))] == [2, 2]
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"step", "prev", "step_size"}
    assert state["param_groups"][0]["retreat"] is None
    torch.optim.Rprop([w]).load_state_dict(state)


def test_checkpoint_keeps_the_option():
    saved = Rprop([torch.zeros(1, requires_grad=True)], retreat=False).state_dict()
    optimizer = Rprop([torch.zeros(1, requires_grad=True)], retreat=True)
    with pytest.warns(UserWarning, match="retreat is False, not True"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["retreat"] is False
    optimizer = Rprop([torch.zeros(1, requires_grad=True)], retreat=True)
    optimizer.load_state_dict(torch.optim.Rprop([torch.zeros(1, requires_grad=True)]).state_dict())
    assert optimizer.param_groups[0]["retreat"] is True


def test_retreat_is_taken_back_before_irprop_plus():
    """A bad loss counts as the worst, so that the finite one after it has not risen."""
    w, optimizer, _, _ = descend("irprop+", 10)
    before = w.detach().clone()
    optimizer.step(loss=NAN)
    retreated = w.detach().clone()
    assert not torch.equal(before, retreated)
    assert all(state["prev_loss"] == INF for state in optimizer.state.values())
