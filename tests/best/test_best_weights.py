"""BestWeights in plain loops: what it keeps, how it compares, what it restores."""

import copy

import pytest
import torch
from best_walks import BEST, LOSSES, copies, move, network, walk
from cases import DTYPES, VARIANTS, dense_parameters, parameters, same_bits
from lit import all_equal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import BestWeights, Rprop
from lightning_rprop.best import weights


class NoSync(TorchDispatchMode):
    """Fails when a value moves to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowest_loss_wins_in_any_dtype(dtype, place):
    params = parameters(dtype)
    best = BestWeights(params)
    seen = walk(best, params)
    best.restore()
    assert (best.loss, best.step) == (-1.0, BEST)
    assert all(map(same_bits, map(torch.Tensor.detach, params), seen[BEST]))
    move(params)
    best.restore()  # again
    assert all(map(same_bits, map(torch.Tensor.detach, params), seen[BEST]))


def test_updates_do_not_synchronize(monkeypatch):
    monkeypatch.setattr(weights, "is_on_host", lambda tensor: False)
    params = dense_parameters(torch.float32)
    best = BestWeights(params)
    with NoSync():
        seen = walk(best, params)
        memory = [kept.data_ptr() for kept in best._kept]
        seen += walk(best, params, [-2.0])
        assert [kept.data_ptr() for kept in best._kept] == memory
    best.restore()
    assert all_equal(params, seen[-1])
    assert (best.loss, best.step) == (-2.0, len(LOSSES))
    with pytest.raises(AssertionError), NoSync():  # the mode does see it
        float(best._loss)


@pytest.mark.parametrize("is_first_on_host", [True, False])
def test_host_and_device_losses_mix(is_first_on_host, monkeypatch):
    params = dense_parameters(torch.float32)
    best = BestWeights(params)
    seen = []
    for i, loss in enumerate([3.0, 2.5, 2.0, 2.75, 2.25]):
        monkeypatch.setattr(weights, "is_on_host", lambda tensor, i=i: (i % 2 == 0) is is_first_on_host)
        seen += walk(best, params, [loss])
    best.restore()
    assert (best.loss, best.step) == (2.0, 2)
    assert all_equal(params, seen[2])


def test_precise_losses_are_compared_exactly(place):
    params = [torch.zeros(1)]
    best = BestWeights(params)
    losses = [torch.tensor(1.0, dtype=torch.float64), torch.tensor(1 - 2**-52, dtype=torch.float64)]
    for loss in losses:
        best.update(loss)
        move(params)
    assert (best.loss, best.step) == (1 - 2**-52, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_loop_ends_at_its_best(variant):
    w = torch.tensor([3.0, -2.0], requires_grad=True)
    optimizer = Rprop([w], lr=0.7, variant=variant)
    best, losses = BestWeights([w]), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = ((w - 1) ** 4 + w).sum()
        loss.backward()  # an update between backward and step changes nothing that these need
        best.update(loss)
        losses.append(loss.item())
        optimizer.step(loss=loss)
    best.restore()
    assert ((w - 1) ** 4 + w).sum().item() == best.loss == min(losses) < losses[-1]
    assert losses.index(min(losses)) == best.step


def test_update_leaves_the_graph_intact(place):
    w = torch.tensor([3.0], requires_grad=True)
    best = BestWeights([w])
    loss = (w * w).sum()
    best.update(loss)
    best.update(loss - 1)  # requires grad too
    loss.backward()
    assert w.grad.item() == 6.0
    loss = (w * w).sum()
    best.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as after any change in place
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_updates_in_grad_modes_mix(mode, place):
    params = dense_parameters(torch.float32)
    best = BestWeights(params)
    with mode():
        walk(best, params[:0], [3.0])
    seen = walk(best, params, [2.0])
    versions = [param._version for param in params]
    with mode():
        walk(best, params[:0], [4.0])
        best.restore()
    assert all_equal(params, seen[0])
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    other = BestWeights(params)
    with mode():
        other.load_state_dict(best.state_dict())
    move(params)
    seen = walk(other, params, [1.0])
    other.restore()
    assert all_equal(params, seen[0])


def groups_of(net):
    return [
        {"params": [net[0].weight], "lr": 1.0},
        {"params": net[2].weight},
        {"params": list(net[0].named_parameters())},
    ]


@pytest.mark.parametrize(
    ("choose", "count"),
    [
        pytest.param(lambda net: net, 9, id="module"),
        pytest.param(lambda net: net.parameters(), 6, id="generator"),
        pytest.param(lambda net: net.named_parameters(), 6, id="names"),
        pytest.param(groups_of, 3, id="groups"),
        pytest.param(lambda net: Rprop(net.parameters()).param_groups, 6, id="param_groups"),
        pytest.param(lambda net: Rprop(net.named_parameters()).param_groups, 6, id="named param_groups"),
    ],
)
def test_all_forms_of_parameters_are_kept(choose, count):
    net = network()
    best = BestWeights(choose(net))
    tensors = [*net.parameters(), *net.buffers()]
    before = copies(tensors)
    best.update(1)
    assert len(best.state_dict()["tensors"]) == count  # each once
    move(tensors)
    best.restore()
    assert sum(map(torch.equal, tensors, before)) == count


def test_tied_parameters_are_kept_once():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.BatchNorm1d(2), "d": nn.BatchNorm1d(2)})
    net.b.weight = net.a.weight
    net.d.running_mean = net.c.running_mean
    best = BestWeights(net)
    before = copy.deepcopy(net.state_dict())
    best.update(1.0)
    assert len(best.state_dict()["tensors"]) == 7 + 5
    move([*net.parameters(), *net.buffers()])
    net.d.running_mean = torch.ones(2)  # no longer tied
    best.restore()
    assert net.b.weight is net.a.weight
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_buffers_are_followed(place):
    """New tensors and other shapes, as modules assign them."""
    net = nn.BatchNorm1d(2)
    net.register_buffer("history", torch.zeros(0))
    net.register_buffer("fixed", torch.ones(1).expand(3))
    net.register_buffer("later", None)
    with torch.inference_mode():
        net.register_buffer("inferred", torch.ones(2))
    best = BestWeights(net)
    for i, loss in enumerate([3.0, 1.0, 2.0, 4.0]):
        net.history = torch.arange(i + 1.0)
        net.running_mean = torch.full((2,), float(i))
        net.later = torch.full((1,), float(i))
        net.fixed = torch.full((1,), float(i)).expand(3)
        best.update(torch.tensor(loss))
    net.later = None
    del net.running_var
    best.restore()
    assert net.history.tolist() == [0.0, 1.0]
    assert net.running_mean.tolist() == [1.0, 1.0]
    assert net.later.tolist() == [1.0]
    assert net.running_var.tolist() == [1.0, 1.0]
    assert net.fixed.tolist() == [1.0, 1.0, 1.0]
    assert net.inferred.tolist() == [1.0, 1.0]
    net.history = torch.arange(9.0)
    best.restore()
    assert net.history.tolist() == [0.0, 1.0]


def test_lazy_parameters_join_when_initialized(place):
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1), nn.LazyBatchNorm1d())
    best = BestWeights(net)
    best.update(torch.tensor(5.0))  # nothing to keep of the lazy layers
    net(torch.ones(4, 2))
    before = copies(net.parameters())
    best.update(torch.tensor(4.0))
    move(net.parameters())
    best.restore()
    assert all_equal(net.parameters(), before)
