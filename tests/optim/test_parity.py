"""Every implementation equals ``torch.optim.Rprop`` bit for bit, and mutants prove that these tests can fail."""

import importlib
import inspect

import pytest
import torch
from cases import BY_PATH, DTYPES, INTERPRETED, PATHS, SHARED, assert_same, gradients, parameters, train
from mutation import IMPLEMENTATIONS, fused_kernel, use_mutant

from lightning_rprop import Rprop
from lightning_rprop.optim import _foreach, _rule, rprop

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def assert_parity(dtype, kwargs, foreach, steps=8 if INTERPRETED else 40):
    ours, theirs = parameters(dtype), parameters(dtype)
    assert_same(
        train(Rprop, ours, steps, **kwargs, foreach=foreach),
        train(torch.optim.Rprop, theirs, steps, **kwargs, foreach=foreach),
    )


@BY_PATH
@pytest.mark.parametrize("kwargs", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trajectory_equals_torch(dtype, kwargs, foreach):
    assert_parity(dtype, kwargs, foreach)


# Errors found in public implementations, as replacements in the source.
MUTANTS = {
    _rule: {
        "gradient not zeroed after a flip": (
            "        if forget:\n            kept",
            "        if False:\n            kept",
        ),
        "moves at a flip": ("if forget and take_back is not True:", "if False:"),
        "one step stale": ("sign = torch.sign(grad, out", "sign = torch.sign(prev, out"),
        "zero product counts as a flip": ("flipped = torch.lt(agreement", "flipped = torch.le(agreement"),
        "zero product grows the step": (
            "agreement = torch.mul(sign, torch.sign(prev, out=space.size), out=space.size)",
            "agreement = (sign * prev.sign() + 0.5).sign()",
        ),
        "step adapted after the move": ("return sign, distance, size", "return sign, step_size.clone(), size"),
        "first move is not lr": (
            "agreement = torch.mul(sign, torch.sign(prev, out=space.size), out=space.size)",
            "agreement = sign * torch.where(prev == 0, sign, prev).sign()",
        ),
        "no upper bound": (".clamp_(step_size_min, step_size_max)", ".clamp_(min=step_size_min)"),
        "no lower bound": (".clamp_(step_size_min, step_size_max)", ".clamp_(max=step_size_max)"),
        "maximize ignored": ("if maximize:", "if False:"),
    },
    _foreach: {
        "gradient not zeroed after a flip": ("    if forget:\n        for grad", "    if False:\n        for grad"),
        "moves at a flip": ("if forget and take_back is not True:", "if False:"),
        "one step stale": ("signs = list(torch._foreach_sign(grads))", "signs = list(torch._foreach_sign(prevs))"),
        "zero product counts as a flip": ("agreement < 0", "agreement <= 0"),
        "factors swapped": ("torch._foreach_mul_(agreements, etaplus)", "torch._foreach_mul_(agreements, -etaplus)"),
        "no upper bound": ("torch._foreach_clamp_max_(sizes, step_size_max)", "pass"),
        "no lower bound": ("torch._foreach_clamp_min_(sizes, step_size_min)", "pass"),
        "maximize ignored": ("if maximize:", "if False:"),
    },
}


NUMBA_MUTANTS = {
    "gradient not zeroed after a flip": ("zero if flipped and forget else grad", "grad"),
    "moves at a flip": ("if flipped and forget and not take_back:", "if False:"),
    "one step stale": ("sign = sign_of(grad)", "sign = sign_of(prev)"),
    "zero product counts as a flip": ("flipped = agreement < zero", "flipped = agreement <= zero"),
    "factors swapped": ("etaplus if agreement > zero else etaminus", "etaminus if agreement > zero else etaplus"),
    "step adapted after the move": ("distance = before if flipped and take_back else step_size", "distance = before"),
    "no upper bound": ("return high if x > high else x", "return x"),
    "no lower bound": ("x = low if x < low else x", "pass"),
    "maximize ignored": ("if maximize:", "if False:"),
    "last element of a row left out": ("min(end - start, size)", "min(end - start, size - 1)"),
}
TRITON_MUTANTS = {
    "gradient not zeroed after a flip": ("grad = tl.where(forget & flipped, 0.0, grad)", "pass"),
    "moves at a flip": ("sign = tl.where(forget & flipped & (take_back == 0), 0.0, sign)", "pass"),
    "one step stale": ("sign = (grad > 0).to(NUMBER) - (grad < 0)", "sign = (prev > 0).to(NUMBER) - (prev < 0)"),
    "zero product counts as a flip": ("flipped = agreement < 0", "flipped = agreement <= 0"),
    "factors swapped": (
        "agreement > 0, etaplus, tl.where(flipped, etaminus, 1.0)",
        "agreement > 0, etaminus, tl.where(flipped, etaplus, 1.0)",
    ),
    "no upper bound": ("step_size = tl.where(step_size > step_size_max, step_size_max, step_size)", "pass"),
    "no lower bound": ("step_size = tl.where(step_size < step_size_min, step_size_min, step_size)", "pass"),
    "maximize ignored": ("tl.where(maximize, grad * -1.0, grad)", "grad"),
    "block assigned to the next row": ("(firsts <= block).to(tl.int32)) - 1", "(firsts < block).to(tl.int32))"),
}
MUTANTS[fused_kernel] = TRITON_MUTANTS if INTERPRETED else NUMBA_MUTANTS


@pytest.mark.parametrize(
    ("module", "mutation"),
    [pytest.param(m, x, id=f"{path}: {x}") for m, path in zip(MUTANTS, PATHS, strict=True) for x in MUTANTS[m]],
)
def test_parity_detects_wrong_code(module, mutation, monkeypatch):
    old, new = MUTANTS[module][mutation]
    assert inspect.getsource(module).count(old) == 1, "the mutation no longer fits the source"
    use_mutant(monkeypatch, module, (old, new))

    def check_all_cases():
        for kwargs in SHARED.values():
            assert_parity(torch.float32, kwargs, foreach=IMPLEMENTATIONS[module])

    with pytest.raises(AssertionError, match="differs"):
        check_all_cases()


def test_trajectory_matches_hand_calculation():
    """All numbers are exact in binary."""
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = Rprop([w], lr=1.0, etas=(0.5, 2.0), step_sizes=(0.25, 4.0))
    rows = []
    for g in (1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 0.0, -1.0, -1.0, 1.0):
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[w]
        rows.append((w.item(), state["step_size"].item(), state["prev"].item()))
    assert rows == [  # weight, step size, stored gradient
        (-1.0, 1.0, 1.0),  # the first move is lr
        (-3.0, 2.0, 1.0),  # grown, then moved
        (-7.0, 4.0, 1.0),
        (-11.0, 4.0, 1.0),  # at the upper bound
        (-11.0, 2.0, 0.0),  # flip: the step size shrinks, no move, the gradient is forgotten
        (-13.0, 2.0, 1.0),  # so this is not a flip
        (-13.0, 1.0, 0.0),
        (-12.0, 1.0, -1.0),
        (-12.0, 1.0, 0.0),  # zero gradient: no move, no adaptation
        (-11.0, 1.0, -1.0),
        (-9.0, 2.0, -1.0),
        (-9.0, 1.0, 0.0),
    ]


@BY_PATH
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_tiny_gradients_flip_unlike_in_torch(dtype, foreach):
    tiny = torch.finfo(dtype).smallest_normal
    assert torch.tensor(tiny, dtype=dtype) * torch.tensor(tiny, dtype=dtype) == 0
    runs = []
    for cls, g in ((Rprop, tiny), (Rprop, 1.0), (torch.optim.Rprop, tiny)):
        p = torch.zeros(2, dtype=dtype, requires_grad=True)
        optimizer = cls([p], foreach=foreach)
        for sign in (1, 1, 1, -1, 1):
            p.grad = torch.tensor([sign * g, -sign * g], dtype=dtype)
            optimizer.step()
        runs.append((p.detach(), optimizer.state[p]["step_size"]))
    ours, ours_scaled, theirs = runs
    assert torch.equal(ours[0], ours_scaled[0])
    assert torch.equal(ours[1], ours_scaled[1])
    assert not torch.equal(ours[1], theirs[1])
    assert torch.equal(theirs[1], torch.full((2,), 0.01, dtype=dtype))  # torch never adapts


@BY_PATH
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_nan_entry_is_skipped_unlike_in_torch(dtype, foreach):
    """Each element but the last gets a NaN at another step, and must end like the last, which gets it at the end."""
    tape = [1.0, 1.0, -1.0, -1.0, 1.0, 0.0, 1.0]
    p = torch.zeros(len(tape) + 1, dtype=dtype, requires_grad=True)
    optimizer = Rprop([p], foreach=foreach)
    for i in range(len(tape) + 1):
        grad = torch.tensor([tape[i - (i > hole)] if i != hole else torch.nan for hole in range(len(tape))] + [0.0])
        grad[-1] = tape[i] if i < len(tape) else torch.nan
        p.grad = grad.to(dtype)
        optimizer.step()
    for value in (p.detach(), optimizer.state[p]["prev"], optimizer.state[p]["step_size"]):
        assert torch.equal(value, value[-1].expand_as(value))
    # the flip after a NaN, which torch misses
    assert optimizer.state[p]["step_size"][-1] != 0.01


@BY_PATH
def test_infinite_gradients_have_a_sign(foreach):
    runs = []
    for g in (1.0, torch.inf):
        p = torch.zeros(2, requires_grad=True)
        optimizer = Rprop([p], foreach=foreach)
        for sign in (1, 1, -1, -1):
            p.grad = torch.tensor([sign * g, -sign * g])
            optimizer.step()
        runs.append((p.detach(), optimizer.state[p]["step_size"]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@BY_PATH
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_decay_is_added_to_the_gradient(dtype, maximize, foreach):
    """The run equals one with gradients g + decay * w, or -g + decay * w for maximize, without both options."""
    real = torch.view_as_real if dtype.is_complex else torch.Tensor.detach
    ours, by_hand = parameters(dtype), parameters(dtype)
    a = Rprop(ours, weight_decay=0.3, maximize=maximize, foreach=foreach)
    b = Rprop(by_hand, foreach=foreach)
    undecayed = Rprop(without := parameters(dtype), maximize=maximize, foreach=foreach)
    for step in range(6 if INTERPRETED else 30):
        for p, q, o, g in zip(ours, by_hand, without, gradients(ours, step), strict=True):
            p.grad = o.grad = g
            decayed = real(q.detach()) * 0.3 + (-real(g) if maximize else real(g))
            q.grad = torch.view_as_complex(decayed) if dtype.is_complex else decayed
        a.step()
        b.step()
        undecayed.step()
    assert all(torch.equal(real(p), real(q)) for p, q in zip(ours, by_hand, strict=True))
    assert not all(torch.equal(real(p), real(o)) for p, o in zip(ours, without, strict=True))


@BY_PATH
def test_functional_form_equals_torch(foreach):
    torch_rprop = importlib.import_module("torch.optim.rprop").rprop
    results = []
    for function in (rprop, torch_rprop):
        params = [p.detach() for p in parameters(torch.float32) + parameters(torch.complex64)]
        prevs = [torch.zeros_like(p) for p in params]
        step_sizes = [torch.full_like(p, 0.01 + 0.01j if p.is_complex() else 0.01) for p in params]
        steps = [torch.tensor(0.0) for _ in params]
        for i in range(10):
            function(
                params, gradients(params, i), prevs, step_sizes, steps, foreach=foreach, has_complex=True,
                step_size_min=1e-6, step_size_max=50, etaminus=0.5, etaplus=1.2,
            )  # fmt: skip
        results.append(params + prevs + step_sizes + steps)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_functional_form_refuses_plain_counters():
    p = torch.ones(1)
    with pytest.raises(RuntimeError, match="`state_steps` argument must contain a list of singleton tensors"):
        rprop([p], [p], [p], [p], [1], step_size_min=1e-6, step_size_max=50, etaminus=0.5, etaplus=1.2)
