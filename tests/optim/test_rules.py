"""Every implementation of every variant matches the scalar twin."""

import pytest
import torch
from cases import BY_PATH, VARIANTS
from tapes import OPTIONS, TAPES, round_gradients, rprop_rows, twin_rows
from twin import ROUND, twin

from lightning_rprop import Rprop


@BY_PATH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tape", TAPES.values(), ids=TAPES)
def test_tapes_match_twin(variant, tape, dtype, foreach):
    rounded = ROUND[str(dtype).removeprefix("torch.")]
    assert rprop_rows(variant, tape, dtype, foreach=foreach) == twin_rows(
        variant, round_gradients(tape, rounded), rounded
    )


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tape", TAPES.values(), ids=TAPES)
def test_maximizing_negative_matches_twin(variant, tape, foreach):
    negative = [(-g, -loss) for g, loss in tape]
    rows = rprop_rows(variant, negative, maximize=True, foreach=foreach)
    assert rows == twin_rows(variant, tape)


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
def test_tape_matches_hand_calculation(variant, foreach):
    """The gradient flips twice: first with a risen loss, then with a fallen one."""
    tape = [(1, 5), (1, 4), (-1, 6), (-1, 3), (1, 2)]
    rows = rprop_rows(variant, tape, lr=1.0, etas=(0.5, 2.0), step_sizes=(0.25, 8.0), foreach=foreach)
    assert [w for w, _, _ in rows] == {
        "rprop-": [-1.0, -3.0, -2.0, 0.0, -1.0],  # moves by 1 at the first flip and by 2 at the second
        "rprop+": [-1.0, -3.0, -1.0, 0.0, -1.0],  # takes back 2, then 1
        "irprop-": [-1.0, -3.0, -3.0, -2.0, -2.0],  # stays at both
        "irprop+": [-1.0, -3.0, -1.0, 0.0, 0.0],  # takes back 2, then stays
    }[variant]
    assert [D for _, D, _ in rows] == [1.0, 2.0, 1.0, *((2.0, 1.0) if variant == "rprop-" else (1.0, 0.5))]


FUNCTIONS = {
    "quadratic": lambda x: (2 * x, x * x),
    "|x|": lambda x: ((x > 0) * 1.0 - (x < 0) * 1.0, abs(x)),
    "double well": lambda x: (4 * x * (x * x - 1), (x * x - 1) * (x * x - 1)),
    "steps": lambda x: ((x * 4 // 1) * 0.25 + 0.125, x * x * 0.5),
}


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_match_twin(variant, function, foreach):
    options = {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}
    w = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    optimizer = Rprop([w], variant=variant, **options, foreach=foreach)

    def closure():
        with torch.no_grad():
            g, loss = function(w.detach().clone())
            w.grad = torch.as_tensor(g, dtype=torch.float64)
        return loss

    rows = []
    for _ in range(200):
        optimizer.step(closure)
        rows.append((w.item(), optimizer.state[w]["step_size"].item(), optimizer.state[w]["prev"].item()))
    assert rows == list(twin(variant, function, 200, w=1.7, **options))


def rosenbrock(w):
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2 + (w[2] - w[1]) ** 2


def ripple(w):
    return (w.square() + 0.3 * torch.sin(12 * w)).sum() + (w[0] * w[1]).cos() + w[2].abs()


@BY_PATH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", [rosenbrock, ripple])
def test_coupled_functions_match_twin(function, variant, dtype, foreach):
    options = {"lr": 0.05, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}
    w = torch.tensor([-1.2, 1.0, 0.7], dtype=dtype, requires_grad=True)
    start, rounded = w.tolist(), ROUND[str(dtype).removeprefix("torch.")]
    optimizer = Rprop([w], variant=variant, **options, foreach=foreach)
    tape, rows = [], []

    def closure():
        optimizer.zero_grad()
        loss = function(w)
        loss.backward()
        tape.append((w.grad.tolist(), loss.item()))
        return loss

    for _ in range(300):
        optimizer.step(closure)
        rows.append((w.tolist(), optimizer.state[w]["step_size"].tolist(), optimizer.state[w]["prev"].tolist()))
    for i in range(3):
        tape_of_weight = iter([(gradients[i], loss) for gradients, loss in tape])
        expected = twin(variant, lambda _, rows=tape_of_weight: next(rows), 300, start[i], rounded=rounded, **options)
        assert [tuple(values[i] for values in row) for row in rows] == list(expected)


@BY_PATH
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_comes_before_sign(variant, maximize, foreach):
    tape = [(0.5, 9), (0.5, 8), (-0.1, 9), (-0.1, 7), (0.2, 8), (-0.4, 9), (0.4, 3), (0.0, 2), (0.0, 4), (0.1, 5)]
    direction = -1 if maximize else 1
    rows = rprop_rows(
        variant,
        [(direction * g, direction * E) for g, E in tape],
        weight_decay=0.25,
        maximize=maximize,
        foreach=foreach,
    )
    remaining = iter(tape)

    def evaluate(w):
        g, loss = next(remaining)
        return g + w * 0.25, loss

    assert rows == list(twin(variant, evaluate, len(tape), 0.0, **OPTIONS))
    assert [w for w, _, _ in rows] != [w for w, _, _ in twin_rows(variant, tape)]
