"""The loss that step() gets: its forms, its copy in the state, and errors."""

from itertools import pairwise

import pytest
import torch
from cases import VARIANTS
from tapes import OPTIONS, descend, twin_rows

from lightning_rprop import Rprop


@pytest.mark.parametrize("form", ["closure", "closure of a float", "tensor", "float", "shape (1,)", "closure and loss"])
def test_every_form_of_loss_is_equal(form):
    expected, _, _, losses = descend("irprop+")
    assert any(b > a for a, b in pairwise(losses))  # so that there are moves to take back
    w, optimizer, closure, _ = descend("irprop+", 0)
    for _ in range(30):
        if form == "closure":
            optimizer.step(closure)
        elif form == "closure of a float":
            optimizer.step(lambda: closure().item())
        elif form == "closure and loss":
            loss = closure()
            optimizer.step(lambda: None, loss=loss)
        else:
            loss = closure()
            result = optimizer.step(loss={"tensor": loss, "float": loss.item()}.get(form, loss.reshape(1)))
            assert result is None
    assert torch.equal(w, expected)


@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
def test_irprop_plus_demands_a_loss(options):
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = Rprop([{"params": params[:1]}, {"params": params[1:], "variant": "irprop+", **options}])
    for p in params:
        p.grad = torch.ones(1)
    for call in (optimizer.step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(
            RuntimeError, match=r"variant='irprop\+' .* got none. Call step\(closure\) .* or step\(loss=loss\)"
        ):
            call()
    for wrong in (torch.ones(2, 2), "0.5", torch.ones(0)):
        with pytest.raises(ValueError, match=r"loss must be a number, .* or a tensor of shape \(n,\) .*, got"):
            optimizer.step(loss=wrong)
    assert all(p.item() == 1.0 for p in params)
    assert not optimizer.state


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["closure", "loss"])
def test_local_loss_on_processes_is_refused(how, processes, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = Rprop([{"params": params[:1], "variant": "rprop+"}, {"params": params[1:]}], variant="irprop+")
    for p in params:
        p.grad = torch.ones(1)

    def step():
        optimizer.step(lambda: 1.0) if how == "closure" else optimizer.step(loss=torch.tensor(1.0))

    if processes > 1:
        words = r"each of the 2 processes, .* Train with the FullBatch callback, or .* optimizer.shared_loss = True"
        with pytest.raises(RuntimeError, match=words):
            step()
        assert [p.item() for p in params] == [1.0, 1.0]
        assert not optimizer.state
        optimizer.shared_loss = True
    step()
    assert optimizer.state[params[1]]["step"] == 1


def test_no_gradient_needs_no_loss():
    Rprop([torch.ones(1, requires_grad=True)], variant="irprop+").step()


def test_state_holds_a_copy_of_the_loss():
    w = torch.zeros((), requires_grad=True)
    optimizer = Rprop([w], variant="irprop+", **OPTIONS)
    loss = torch.tensor(1.0)
    for g, value in ((1.0, 1.0), (1.0, 2.0), (-1.0, 3.0)):  # one buffer, as in a captured graph
        w.grad = torch.tensor(g)
        loss.fill_(value)
        optimizer.step(loss=loss)
    assert optimizer.state[w]["prev_loss"].item() == 3.0
    assert w.item() == -0.5  # the loss rose, so the move is taken back


def test_stored_loss_keeps_its_address():
    """A captured graph reads and writes a fixed address."""
    w, optimizer, closure, _ = descend("irprop+", 1)
    address = optimizer.state[w]["prev_loss"].data_ptr()
    optimizer.step(closure)
    assert optimizer.state[w]["prev_loss"].data_ptr() == address


def test_stored_loss_takes_the_wider_dtype():
    """The loss 1 + 1e-12 rounds to 1 in float32; stored so, the next loss, 1 + 5e-13, would seem to have risen."""
    tape = [(1, 2.0), (1, 1 + 1e-12), (-1, 1 + 5e-13)]
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = Rprop([w], variant="irprop+", **OPTIONS)
    for i, (g, loss) in enumerate(tape):
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64 if i else torch.float32))
    assert w.item() == twin_rows("irprop+", tape)[-1][0]


def test_groups_have_their_own_variant():
    tape = [(1, 5), (1, 4), (-1, 6), (-1, 3), (1, 2), (1, 1)]
    params = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in VARIANTS]
    groups = [{"params": p, "variant": v} for p, v in zip(params, VARIANTS, strict=True)]
    optimizer = Rprop(groups, **OPTIONS)
    for g, loss in tape:
        for p in params:
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step(loss=loss)
    assert [p.item() for p in params] == [twin_rows(v, tape)[-1][0] for v in VARIANTS]
    assert len({p.item() for p in params}) == 4


def test_complex_loss_raises_an_error():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Rprop([p], variant="irprop+")
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"loss must be a number, a tensor of one element, or .* \(n,\)"):
        optimizer.step(loss=torch.tensor(1j))
