"""Fused kernels are interchangeable with the other implementations, and use no extra memory.

These tests run with Numba's kernel. test_triton.py runs them with Triton's.
"""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from cases import VARIANTS, assert_same, dense_parameters, parameters, take_dense_steps, through_file, train, train_more
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import Rprop


def test_path_may_change_between_steps():
    alternating = train(Rprop, parameters(torch.float32), 0)
    plain = train(Rprop, parameters(torch.float32), 0, foreach=False)
    for i in range(12):
        alternating.optimizer.param_groups[0]["foreach"] = (None, False, True)[i % 3]
        train_more(alternating, 1, seed=i)
        train_more(plain, 1, seed=i)
    assert_same(alternating, plain)


@pytest.mark.parametrize("second", [Rprop, torch.optim.Rprop], ids=["ours", "torch"])
@pytest.mark.parametrize("before", [{"fused": True}, {"foreach": False}], ids=str)
def test_path_may_change_in_a_checkpoint(before, second):
    begun = SimpleNamespace(params=dense_parameters(torch.float32))
    begun.optimizer = Rprop(begun.params, **before)
    take_dense_steps(begun.optimizer, begun.params, 4, seed=1)
    state = through_file(begun.optimizer.state_dict())
    params = [p.detach().clone().requires_grad_() for p in begun.params]
    resumed = SimpleNamespace(params=params, optimizer=second(params))
    resumed.optimizer.load_state_dict(state)
    resumed.optimizer.param_groups[0].update(foreach=False if before.get("fused") else None, fused=None)
    for one in (begun, resumed):
        take_dense_steps(one.optimizer, one.params, 6, seed=2)
    assert_same(begun, resumed)


def test_duplicates_have_separate_memory():
    begun = train(Rprop, parameters(torch.float32), 3)
    duplicates = [copy.deepcopy(begun), pickle.loads(pickle.dumps(begun))]
    for one in (*duplicates, begun):
        train_more(one, 5, seed=2)
    assert_same(begun, duplicates[0])
    assert_same(begun, duplicates[1])


def test_autograd_detects_the_change():
    p = torch.ones(3, requires_grad=True)
    loss = p.square().sum()
    p.grad = torch.ones(3)
    Rprop([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fused_step_only_reads_gradients():
    params = dense_parameters(torch.float32)
    optimizer = Rprop(params, fused=True, weight_decay=0.1, maximize=True)
    take_dense_steps(optimizer, params, 1, seed=1)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_step_allocates_no_full_tensor(variant):
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            allocated.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    sizes = {}
    for options in ({"fused": True}, {"foreach": False}):
        allocated = []
        params = [torch.zeros(1000, 10, requires_grad=True) for _ in range(2)]
        optimizer = Rprop(params, variant=variant, **options)
        take_dense_steps(optimizer, params, 2, seed=1, loss=1.0)
        with Sizes():
            optimizer.step(loss=2.0)
        sizes[str(options)] = max(allocated, default=0)
    assert sizes["{'fused': True}"] < 1000
    assert sizes["{'foreach': False}"] == 10_000  # the measurement works
