"""The step around the rule: closures, hooks, groups, missing gradients, errors and autograd."""

import pytest
import torch
from cases import BY_PATH, assert_same, gradients, parameters, same_bits, set_gradients, train, train_more

from lightning_rprop import Rprop


def test_step_returns_the_loss_of_closure():
    p = torch.tensor([2.0], requires_grad=True)
    optimizer = Rprop([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 4.0
    assert p.item() == 1.5
    assert Rprop([p]).step() is None


def test_failing_closure_moves_nothing():
    one = train(Rprop, parameters(torch.float32), 3)
    before = [p.detach().clone() for p in one.params]

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one.optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(one.params, before, strict=True))
    assert one.optimizer.state[one.params[0]]["step"] == 3


def test_step_hooks_run_in_order():
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.ones(1)
    optimizer = Rprop([p])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", p.item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", p.item())))
    optimizer.step()
    assert [name for name, _ in seen] == ["pre", "post"]
    assert seen[0][1] == 1.0
    assert seen[1][1] < 1.0


@BY_PATH
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.1}], ids=str)
def test_gradients_are_not_modified(foreach, options):
    params = parameters(torch.float32) + parameters(torch.complex64)
    optimizer = Rprop(params, foreach=foreach, **options)
    for step in range(5):
        grads = gradients(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        versions, before = [g._version for g in grads], [g.clone() for g in grads]
        optimizer.step()
        assert [g._version for g in grads] == versions
        assert all(map(same_bits, grads, before))  # Numba and Triton do not count versions
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))


@BY_PATH
def test_missing_gradients_match_torch(foreach):
    runs = []
    for cls in (Rprop, torch.optim.Rprop):
        params = parameters(torch.float32)
        optimizer = cls(params, foreach=foreach)
        for step in range(12):
            for i, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
                p.grad = None if (step + i) % 3 == 0 or i == 2 else g
            optimizer.step()
        runs.append(train(cls, params, 0))
        runs[-1].optimizer = optimizer
    assert runs[0].params[2] not in runs[0].optimizer.state
    assert_same(*runs)


def test_step_without_gradients_is_a_no_op():
    p = torch.ones(1, requires_grad=True)
    optimizer = Rprop([{"params": [p]}, {"params": []}])
    optimizer.step()
    assert p.item() == 1.0
    assert not optimizer.state
    Rprop([{"params": []}]).step()


@BY_PATH
def test_groups_added_later_match_torch(foreach):
    runs = []
    for cls in (Rprop, torch.optim.Rprop):
        a, b, c = (parameters(torch.float32, seed) for seed in range(3))
        one = train(
            cls, [{"params": a, "lr": 0.5, "etas": (0.1, 3.0)}, {"params": b, "maximize": True}], 0, foreach=foreach
        )
        one.params = a + b
        train_more(one, 5, seed=1)
        one.optimizer.add_param_group({"params": iter(c), "step_sizes": (0.1, 0.2)})
        one.params = a + b + c
        runs.append(train_more(one, 10, seed=2))
    assert_same(*runs)
    alone = train(Rprop, parameters(torch.float32, 0), 0)
    assert not torch.equal(runs[0].params[3], train_more(alone, 5, seed=1).params[3])


@BY_PATH
def test_mixed_dtypes_in_a_group_match_torch(foreach):
    kinds = (torch.float32, torch.bfloat16, torch.complex64, torch.float64)
    ours, theirs = ([p for d in kinds for p in parameters(d)] for _ in range(2))
    assert_same(train(Rprop, ours, 15, foreach=foreach), train(torch.optim.Rprop, theirs, 15, foreach=foreach))


@BY_PATH
def test_sparse_gradient_is_refused(foreach):
    params = [torch.ones(2, 2, requires_grad=True) for _ in range(3)]
    optimizer = Rprop([{"params": params[:1]}, {"params": params[1:]}], foreach=foreach)
    for p, g in zip(params, (torch.ones(2, 2), torch.ones(2, 2), torch.eye(2).to_sparse()), strict=True):
        p.grad = g
    with pytest.raises(RuntimeError, match="Rprop does not support sparse gradients, but that of parameter 1 is torch"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(2, 2)) for p in params)
    assert not optimizer.state


def test_capturable_on_cpu_is_refused():
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = Rprop([{"params": params[:1]}, {"params": params[1:], "capturable": True}])
    for p in params:
        p.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="If capturable=True, params and state_steps must be on an accelerator, but"):
        optimizer.step()
    assert all(p.item() == 1.0 for p in params)


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}])
@pytest.mark.parametrize("shapes", [((6000,), (7000,)), ((1,), (4,)), ((2, 3), (3, 2))])
def test_changed_shape_moves_nothing(shapes, options):
    first, changed = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(shapes[0]))
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


def test_transposed_gradient_matches_torch():
    runs = []
    for cls in (Rprop, torch.optim.Rprop):
        one = train(cls, [torch.ones(4, 6, requires_grad=True)], 0)
        for step in range(8):
            one.params[0].grad = gradients([torch.empty(6, 4)], step)[0].T
            one.optimizer.step()
        runs.append(one)
    assert_same(*runs)


def test_conjugated_gradient_is_resolved():
    p = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.tensor([1 + 1j, 1 - 1j, -1j]).conj()
    assert p.grad.is_conj()
    Rprop([p], lr=0.5).step()
    assert torch.equal(p.detach(), torch.tensor([-0.5 + 0.5j, -0.5 - 0.5j, -0.5j]))


def test_scheduler_sets_lr_of_late_parameters():
    a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = Rprop([a, b], lr=1.0, etas=(0.5, 2.0))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    a.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    b.grad = torch.ones(1)
    optimizer.step()
    assert a.item() == -3.0
    assert b.item() == -0.5


def test_differentiable_through_several_steps():
    """Each move is a multiple of D0 that depends only on signs, so dw/dw0 is 1 and dw/dD0 is their sum."""
    w0 = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    step_size0 = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    w = w0.clone()
    optimizer = Rprop([w], etas=(0.5, 2.0), differentiable=True)
    optimizer.state[w] = {"step": torch.tensor(0.0), "prev": torch.zeros_like(w), "step_size": step_size0.clone()}
    for _ in range(3):
        (w.grad,) = torch.autograd.grad(w.clone().square().sum(), w, create_graph=True)
        optimizer.step()
    # 1 - 0.5 - 1 = -0.5, then a flip without a move; 2 - 0.5 - 1 - 2 = -1.5; -3 + 0.5 + 1 + 2 = 0.5
    assert w.tolist() == [-0.5, -1.5, 0.5]
    w.sum().backward()
    assert w0.grad.tolist() == [1.0, 1.0, 1.0]
    assert step_size0.grad.tolist() == [-3.0, -7.0, 7.0]


def test_differentiable_matches_ordinary_step():
    losses = [float("nan") if step in (5, 9, 10) else 1.0 for step in range(20)]
    ordinary = train(Rprop, parameters(torch.float64), 0)
    for step, loss in enumerate(losses):
        set_gradients(ordinary.params, 1000 + step)
        ordinary.optimizer.step(loss=loss)
    params = [p.clone() for p in parameters(torch.float64)]
    optimizer = Rprop(params, differentiable=True)
    for step in range(20):
        set_gradients(params, 1000 + step)
        optimizer.step(loss=losses[step])
    assert all(torch.equal(p, q) for p, q in zip(params, ordinary.params, strict=True))
