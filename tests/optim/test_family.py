"""The four variants: every path equals the scalar twin, on tapes that tell wrong rules apart, and at random."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
import twin as twin_module
from cases import INTERPRETED, PATHS
from hypothesis import given, settings
from hypothesis import strategies as st
from lit import Batches, Net, all_equal, fit_in_two_parts, trainer
from mutation import IMPLEMENTATIONS, mutated, put_mutant_in
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from twin import ROUND, twin

from lightning_rprop import Rprop
from lightning_rprop.optim._rule import AT_FLIP

VARIANTS = tuple(AT_FLIP)
BY_PATH = pytest.mark.parametrize("path", [{"foreach": value} for value in PATHS.values()], ids=PATHS)
INF, NAN = math.inf, math.nan
OPTIONS = {"lr": 0.5, "etas": (0.5, 1.2), "step_sizes": (0.2, 1.0)}

# Gradients and losses by step. A tape without losses has falling ones.
TAPES = {
    "no flip": [1, 2, 3, 4, 5, 6],
    "flips": [1, 1, -1, -1, -1, 1, 1],
    "flip after flip": [1, -1, 1, -1, -1, 1, -1, 1],
    "exact zeros": [0, 1, 0, 1, 1, 0, -1, -1, 0, 0, 1, -1],
    "zero after a flip": [1, 1, -1, 0, -1, 0, 1],
    "at the upper bound": [1] * 7 + [-1, 1, 1, 1, 1, 1, 1],
    "at the lower bound": [1, -1] * 7,
    "negative zero": [-0.0, 1, -0.0, -1, -1, -0.0, 1],
    "infinities": [INF, INF, -INF, 1, 1, -INF, -1],
    "tiny": [1e-7, 1e-7, -1e-7, -1e-7, 1e-7, 1e-7, 1e-7],
    "huge": [3e4, 6e4, -6e4, 6e4, -6e4, -6e4],
    "NaN": [NAN, 1, NAN, 1, -1, NAN, -1, 1, NAN, NAN, -1],
    "NaN between a move and its flip": [1, 1, NAN, -1, -1],
    "loss equal at a flip": [(1, 5), (1, 4), (-1, 4), (-1, 3), (1, 3), (1, 2)],
    "loss risen at every flip": [(1, 5), (1, 4), (-1, 6), (-1, 5), (1, 7), (1, 8), (-1, 9)],
    "loss risen against the one before, not against the first": [(1, 9), (1, 2), (-1, 3), (-1, 1), (1, 2), (1, 3)],
    "loss risen against the best, not against the one before": [(1, 1), (1, 5), (-1, 4), (-1, 6), (1, 5), (1, 2)],
    "loss risen where nothing flips": [(1, 1), (1, 2), (1, 3), (-1, 2), (-1, 3), (-1, 4)],
    "loss NaN": [(1, 3), (1, 2), (-1, NAN), (-1, 1), (1, NAN), (1, NAN), (-1, 5), (-1, 4), (1, NAN)],
    "loss infinite": [(1, INF), (1, INF), (-1, INF), (-1, 1), (1, INF), (-1, 2), (1, -INF), (-1, -INF)],
    "loss at the first step NaN": [(1, NAN), (-1, 5), (-1, 4), (1, 5)],
}
TAPES = {
    name: [row if isinstance(row, tuple) else (row, -i) for i, row in enumerate(tape)] for name, tape in TAPES.items()
}


def by_twin(variant, tape, rounded=float, source=twin, **options):
    rows = iter(tape)
    return list(source(variant, lambda _: next(rows), len(tape), w=0.0, rounded=rounded, **(OPTIONS | options)))


def by_rprop(variant, tape, dtype=torch.float64, **options):
    """The same from an optimizer, for one weight."""
    w = torch.zeros((), dtype=dtype, requires_grad=True)
    optimizer = Rprop([w], variant=variant, **(OPTIONS | options))
    rows = []
    for g, loss in tape:
        w.grad = torch.tensor(g, dtype=dtype)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
        state = optimizer.state[w]
        rows.append((w.item(), state["step_size"].item(), state["prev"].item()))
    return rows


def cast(tape, rounded):
    """The tape as a dtype sees it."""
    return [(g if math.isnan(g) or math.isinf(g) else rounded(g), loss) for g, loss in tape]


@BY_PATH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tape", TAPES.values(), ids=TAPES)
def test_equals_the_twin(variant, tape, dtype, path):
    rounded = ROUND[str(dtype).removeprefix("torch.")]
    assert by_rprop(variant, tape, dtype, **path) == by_twin(variant, cast(tape, rounded), rounded)


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tape", TAPES.values(), ids=TAPES)
def test_maximizing_the_negative_is_the_same_path(variant, tape, path):
    negative = [(-g, -loss) for g, loss in tape]
    rows = by_rprop(variant, negative, maximize=True, **path)
    assert rows == by_twin(variant, tape)


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_tapes_by_hand(variant, path):
    """Moves at two flips: the first with a risen loss, the second with a fallen one. D: 1, 2, 1, 1, 0.5."""
    tape = [(1, 5), (1, 4), (-1, 6), (-1, 3), (1, 2)]
    rows = by_rprop(variant, tape, lr=1.0, etas=(0.5, 2.0), step_sizes=(0.25, 8.0), **path)
    assert [w for w, _, _ in rows] == {
        "rprop-": [-1.0, -3.0, -2.0, 0.0, -1.0],  # moves on by 1, then as ever: 2, 1
        "rprop+": [-1.0, -3.0, -1.0, 0.0, -1.0],  # takes back 2, and 1
        "irprop-": [-1.0, -3.0, -3.0, -2.0, -2.0],  # stays, and stays
        "irprop+": [-1.0, -3.0, -1.0, 0.0, 0.0],  # takes back 2, stays
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
def test_equals_the_twin_on_functions(variant, function, path):
    options = {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}
    w = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    optimizer = Rprop([w], variant=variant, **options, **path)

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
def test_each_weight_of_a_coupled_function_follows_the_twin(function, variant, dtype, path):
    options = {"lr": 0.05, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}
    w = torch.tensor([-1.2, 1.0, 0.7], dtype=dtype, requires_grad=True)
    start, rounded = w.tolist(), ROUND[str(dtype).removeprefix("torch.")]
    optimizer = Rprop([w], variant=variant, **options, **path)
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
        own = iter([(gradients[i], loss) for gradients, loss in tape])
        path_of_twin = twin(variant, lambda _, own=own: next(own), 300, start[i], rounded=rounded, **options)
        assert [tuple(values[i] for values in row) for row in rows] == list(path_of_twin)


@BY_PATH
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_is_added_before_the_sign_is_taken(variant, maximize, path):
    tape = [(0.5, 9), (0.5, 8), (-0.1, 9), (-0.1, 7), (0.2, 8), (-0.4, 9), (0.4, 3), (0.0, 2), (0.0, 4), (0.1, 5)]
    direction = -1 if maximize else 1
    rows = by_rprop(
        variant, [(direction * g, direction * E) for g, E in tape], weight_decay=0.25, maximize=maximize, **path
    )
    own = iter(tape)

    def evaluate(w):
        g, loss = next(own)
        return g + w * 0.25, loss

    assert rows == list(twin(variant, evaluate, len(tape), 0.0, **OPTIONS))
    assert [w for w, _, _ in rows] != [w for w, _, _ in by_twin(variant, tape)]


# The classes of error in public implementations, and some more: what to change in the twin.
WRONG = {
    "a: moves at a flip, by the new step size": (
        'if s < 0 and variant != "rprop-":',
        'if s < 0 and variant == "none":',
    ),
    "a: stands still, but moves by the shrunk step": ("w = rounded(w - last_move)", "w = rounded(w - sign(g) * D)"),
    "b: a product of 0 counts as no flip and grows": ("if s > 0:", "if s >= 0:"),
    "b: a product of 0 counts as a flip": ("s < 0", "s <= 0"),
    "c: the gradient is not forgotten": ("            g_before = 0.0\n", "            g_before = g\n"),
    "c: the new gradient is forgotten, not the stored one": ("            g_before = 0.0\n", "            g = 0.0\n"),
    "d: one step late": ("w = rounded(w + last_move)", "w, late = rounded(w + late), last_move"),
    "d: moves before it adapts": ("last_move = -sign(g) * D\n", "last_move = -sign(g) * (D0 if s else D)\n"),
    "e: the first move is adapted": ("g_before = 0.0\n    E", "g_before = evaluate_first\n    E"),
    "f: compares with the best loss": ("E_before = E\n", "E_before = min(E, E_before)\n"),
    "f: equal counts as risen": ("E > E_before", "E >= E_before"),
    "f: never compares": ('(variant == "irprop+" and rose)', '(variant == "irprop+")'),
    "f: compares with the loss before last": ("E_before = E\n", "E_before, older = older, E\n"),
    "f: NaN counts as fallen": ("E = math.inf\n", "E = -math.inf\n"),
    "rprop+ does not take back": ('if variant == "rprop+" or', "if"),
    "rprop- forgets": (' and variant != "rprop-"', ""),
    "no upper bound": ("min(max(rounded(D), low), high)", "max(rounded(D), low)"),
    "no lower bound": ("min(max(rounded(D), low), high)", "min(rounded(D), high)"),
    "NaN is remembered": (
        "yield w, D, g_before\n            continue",
        "g_before = g\n            yield w, D, g_before\n            continue",
    ),
}


# What some of them refer to.
NAMES_FOR_WRONG = (
    ("    last_move = 0.0\n", "    last_move = late = 0.0\n    older = math.inf\n"),
    ("    w = rounded(w)\n", "    w = rounded(w)\n    evaluate_first = 1.0\n"),
    ("        s = sign(g)", "        D0 = D\n        s = sign(g)"),
)


def numbers(rows):
    """The rows in a form in which NaN equals itself, and 1 equals 1.0."""
    return [["NaN" if math.isnan(value) else value for value in row] for row in rows]


def told_apart(run):
    """Whether the rows differ from the twin's on any tape, for any variant."""
    return any(
        numbers(run(variant, tape)) != numbers(by_twin(variant, tape))
        for tape in TAPES.values()
        for variant in VARIANTS
    )


@pytest.mark.parametrize("mutation", WRONG.values(), ids=WRONG)
def test_the_tapes_tell_a_wrong_rule_apart(mutation):
    wrong = mutated(twin_module, mutation, *NAMES_FOR_WRONG).twin
    assert told_apart(lambda variant, tape: by_twin(variant, tape, source=wrong))
    assert not told_apart(by_twin)


# The same for the implementations: what to change in _rule.py, in _foreach.py, in the Numba and the Triton kernel.
WRONG_CODE = {
    "takes back by the shrunk step size": (
        ("torch.where(flipped, step_size, size, out=space.distance)", "size"),
        ("zip(flipped, step_sizes, sizes", "zip(flipped, sizes, sizes"),
        ("distance = before if flipped and take_back else step_size", "distance = step_size"),
        ("distance = tl.where(flipped & take_back, before, step_size)", "distance = step_size"),
    ),
    "takes back when the loss fell": (
        ("~take_back", "take_back"),
        ("& ~take_back", "& take_back"),
        ("forget and not take_back", "forget and take_back"),
        ("take_back == 0", "take_back != 0"),
    ),
    "always takes back": (
        ("forget and take_back is not True", "forget and take_back is False"),
        ("forget and take_back is not True", "forget and take_back is False"),
        ("        for i in range", "        take_back = True\n        for i in range"),
        ("else tl.load(take_back_at)", "else True"),
    ),
    "never takes back": (
        ("size if take_back is False else", "size if True else"),
        ("if take_back is False:", "if True:"),
        ("before if flipped and take_back", "before if False"),
        ("flipped & take_back, before", "flipped & False, before"),
    ),
    "rprop- forgets": (
        ("if forget:", "if True:"),
        ("if forget:", "if True:"),
        ("and forget else grad", "else grad"),
        ("if FORGET:\n        grad", "if True:\n        grad"),
    ),
    "does not forget": (
        ("if forget:", "if False:"),
        ("if forget:", "if False:"),
        ("zero if flipped and forget else grad", "grad"),
        ("if FORGET:\n        grad", "if False:\n        grad"),
    ),
    "multiplies gradients": (
        ("torch.mul(sign, torch.sign(prev, out=space.size), out=space.size)", "(grad * prev).sign()"),
        (
            "(signs, torch._foreach_sign(prevs))",
            "([g.mul(p).sign() for g, p in zip(grads, prevs)], [1.0] * len(prevs))",
        ),
        ("sign * sign_of(prev)", "sign_of(grad * prev)"),
        (
            "sign * ((prev > 0).to(NUMBER) - (prev < 0).to(NUMBER))",
            "(grad * prev > 0).to(NUMBER) - (grad * prev < 0).to(NUMBER)",
        ),
    ),
    "remembers NaN": (
        ("torch.where(torch.ne(grad, grad, out=space.mask), prev, grad, out=space.kept)", "grad.clone()"),
        ("torch.where(grad.isnan(), prev, grad) for", "grad.clone() for"),
        ("grad = grad if grad == grad else prev", "pass"),
        ("grad = tl.where(grad == grad, grad, prev)", "pass"),
    ),
}


@pytest.fixture
def underflow(monkeypatch):
    monkeypatch.setitem(TAPES, "underflow", [(1e-200 * g, loss) for g, loss in TAPES["flips"]])


@pytest.mark.parametrize("module", IMPLEMENTATIONS, ids=PATHS)
@pytest.mark.parametrize("mutations", WRONG_CODE.values(), ids=WRONG_CODE)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
def test_the_tapes_tell_wrong_code_apart(mutations, module, underflow, monkeypatch):
    *unfused, numba, triton = mutations
    mutation = dict(zip(IMPLEMENTATIONS, (*unfused, triton if INTERPRETED else numba), strict=True))[module]
    put_mutant_in(monkeypatch, module, mutation)
    assert told_apart(lambda variant, tape: by_rprop(variant, tape, foreach=IMPLEMENTATIONS[module]))


@BY_PATH
def test_the_tapes_do_not_tell_right_code_apart(path, underflow):
    assert not told_apart(lambda variant, tape: by_rprop(variant, tape, **path))


# ----------------------------------------------------------------------------------------------------- at random

REALS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30]
)
HISTORIES = st.lists(st.tuples(st.lists(REALS, min_size=4, max_size=4), REALS), min_size=1, max_size=12)


def rows_by_cut(cut, variant, history, foreach, **options):
    """Weights and step sizes ``(steps, 2, 4)`` of four weights: in one tensor, in four, or in a complex one of two."""
    params = {
        "joined": [torch.zeros(4, dtype=torch.float64)],
        "split": [torch.zeros((), dtype=torch.float64) for _ in range(4)],
        "complex": [torch.zeros(2, dtype=torch.complex128)],
    }[cut]
    for p in params:
        p.requires_grad_()
    optimizer = Rprop(params, variant=variant, foreach=foreach, **options)
    rows = []
    for gradients, loss in history:
        flat = torch.tensor(gradients, dtype=torch.float64)
        cuts = {"joined": [flat], "split": flat.unbind(), "complex": [torch.view_as_complex(flat.reshape(2, 2))]}[cut]
        for p, g in zip(params, cuts, strict=True):
            p.grad = g.clone()
        optimizer.step(loss=loss)
        both = ([p.detach() for p in params], [optimizer.state[p]["step_size"] for p in params])
        real = [[torch.view_as_real(t) if t.is_complex() else t for t in tensors] for tensors in both]
        rows.append(torch.stack([torch.cat([t.reshape(-1) for t in tensors]) for tensors in real]))
    return torch.stack(rows)


@settings(deadline=None, max_examples=150)
@given(
    history=HISTORIES,
    etas=st.tuples(st.floats(0.05, 0.95), st.floats(1.05, 4.0)),
    bounds=st.tuples(st.floats(1e-3, 0.5), st.floats(0.5, 5.0)),
    lr=st.floats(1e-3, 5.0),
    maximize=st.booleans(),
)
def test_all_paths_at_once_on_random_histories(history, etas, bounds, lr, maximize):
    """Every path and every cut of the weights into tensors agrees with the others, and with the twin of each weight."""
    lr = min(max(lr, bounds[0]), bounds[1])  # a NaN before the first move would leave it unclamped in the twin
    options = {"lr": lr, "etas": etas, "step_sizes": bounds}
    direction = -1 if maximize else 1
    for variant in VARIANTS:
        first, *others = (
            rows_by_cut(cut, variant, history, foreach, maximize=maximize, **options)
            for cut in ("joined", "split", "complex")
            for foreach in PATHS.values()
        )
        assert all(torch.equal(first, other) for other in others)
        assert bounds[0] <= first[:, 1].min() <= first[:, 1].max() <= bounds[1]
        for i in range(4):
            tape = [(direction * gradients[i], direction * loss) for gradients, loss in history]
            rows = by_twin(variant, tape, **options)
            assert first[:, :, i].tolist() == [[w, D] for w, D, _ in rows]


@settings(deadline=None, max_examples=50)
@given(history=HISTORIES, scale=st.floats(1e-150, 1e150), variant=st.sampled_from(VARIANTS))
def test_only_the_signs_count(history, scale, variant):
    tape = [(gradients[0], loss) for gradients, loss in history]
    scaled = [(g * scale if abs(g) > 1e-100 else g, loss) for g, loss in tape]
    assert [row[:2] for row in by_rprop(variant, tape)] == [row[:2] for row in by_rprop(variant, scaled)]


@settings(deadline=None, max_examples=50)
@given(history=HISTORIES, variant=st.sampled_from(VARIANTS))
def test_the_mirrored_problem_has_the_mirrored_path(history, variant):
    tape = [(gradients[0], loss) for gradients, loss in history]
    mirrored = by_rprop(variant, [(-g, loss) for g, loss in tape])
    assert [(-w, D) for w, D, _ in mirrored] == [(w, D) for w, D, _ in by_rprop(variant, tape)]


# ------------------------------------------------------------------------------------------------ loss and closure


def descend(variant, steps=30, params=None, **options):
    """A coupled quadratic with some curvature between the weights, so that signs flip at different times."""
    torch.manual_seed(0)
    curvature = torch.randn(6, 6, dtype=torch.float64)
    curvature = curvature @ curvature.T
    w = torch.randn(6, dtype=torch.float64).requires_grad_() if params is None else params
    optimizer = Rprop([w], variant=variant, **options)

    def closure():
        optimizer.zero_grad()
        loss = w @ curvature @ w
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(steps)]
    return w, optimizer, closure, losses


@pytest.mark.parametrize("form", ["closure", "closure of a float", "tensor", "float", "shape (1,)", "closure and loss"])
def test_every_way_to_hand_the_loss_over(form):
    expected, _, _, losses = descend("irprop+")
    assert any(b > a for a, b in pairwise(losses))  # there was something to take back
    w, optimizer, closure, _ = descend("irprop+", 0)
    for _ in range(30):
        if form == "closure":
            optimizer.step(closure)
        elif form == "closure of a float":
            optimizer.step(lambda: closure().item())
        elif form == "closure and loss":
            loss = closure()
            optimizer.step(lambda: None, loss=loss)
        else:
            loss = closure()
            result = optimizer.step(loss={"tensor": loss, "float": loss.item()}.get(form, loss.reshape(1)))
            assert result is None
    assert torch.equal(w, expected)


@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
def test_without_a_loss_irprop_plus_says_what_to_do(options):
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = Rprop([{"params": params[:1]}, {"params": params[1:], "variant": "irprop+", **options}])
    for p in params:
        p.grad = torch.ones(1)
    for call in (optimizer.step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(
            RuntimeError, match=r"variant='irprop\+' .* got none. Call step\(closure\) .* or step\(loss=loss\)"
        ):
            call()
    for wrong in (torch.ones(2), "0.5", torch.ones(0)):
        with pytest.raises(ValueError, match="loss must be a number or a tensor of one element, got"):
            optimizer.step(loss=wrong)
    assert all(p.item() == 1.0 for p in params)
    assert not optimizer.state


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["closure", "loss"])
def test_own_loss_on_each_process_is_refused(how, processes, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = Rprop([{"params": params[:1], "variant": "rprop+"}, {"params": params[1:]}], variant="irprop+")
    for p in params:
        p.grad = torch.ones(1)

    def step():
        optimizer.step(lambda: 1.0) if how == "closure" else optimizer.step(loss=torch.tensor(1.0))

    if processes > 1:
        words = r"each of the 2 processes, .* Train with the FullBatch callback, or .* optimizer.shared_loss = True"
        with pytest.raises(RuntimeError, match=words):
            step()
        assert [p.item() for p in params] == [1.0, 1.0]
        assert not optimizer.state
        optimizer.shared_loss = True
    step()
    assert optimizer.state[params[1]]["step"] == 1


def test_without_gradients_irprop_plus_needs_no_loss():
    Rprop([torch.ones(1, requires_grad=True)], variant="irprop+").step()


def test_the_loss_is_kept_as_a_copy_of_its_value():
    w = torch.zeros((), requires_grad=True)
    optimizer = Rprop([w], variant="irprop+", **OPTIONS)
    loss = torch.tensor(1.0)
    for g, value in ((1.0, 1.0), (1.0, 2.0), (-1.0, 3.0)):  # one buffer, as a captured graph has it
        w.grad = torch.tensor(g)
        loss.fill_(value)
        optimizer.step(loss=loss)
    assert optimizer.state[w]["prev_loss"].item() == 3.0
    assert w.item() == -0.5  # risen: taken back


def test_the_kept_loss_stays_where_it_is_as_a_captured_graph_needs():
    w, optimizer, closure, _ = descend("irprop+", 1)
    address = optimizer.state[w]["prev_loss"].data_ptr()
    optimizer.step(closure)
    assert optimizer.state[w]["prev_loss"].data_ptr() == address


def test_a_loss_of_more_digits_after_one_of_fewer():
    """1 + 1e-12 is 1 in float32: it must not be kept so, or the next 1 + 5e-13 would not have fallen."""
    tape = [(1, 2.0), (1, 1 + 1e-12), (-1, 1 + 5e-13)]
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = Rprop([w], variant="irprop+", **OPTIONS)
    for i, (g, loss) in enumerate(tape):
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64 if i else torch.float32))
    assert w.item() == by_twin("irprop+", tape)[-1][0]


def test_groups_with_different_variants():
    tape = [(1, 5), (1, 4), (-1, 6), (-1, 3), (1, 2), (1, 1)]
    params = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in VARIANTS]
    groups = [{"params": p, "variant": v} for p, v in zip(params, VARIANTS, strict=True)]
    optimizer = Rprop(groups, **OPTIONS)
    for g, loss in tape:
        for p in params:
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step(loss=loss)
    assert [p.item() for p in params] == [by_twin(v, tape)[-1][0] for v in VARIANTS]
    assert len({p.item() for p in params}) == 4


@pytest.mark.filterwarnings("ignore:The loaded state replaced options")  # test_loading.py
@pytest.mark.parametrize("saved_at", range(8))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_saved_at_any_step_and_continued(variant, dtype, saved_at, tmp_path):
    """In bfloat16 a loss would lose the digits by which these differ, if it were cast like other state."""
    tape = [(1, 5.0), (1, 4.002), (-1, 4.001), (-1, 4.003), (1, 4.004), (1, 4.0), (-1, 3.9), (1, 4.9)]
    params = [torch.zeros((), dtype=dtype, requires_grad=True) for _ in range(2)]
    optimizer = Rprop(params, variant=variant, **OPTIONS)
    for i, (g, loss) in enumerate(tape):
        if i == saved_at:
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            params = [p.detach().clone().requires_grad_() for p in params]
            optimizer = Rprop(params)
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for p in params:
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
    rounded = ROUND[str(dtype).removeprefix("torch.")]
    assert [p.item() for p in params] == [by_twin(variant, tape, rounded)[-1][0]] * 2


def test_torchs_rprop_takes_a_checkpoint_of_irprop_plus():
    _, ours, _, _ = descend("irprop+", 5)
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Rprop([p])
    theirs.load_state_dict(ours.state_dict())
    p.grad = torch.ones(6, dtype=torch.float64)
    theirs.step()
    assert theirs.state[p]["step"] == 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_through_a_lightning_checkpoint(variant, tmp_path):
    def make(module):
        return Rprop(module.parameters(), lr=0.1, variant=variant)

    whole, _, resumed = fit_in_two_parts(tmp_path, make, make, make, batches=5)
    assert all_equal(whole, resumed)
    raw = Net(make)
    optimizer, batch, losses = make(raw), next(iter(Batches(1))), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = raw.net(batch).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(loss=loss)
    assert any(b > a for a, b in pairwise(losses))
    assert all_equal(whole, raw.parameters())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("options", [{"max_iter": 3}, {"variant": "irprop+", "maximize": True}, {"variant": "irprop+"}])
def test_through_a_distributed_checkpoint_into_a_fresh_optimizer(options, tmp_path):
    """The loader makes the state by a step of its own, without closure or loss and with lr 0."""

    def make():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        return net, Rprop(net.parameters(), lr=0.1, **options)

    def go(net, optimizer, steps):
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

    net, optimizer = make()
    losses = go(net, optimizer, 9)
    saved = {"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    fresh_net, fresh = make()
    state = {"net": fresh_net.state_dict(), "optimizer": get_optimizer_state_dict(fresh_net, fresh)}
    assert all_equal(fresh_net.parameters(), make()[0].parameters())
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh_net.load_state_dict(state["net"])
    set_optimizer_state_dict(fresh_net, fresh, state["optimizer"])
    if "variant" in options:
        assert fresh.state[next(fresh_net.parameters())]["prev_loss"].item() == losses[-1]
    assert go(net, optimizer, 9) == go(fresh_net, fresh, 9)
    assert all_equal(net.parameters(), fresh_net.parameters())
    assert fresh.param_groups[0]["lr"] == 0.1


# ----------------------------------------------------------------------------------------------------- max_iter


@pytest.mark.parametrize("variant", VARIANTS)
def test_max_iter_is_as_many_steps_and_returns_the_first_loss(variant):
    expected, one, _, losses = descend(variant, 12)
    w, optimizer, _, first = descend(variant, 3, max_iter=4)
    assert torch.equal(w, expected)
    assert first == losses[0::4]
    assert optimizer.state[w]["step"] == one.state[expected]["step"] == 12


@pytest.mark.parametrize("set_to_none", [True, False])
def test_max_iter_takes_both_ways_to_zero_gradients(set_to_none):
    expected, *_ = descend("irprop-", 8)
    w, optimizer, closure, _ = descend("irprop-", 0, max_iter=4)

    def zeroing():
        optimizer.zero_grad(set_to_none=set_to_none)
        kept = optimizer.zero_grad
        optimizer.zero_grad = lambda: None
        try:
            return closure()
        finally:
            optimizer.zero_grad = kept

    for _ in range(2):
        optimizer.step(zeroing)
    assert torch.equal(w, expected)


def test_max_iter_without_a_closure():
    w, optimizer, closure, _ = descend("irprop-", 0, max_iter=3)
    before = w.detach().clone()
    loss = closure()
    for call in (optimizer.step, lambda: optimizer.step(closure, loss=loss), lambda: optimizer.step(loss=loss)):
        with pytest.raises(RuntimeError, match=r"max_iter=3 .* Call step\(closure\) .* use max_iter=1 .*GradScaler"):
            call()
    assert torch.equal(w, before)


def test_max_iter_under_a_grad_scaler():
    w, optimizer, _, _ = descend("irprop-", 0, max_iter=3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(w.square().sum()).backward()
    with pytest.raises(RuntimeError, match="max_iter=3"):
        scaler.step(optimizer)


@pytest.mark.parametrize("kind", ["accumulates", "does nothing"])
def test_max_iter_with_a_closure_that_does_not_zero(kind):
    w, optimizer, _, _ = descend("irprop-", 2, max_iter=2)
    before, grad = w.detach().clone(), w.grad

    def wrong():
        if kind == "accumulates":
            loss = w.square().sum()
            loss.backward()
            return loss
        return w.square().sum()

    with pytest.raises(
        RuntimeError, match=r"max_iter=2 .* did not zero the gradients\. .* accumulation .* use max_iter=1"
    ):
        optimizer.step(wrong)
    assert torch.equal(w, before)
    assert w.grad is grad
    assert optimizer.state[w]["step"] == 4


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_max_iter_does_not_blame_closure_for_nan(factor, set_to_none):
    """Gradients of NaN after zeroing in place look like those that were put in the closure's way."""
    w, optimizer, _, _ = descend("irprop-", 2, max_iter=2)
    before = w.detach().clone()

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = (w.square().sum() * 0 + 1) * factor
        (loss + w.sum() * NAN).backward()
        return loss

    assert optimizer.step(closure).item() == factor or math.isnan(factor)
    assert torch.equal(w, before)
    assert w.grad.isnan().all()


def test_max_iter_with_a_closure_that_fails_keeps_the_gradient():
    w, optimizer, _, _ = descend("irprop-", 1, max_iter=2)
    grad = w.grad

    def failing():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    assert w.grad is grad


@pytest.mark.parametrize("how", ["zero_grad", "autograd.grad", "None"])
def test_max_iter_leaves_parameters_alone_that_the_closure_does_not_touch(how):
    """Frozen ones, and one that is not part of the loss, which a closure that sets the gradients itself leaves out."""
    used, unused, frozen = torch.ones(3, requires_grad=True), torch.ones(1, requires_grad=True), torch.zeros(1)
    optimizer = Rprop([used, unused, frozen], max_iter=2, lr=0.25, etas=(0.5, 2.0))

    def closure():
        loss = used.square().sum()
        if how == "autograd.grad":
            (used.grad,) = torch.autograd.grad(loss, used)
            return loss
        if how == "zero_grad":
            optimizer.zero_grad()
        else:
            used.grad = None
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert used.tolist() == [1 - 0.25 - 0.5] * 3
    assert unused.tolist() == [1.0]
    assert unused.grad is None
    assert frozen.grad is None


def test_first_step_without_closure_is_no_way_around():
    for options in ({"max_iter": 3}, {"variant": "irprop+"}):
        w = torch.ones(1, requires_grad=True)
        w.grad = torch.ones(1)
        with pytest.raises(RuntimeError, match="Call step"):
            Rprop([w], lr=0.0, **options).step()
        assert w.item() == 1.0


def test_max_iter_is_one_for_all_groups():
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="max_iter must be the same in all parameter groups, got 3 after 1"):
        Rprop([{"params": a}, {"params": b, "max_iter": 3}])


@pytest.mark.parametrize(("manual", "accumulate"), [(False, 1), (False, 2), (True, 1)])
def test_max_iter_in_lightning(manual, accumulate, tmp_path):
    def make(module):
        return Rprop(module.parameters(), lr=0.1, max_iter=5)

    def plain(module):
        return Rprop(module.parameters(), lr=0.1)

    fit = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    module = Net(make, manual)
    if manual or accumulate > 1:
        with pytest.raises(RuntimeError, match=r"max_iter=5 .* did not zero the gradients"):
            fit.fit(module, Batches(2))
        return
    fit.fit(module, Batches(2))
    whole = Net(plain)
    trainer(tmp_path, max_epochs=1).fit(whole, Batches(20))
    assert all_equal(module.parameters(), whole.parameters())
