"""torch.distributed.checkpoint creates the state of a fresh optimizer by a step, which must not move a parameter."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import DTYPES, VARIANTS, gradients
from lit import all_equal
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_model_state_dict as set_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from lightning_rprop import Rprop

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

OPTIONS = {
    "decay": {"weight_decay": 0.01},
    "large steps": {"weight_decay": 0.01, "step_sizes": (0.1, 50)},
    "maximize": {"weight_decay": 0.01, "maximize": True, "foreach": True},
    "several evaluations": {"weight_decay": 0.01, "max_iter": 3},
    "tensor": {"weight_decay": 0.01, "lr": torch.tensor(0.25)},
    "lr 0": {"weight_decay": 0.01, "lr": 0.0},
}
BY_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(params=["plain", "DTensor"])
def kind(request, tmp_path):
    if request.param == "DTensor":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield request.param
    if request.param == "DTensor":
        dist.destroy_process_group()


def build(kind="plain", dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2, dtype=dtype)
    if kind == "DTensor":
        mesh = init_device_mesh("cpu", (1,))

        def shard(_, module, mesh):
            for name, param in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])))

        distribute_module(net, mesh, shard)
    return net, Rprop(net.parameters(), **options)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def values(net):
    return [local(p.detach()).clone() for p in net.parameters()]


def take_steps(net, optimizer, steps, seed=0):
    params = list(net.parameters())

    def closure():
        nonlocal seed
        seed += 1
        for p, grad in zip(params, gradients([torch.empty(p.shape, dtype=p.dtype) for p in params], seed), strict=True):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "to_local") else grad
        return 1.0 / seed

    for _ in range(steps):
        optimizer.step(closure)


@BY_OPTIONS
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_state_moves_nothing(variant, options, kind):
    net, optimizer = build(kind, variant=variant, **options)
    other, undisturbed = build(kind, variant=variant, **options)
    before = values(net)
    read = get_optimizer_state_dict(net, optimizer)
    assert all_equal(values(net), before)
    for p in net.parameters():
        state = optimizer.state[p]
        assert state["step"] == 0
        assert not local(state["prev"]).any()
    lr = torch.tensor(float(options.get("lr", 0.01)), dtype=torch.float64)
    assert all((local(state["step_size"]) == lr).all() for state in read["state"].values())
    for each, one in ((net, optimizer), (other, undisturbed)):
        take_steps(each, one, 4)
    assert all_equal(values(net), values(other))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        for key, value in undisturbed.state[q].items():
            assert torch.equal(local(optimizer.state[p][key]), local(value))


@BY_OPTIONS
@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_run_matches_undisturbed_one(variant, options, kind, tmp_path):
    net, optimizer = build(kind, variant=variant, **options)
    take_steps(net, optimizer, 3)
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"net": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=kind == "plain")
    other, fresh = build(kind, variant=variant, **options)
    weights, state = get_state_dict(other, fresh)
    dcp.load({"net": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=kind == "plain")
    set_model(other, weights)
    set_optimizer_state_dict(other, fresh, state)
    assert all_equal(values(net), values(other))
    for each, one in ((net, optimizer), (other, fresh)):
        take_steps(each, one, 5, seed=20)
    assert all_equal(values(net), values(other))


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_loading_into_fresh_one_keeps_weights(dtype):
    net, optimizer = build(dtype=dtype, weight_decay=0.01, step_sizes=(0.1, 50))
    take_steps(net, optimizer, 3)
    weights, state = get_state_dict(net, optimizer)
    other, fresh = build(dtype=dtype, weight_decay=0.01, step_sizes=(0.1, 50))
    set_model(other, weights)
    set_optimizer_state_dict(other, fresh, state)
    assert all_equal(values(net), values(other))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[p][key], fresh.state[q][key]) for key in ("step", "prev", "step_size"))


def test_first_step_uses_current_lr_of_group():
    a, b = net = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = Rprop([{"params": a, "lr": 0.25}, {"params": b}], lr=0.5)
    get_optimizer_state_dict(net, optimizer)
    optimizer.param_groups[1]["lr"] = 1.0  # like a scheduler
    copied = copy.deepcopy(optimizer)
    assert [state["step_size"][0].item() for state in copied.state.values()] == [0.25, 1.0]
    a.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[1]["lr"] = 2.0
    b.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(a.detach(), torch.full((2,), -0.25) - 0.25 * torch.tensor(1.2))
    assert b.tolist() == [-2.0] * 2


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.0, "weight_decay": 0.1}], ids=str)
def test_lr_0_with_gradient_is_a_step(options):
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.tensor([1.0, 0.0])
    optimizer = Rprop([p], **options)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert torch.equal(p[0].detach(), torch.tensor(1.0) - 1e-6)


@pytest.mark.parametrize("options", [{"max_iter": 3}, {"variant": "irprop+", "maximize": True}, {"variant": "irprop+"}])
def test_training_resumes_in_fresh_optimizer(options, tmp_path):
    """The loader creates the state by a step with lr 0, without closure and loss."""

    def build_mlp():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        return net, Rprop(net.parameters(), lr=0.1, **options)

    def minimize(net, optimizer, steps):
        def closure():
            optimizer.zero_grad()
            loss = net(torch.eye(3)).square().mean() * (-1 if options.get("maximize") else 1)
            loss.backward()
            losses.append(loss.item())
            return loss

        losses = []
        for _ in range(steps):
            optimizer.step(closure)
        return losses

    net, optimizer = build_mlp()
    losses = minimize(net, optimizer, 9)
    saved = {"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    fresh_net, fresh = build_mlp()
    state = {"net": fresh_net.state_dict(), "optimizer": get_optimizer_state_dict(fresh_net, fresh)}
    assert all_equal(fresh_net.parameters(), build_mlp()[0].parameters())
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh_net.load_state_dict(state["net"])
    set_optimizer_state_dict(fresh_net, fresh, state["optimizer"])
    if "variant" in options:
        assert fresh.state[next(fresh_net.parameters())]["prev_loss"].item() == losses[-1]
    assert minimize(net, optimizer, 9) == minimize(fresh_net, fresh, 9)
    assert all_equal(net.parameters(), fresh_net.parameters())
    assert fresh.param_groups[0]["lr"] == 0.1


def test_loading_warns_of_replaced_options():
    nets = [torch.nn.Linear(2, 1) for _ in range(2)]
    saved, other = Rprop(nets[0].parameters(), lr=0.5, variant="rprop+"), Rprop(nets[1].parameters())
    nets[0](torch.ones(1, 2)).sum().backward()
    saved.step()
    with pytest.warns(UserWarning, match=r"variant is 'rprop\+', not 'irprop-'"):
        set_optimizer_state_dict(nets[1], other, get_optimizer_state_dict(nets[0], saved))
