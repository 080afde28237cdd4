"""A step that runs out of memory changes no parameter and no counter, and leaves a loadable state."""

import copy
from pathlib import Path

import pytest
import torch
from cases import set_gradients
from lit import all_equal
from programs import run
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import Rprop
from lightning_rprop.optim import _scratch

UNFUSED = [{"fused": False}, {"foreach": True}]
OPTIONS = [{}, {"variant": "irprop+", "weight_decay": 0.1}, {"variant": "rprop+", "maximize": True}]


class OutOfMemory(TorchDispatchMode):
    """Raise OutOfMemoryError after ``n`` operations that allocate memory."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if all(returned.alias_info is None for returned in function._schema.returns) and function._schema.returns:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError(str(function))
        return function(*args, **(kwargs or {}))


def make(options):
    """Return parameters of two groups, two dtypes and sizes on both sides of ``_scratch._FEW``, and an optimizer."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (80, 70), (50, 2, 60), (7, 2)]
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    params += [torch.randn(90, 60, generator=generator).T.double().requires_grad_(), torch.ones((), requires_grad=True)]
    return params, Rprop([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}], **options)


def snapshot(params, optimizer):
    tensors = [p.detach() for p in params]
    return copy.deepcopy(tensors + [value for p in params for value in optimizer.state.get(p, {}).values()])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", UNFUSED, ids=str)
def test_failed_step_changes_nothing(path, options):
    (params, optimizer), (others, undisturbed) = make(options | path), make(options | path)
    for seed in range(2):
        for each, one in ((params, optimizer), (others, undisturbed)):
            set_gradients(each, seed)
            one.step(loss=float(seed))
    set_gradients(params, 2)
    before, failures = snapshot(params, optimizer), 0
    while True:
        try:
            with OutOfMemory(failures):
                optimizer.step(loss=2.0)
            break
        except torch.OutOfMemoryError:
            failures += 1
            assert all_equal(snapshot(params, optimizer), before)
    assert failures > 20
    set_gradients(others, 2)
    undisturbed.step(loss=2.0)
    assert all_equal(snapshot(params, optimizer), snapshot(others, undisturbed))


@pytest.mark.parametrize("path", [{}, *UNFUSED], ids=str)
def test_failed_first_step_leaves_loadable_state(path):
    params, optimizer = make({"variant": "irprop+"} | path)
    set_gradients(params, 0)
    before = copy.deepcopy([p.detach() for p in params])
    for failures in range(12):
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(failures):
            optimizer.step(loss=1.0)
        assert all_equal(params, before)
        make({"variant": "irprop+"})[1].load_state_dict(optimizer.state_dict())
    optimizer.step(loss=1.0)
    others, undisturbed = make({"variant": "irprop+"} | path)
    set_gradients(others, 0)
    undisturbed.step(loss=1.0)
    assert all_equal(snapshot(params, optimizer), snapshot(others, undisturbed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shared_scratch_memory_is_bit_exact(options, dtype, monkeypatch):
    results = []
    for few in (0, 1 << 20):
        monkeypatch.setattr(_scratch, "_FEW", few)
        params, _ = make({})
        params = [p.detach().to(dtype).requires_grad_() for p in params]
        optimizer = Rprop(params, fused=False, **options)
        for seed in range(5):
            set_gradients(params, seed)
            optimizer.step(loss=float(seed % 3))
        results.append(snapshot(params, optimizer))
    assert all_equal(*results)


RLIMIT = """
import resource, torch
from lightning_rprop import Rprop
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.ones(n)) for n in SIZES]
optimizer = Rprop([{"params": params[:1]}, {"params": params[1:]}], fused=False, **OPTIONS)
for p in params:
    p.grad = torch.ones_like(p)
optimizer.step(loss=1.0)
before = [p.detach()[0].item() for p in params]
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), -1))
try:
    optimizer.step(loss=2.0)
    print("no failure")
except RuntimeError:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    moved = [p.detach()[0].item() != b for p, b in zip(params, before)]
    print(moved, [optimizer.state[p]["step"].item() for p in params])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm of Linux")
@pytest.mark.parametrize("options", [{"variant": "irprop+"}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("sizes", [[1000, 1000, 30_000_000], [20_000, 30_000_000, 1000]], ids=str)
def test_memory_limit_moves_all_or_nothing(sizes, options):
    program = RLIMIT.replace("SIZES", repr(sizes)).replace("OPTIONS", repr(options))
    assert run(".", "-c", program).strip() == "[False, False, False] [1.0, 1.0, 1.0]"
