"""Further cases of faults that were found once: changed shapes, closures, states, and lazy modules with fused=True."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_rprop import Rprop


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}])
@pytest.mark.parametrize("shapes", [((6000,), (7000,)), ((1,), (4,)), ((2, 3), (3, 2))])
def test_changed_shape_is_refused_before_anything_moves(shapes, options):
    first, changed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(shapes[0]))
    optimizer = Rprop([first, changed], **options)
    for param in (first, changed):
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = first.detach().clone()
    changed.data = torch.ones(shapes[1])
    changed.grad = torch.ones(shapes[1])
    with pytest.raises(RuntimeError, match=r"parameter 1 has the shape .* create a new optimizer"):
        optimizer.step()
    assert torch.equal(first, before)
    assert [state["step"].item() for state in optimizer.state.values()] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_max_iter_takes_nan_gradients_of_zeroed_parameters(set_to_none, dtype):
    p, q = nn.Parameter(torch.ones(2, dtype=dtype)), nn.Parameter(torch.zeros(2))
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
def test_max_iter_still_refuses_accumulation(dtype):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = Rprop([p], max_iter=3)
    gradient = p.grad = torch.full_like(p, 5)

    def closure():
        loss = p.abs().square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="did not zero the gradients"):
        optimizer.step(closure)
    assert p.grad is gradient
    assert (gradient == 5).all()


def test_load_through_distributed_checkpoint_warns_of_options():
    nets = [nn.Linear(2, 1) for _ in range(2)]
    saved, other = Rprop(nets[0].parameters(), lr=0.5, variant="rprop+"), Rprop(nets[1].parameters())
    nets[0](torch.ones(1, 2)).sum().backward()
    saved.step()
    with pytest.warns(UserWarning, match=r"variant is 'rprop\+', not 'irprop-'"):
        set_optimizer_state_dict(nets[1], other, get_optimizer_state_dict(nets[0], saved))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", torch.tensor(True)),
        ("prev", torch.ones(1, 2).to_sparse()),
        ("step_size", torch.ones(1, 2).to(torch.float8_e4m3fn)),
    ],
)
def test_state_that_cannot_be_used_is_refused(key, value):
    net = nn.Linear(2, 1)
    optimizer = Rprop(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0][key] = value
    with pytest.raises(ValueError, match=f"does not fit: its {key} is"):
        Rprop(nn.Linear(2, 1).parameters()).load_state_dict(state)


def test_complex_loss_is_refused():
    p = nn.Parameter(torch.ones(2))
    optimizer = Rprop([p], variant="irprop+")
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="loss must be a number or a tensor of one element"):
        optimizer.step(loss=torch.tensor(1j))


def test_variant_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"Invalid variant: \[\]"):
        Rprop([nn.Parameter(torch.ones(2))], variant=[])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_fused_with_lazy_modules():
    net = nn.LazyLinear(2)
    optimizer = Rprop(net.parameters(), lr=0.1, fused=True)
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.weight, before - 0.1)
