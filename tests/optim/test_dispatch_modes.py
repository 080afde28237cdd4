"""Steps under dispatch modes, fake tensors, tracing and vmap: no kernel bypasses them, and the result is exact."""

import copy

import pytest
import torch
from cases import VARIANTS, assert_same, parameters, set_gradients, train
from lit import all_equal
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import stateless
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import Rprop
from lightning_rprop.optim import rprop

PATHS = [{}, {"fused": True}, {"fused": False}, {"foreach": True}]
BY_PATH = pytest.mark.parametrize("path", PATHS, ids=str)
OPTIONS = [{}, {"variant": "irprop+", "weight_decay": 0.1}, {"variant": "rprop+", "maximize": True}, {"lr": 0.0}]
BY_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Writes(TorchDispatchMode):
    """Record which tensors are written to."""

    def __init__(self):
        super().__init__()
        self.written = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.update(map(id, given if isinstance(given, (list, tuple)) else [given]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_dispatch_mode_sees_all_writes(path):
    watched, unwatched = train(Rprop, parameters(torch.float32), 2, **path), train(Rprop, parameters(torch.float32), 2)
    for one in (watched, unwatched):
        set_gradients(one.params, 7)
    with Writes() as mode:
        watched.optimizer.step()
    unwatched.optimizer.step()
    for p in watched.params:
        state = watched.optimizer.state[p]
        assert {id(p), *map(id, state.values())} <= mode.written
    assert_same(watched, unwatched)


def simulated_steps(options, max_iter=1):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    x = torch.ones(4, 3)
    optimizer = Rprop(net.parameters(), max_iter=max_iter, **options)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean() + sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return [(p, optimizer.state[p]) for p in net.parameters()]


@pytest.mark.parametrize("max_iter", [1, 2])
@BY_PATH
@BY_OPTIONS
def test_fake_tensors_get_fake_state(options, path, max_iter):
    with FakeTensorMode():
        for p, state in simulated_steps(options | path, max_iter):
            assert {type(value).__name__ for value in state.values()} == {"FakeTensor"}
            assert state["prev"].shape == state["step_size"].shape == p.shape


@pytest.mark.parametrize("max_iter", [1, 2])
@BY_PATH
@BY_OPTIONS
def test_meta_tensors_get_meta_state(options, path, max_iter):
    with torch.device("meta"):
        for _, state in simulated_steps(options | path, max_iter):
            assert state["prev"].device.type == state["step_size"].device.type == "meta"


@pytest.mark.parametrize("mode", [FakeTensorMode(), torch.device("meta")], ids=["fake", "meta"])
def test_members_without_values_have_state(mode):
    """Nothing reads the losses, not even state_dict()."""
    with mode:
        p = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = Rprop([p], variant="irprop+")
        for _ in range(2):
            p.grad = torch.ones(4, 3)
            optimizer.step(loss=torch.ones(4))
        assert optimizer.state_dict()["state"][0]["prev_loss"].shape == (4,)


@BY_PATH
def test_fake_tensors_work_outside_their_mode(path):
    with FakeTensorMode() as mode:
        p = torch.nn.Parameter(mode.from_tensor(torch.ones(3)))
        p.grad = torch.ones(3)
    optimizer = Rprop([p], **path)
    optimizer.step()
    assert type(optimizer.state[p]["step_size"]).__name__ == "FakeTensor"


@pytest.mark.parametrize("fused", [None, False])
def test_mem_tracker_sees_the_state(fused):
    with FakeTensorMode():
        net = torch.nn.Linear(300, 200)
        optimizer = Rprop(net.parameters(), fused=fused)
        tracker = MemTracker()
        tracker.track_external(net, optimizer)
        with tracker:
            for step in range(2):
                net(torch.randn(4, 300)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    tracker.reset_mod_stats()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    held = {str(key).split(".")[-1]: value for key, value in peak.items()}
    assert held["OPT"] >= 2 * 4 * (300 * 200 + 200)  # prev and step_size


@BY_PATH
@pytest.mark.parametrize("variant", ["irprop-", "irprop+", "rprop+"])
@pytest.mark.parametrize("loss", [2.0, [2.0, torch.nan]], ids=["loss", "members"])
def test_traced_step_gives_the_same_bits(loss, variant, path):
    swap = pytest.importorskip("torch.optim._stateless", reason="torch 2.8 lacks it").swap_in_optimizer_params_and_state
    net = torch.nn.Linear(4, 2)
    optimizer = Rprop(net.parameters(), variant=variant, weight_decay=0.1, **path)
    x = torch.randn(5, 4)
    net(x).square().sum().backward()
    optimizer.step(loss=torch.ones_like(torch.tensor(loss)))

    def step(params, state, loss):
        with stateless._reparametrize_module(net, params), swap(optimizer, params, state):
            grads = torch.autograd.grad(-net(x).square().sum(), list(net.parameters()))
            for p, grad in zip(net.parameters(), grads, strict=True):
                p.grad = grad
            optimizer.step(loss=loss)
            return [p.detach().clone() for p in net.parameters()]

    def fresh():
        params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        return params, copy.deepcopy(optimizer.state_dict()), torch.tensor(loss)

    graph = make_fx(step)(*fresh())
    with torch.no_grad():
        traced = graph(*fresh())
    assert all_equal(traced, step(*fresh()))


def test_fused_true_checks_materialized_params():
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(3)) for _ in range(2)]
    optimizer = Rprop(params, fused=True)
    gaps = torch.ones(6, 8)[:, ::2].detach()
    for i, real in enumerate((torch.ones(3), gaps)):
        optimizer.param_groups[0]["params"][i] = torch.nn.Parameter(real)
        optimizer.param_groups[0]["params"][i].grad = torch.ones_like(real)
    with pytest.raises(
        RuntimeError, match=r"fused=True, but no fused kernel supports parameter 1: .* differ in strides"
    ):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), torch.ones(3) - 0.01)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_fused_true_works_with_lazy_modules():
    net = torch.nn.LazyLinear(2)
    optimizer = Rprop(net.parameters(), lr=0.1, fused=True)
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.weight, before - 0.1)


NUMBERS = {"step_size_min": 1e-6, "step_size_max": 50.0, "etaminus": 0.5, "etaplus": 1.2}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("shared", [None, "grads", "prevs", "counters"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_functional_form_works_under_vmap(variant, shared):
    """Each member has its own tensors, except one kind that all may share."""
    generator = torch.Generator().manual_seed(0)
    batched = {name: torch.randn(4, 3, generator=generator) for name in ("params", "grads", "prevs")}
    batched |= {"sizes": torch.rand(4, 3, generator=generator), "counters": torch.arange(4.0)}
    batched["rose"] = torch.tensor([True, False, True, False])

    def step(params, grads, prevs, sizes, counters, rose):
        moved = [
            params.clone(),
            prevs + 0 * params,
            sizes.clone(),
            counters.clone(),
        ]  # vmap wants these batched
        rprop(
            [moved[0]], [grads], [moved[1]], [moved[2]], [moved[3]],
            variant=variant, loss_rose=rose, weight_decay=0.1, maximize=True, **NUMBERS,
        )  # fmt: skip
        return moved

    values = {name: value[0] if name == shared else value for name, value in batched.items()}
    dims = tuple(None if name == shared else 0 for name in batched)
    together = torch.vmap(step, in_dims=dims, out_dims=0)(*values.values())
    for i in range(4):
        alone = step(*(value if name == shared else value[i] for name, value in values.items()))
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))
