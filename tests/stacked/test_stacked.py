"""Stacked is an ordinary module whose members compute what separate modules compute."""

import copy
import io

import pytest
import torch
from cases import TORCH_2_8
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from lightning_rprop import Stacked

X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EACH = torch.randn(4, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def network(*layers):
    """Return a small network in float64 with more layers in between."""
    return nn.Sequential(nn.Linear(3, 5), *layers, nn.Tanh(), nn.Linear(5, 2)).double()


class Features(nn.Module):
    """Has random features in a buffer, a tied layer, a keyword argument, and several outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.second = self.first
        self.register_buffer("scale", torch.rand(3).double())
        self.register_buffer("step", torch.tensor(3), persistent=False)

    def forward(self, x, shift=0.0):
        y = self.second(torch.sin(self.first(x) * self.scale))
        return {"y": y + shift, "sums": [y.sum(), self.step + 1]}


def pair(make, n=4, **options):
    """Return a Stacked and the separate modules that the same random numbers make."""
    torch.manual_seed(0)
    stacked = Stacked(make, n, **options)
    torch.manual_seed(0)
    return stacked, [make() for _ in range(n)]


def close(a, b):
    # batched matrix products add the bias after the sum instead of before it
    return torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [network, Features, lambda: nn.Linear(3, 2, dtype=torch.complex128)])
def test_names_shapes_and_values_of_members(make):
    stacked, separate = pair(make)
    assert len(stacked) == 4
    for of in ("named_parameters", "named_buffers", "named_modules"):
        assert [name for name, _ in getattr(stacked, of)()] == [name for name, _ in getattr(separate[0], of)()]
    assert stacked.state_dict().keys() == separate[0].state_dict().keys()
    for name, param in [*stacked.named_parameters(), *stacked.named_buffers()]:
        own = [dict([*m.named_parameters(), *m.named_buffers()])[name] for m in separate]
        assert torch.equal(param, torch.stack(own)), name
        assert (type(param), param.dtype, param.requires_grad) == (type(own[0]), own[0].dtype, own[0].requires_grad)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_members_compute_as_separate_modules(chunk_size):
    for layers in ([], [nn.LayerNorm(5)], [nn.BatchNorm1d(5, track_running_stats=False)]):
        stacked, separate = pair(lambda layers=layers: network(*copy.deepcopy(layers)), chunk_size=chunk_size)
        shared, own = stacked(X), stacked.forward_each(EACH)
        assert shared.shape == own.shape == (4, 7, 2)
        (shared.square().sum() + own.sum()).backward()
        for i, module in enumerate(separate):
            assert close(shared[i], module(X))
            assert close(own[i], module(EACH[i]))
            (module(X).square().sum() + module(EACH[i]).sum()).backward()
            for name, param in stacked.named_parameters():
                assert close(param.grad[i], module.get_parameter(name).grad), name


def test_nested_outputs_and_keyword_arguments():
    stacked, separate = pair(Features)
    shared = stacked(X, shift=2.0)
    own = stacked.forward_each(EACH, shift=EACH)
    for i, module in enumerate(separate):
        a, b = module(X, shift=2.0), module(EACH[i], shift=EACH[i])
        assert close(shared["y"][i], a["y"])
        assert close(own["y"][i], b["y"])
        assert close(shared["sums"][0][i], a["sums"][0])
        assert shared["sums"][1].tolist() == [4] * 4


def test_member_is_an_independent_module():
    stacked, separate = pair(Features)
    stacked.first.bias.requires_grad_(False)
    stacked.eval()
    for i in (*range(4), torch.tensor(2), -1):
        member = stacked.member(i)
        assert type(member) is Features
        assert member.first is member.second
        assert not member.training
        assert [p.requires_grad for p in member.parameters()] == [True, False]
        assert all(map(torch.equal, member.state_dict().values(), separate[i].state_dict().values()))
        assert torch.equal(member(X)["y"], separate[i](X)["y"])
    with torch.no_grad():
        for tensor in [*member.parameters(), *member.buffers()]:
            tensor.zero_()
    assert all((tensor[3] != 0).all() for tensor in [*stacked.parameters(), *stacked.buffers()])


def test_modes_moves_and_copies_reach_the_members():
    stacked, separate = pair(lambda: network(nn.Dropout()))
    assert close(stacked.eval()(X)[1], separate[1].eval()(X))
    stacked.float()
    assert stacked(X.float()).dtype == torch.float32
    assert stacked.member(0)[0].weight.dtype == torch.float32
    assert stacked.to("meta")(X.float().to("meta")).shape == (4, 7, 2)

    stacked, _ = pair(network)
    saved = io.BytesIO()
    torch.save(stacked, saved)
    saved.seek(0)
    for other in (copy.deepcopy(stacked), torch.load(saved, weights_only=False)):
        assert torch.equal(other(X), stacked(X))
        with torch.no_grad():
            other.get_parameter("0.weight").zero_()
        assert not torch.equal(other(X), stacked(X))
        assert (other.member(1)[0].weight == 0).all()
    other, _ = pair(network)
    with torch.no_grad():
        other.get_parameter("0.weight").zero_()
    other.load_state_dict(stacked.state_dict(), assign=True)
    assert torch.equal(other(X), stacked(X))


def test_chunk_size_limits_what_runs_at_a_time():
    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(self.training)
            return super().forward(x)

    for chunk_size, count in ((None, 1), (3, 2), (1, 4)):
        calls = []
        stacked = Stacked(lambda: Counting(3, 2), 4, chunk_size=chunk_size)
        stacked(X.float())
        stacked.eval()(X.float())
        assert calls == [True] * count + [False] * count


def test_randomness_is_that_of_vmap():
    inputs = torch.ones(1, 1000)
    outputs = {}
    for randomness in ("same", "different"):
        stacked = Stacked(lambda: nn.Sequential(nn.Dropout(), nn.Linear(1000, 1000)), 2, randomness)
        with torch.no_grad():
            stacked.get_parameter("1.weight").copy_(torch.eye(1000).expand(2, -1, -1))
            stacked.get_parameter("1.bias").zero_()
        a, b = stacked(inputs)
        outputs[randomness] = torch.equal(a, b)
        assert sorted({*a.flatten().tolist()}) == [0, 2]
    assert outputs == {"same": True, "different": False}


def test_derivatives_of_each_member():
    class WithGradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return torch.vmap(torch.func.jacrev(self.net))(x)

    stacked, separate = pair(WithGradient)
    assert close(stacked(X)[2], separate[2](X))
    inputs = EACH.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(Stacked(network, 4).forward_each(inputs).sum(), inputs)
    assert gradients.shape == EACH.shape


@pytest.mark.xfail(TORCH_2_8, reason="torch 2.8 cannot compile next() with a default")
def test_compiled_and_parametrized_members():
    def make():
        net = network()
        register_parametrization(net[0], "weight", nn.Softplus())
        return net

    stacked, separate = pair(make)
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    for i, module in enumerate(separate):
        assert close(stacked(X)[i], module(X))
        assert close(compiled(X)[i], module(X))


def test_one_member_and_frozen_parameters():
    def make():
        net = network()
        net[0].requires_grad_(False)
        return net

    stacked, separate = pair(make, 1)
    stacked(X).sum().backward()
    assert stacked.get_parameter("0.weight").grad is None
    assert close(stacked(X)[0], separate[0](X))
