"""The tapes detect wrong versions of the rules, in the twin and in every implementation."""

import pytest
import twin as twin_module
from cases import BY_PATH, INTERPRETED, PATHS
from mutation import IMPLEMENTATIONS, mutate, use_mutant
from tapes import TAPES, differs_from_twin, rprop_rows, twin_rows

# Replacements in the source of the twin. The letters name classes of errors found in public implementations.
WRONG_TWIN = {
    "a: moves at a flip by the new step size": (
        'if s < 0 and variant != "rprop-":',
        'if s < 0 and variant == "none":',
    ),
    "a: takes back by the shrunk step size": ("w = rounded(w - last_move)", "w = rounded(w - sign(g) * D)"),
    "b: a product of 0 grows the step size": ("if s > 0:", "if s >= 0:"),
    "b: a product of 0 counts as a flip": ("s < 0", "s <= 0"),
    "c: does not forget the gradient": ("            g_before = 0.0\n", "            g_before = g\n"),
    "c: forgets the new gradient instead of the stored one": ("            g_before = 0.0\n", "            g = 0.0\n"),
    "d: one step late": ("w = rounded(w + last_move)", "w, late = rounded(w + late), last_move"),
    "d: moves before it adapts the step size": (
        "last_move = -sign(g) * D\n",
        "last_move = -sign(g) * (D0 if s else D)\n",
    ),
    "e: adapts the step size before the first move": ("g_before = 0.0\n    E", "g_before = evaluate_first\n    E"),
    "f: compares with the best loss": ("E_before = E\n", "E_before = min(E, E_before)\n"),
    "f: an equal loss counts as risen": ("E > E_before", "E >= E_before"),
    "f: never compares": ('(variant == "irprop+" and rose)', '(variant == "irprop+")'),
    "f: compares with the loss before the last one": ("E_before = E\n", "E_before, older = older, E\n"),
    "f: a NaN loss counts as fallen": ("E = math.inf\n", "E = -math.inf\n"),
    "rprop+ does not take back": ('if variant == "rprop+" or', "if"),
    "rprop- forgets": (' and variant != "rprop-"', ""),
    "no upper bound": ("min(max(rounded(D), low), high)", "max(rounded(D), low)"),
    "no lower bound": ("min(max(rounded(D), low), high)", "min(rounded(D), high)"),
    "stores a NaN gradient": (
        "yield w, D, g_before\n            continue",
        "g_before = g\n            yield w, D, g_before\n            continue",
    ),
}

# Definitions of the names that some replacements use.
WRONG_TWIN_NAMES = (
    ("    last_move = 0.0\n", "    last_move = late = 0.0\n    older = math.inf\n"),
    ("    w = rounded(w)\n", "    w = rounded(w)\n    evaluate_first = 1.0\n"),
    ("        s = sign(g)", "        D0 = D\n        s = sign(g)"),
)


@pytest.mark.parametrize("mutation", WRONG_TWIN.values(), ids=WRONG_TWIN)
def test_tapes_detect_wrong_twin(mutation):
    wrong = mutate(twin_module, mutation, *WRONG_TWIN_NAMES).twin
    assert differs_from_twin(lambda variant, tape: twin_rows(variant, tape, rule=wrong))
    assert not differs_from_twin(twin_rows)


# Replacements in the sources of the implementations: _rule.py, _foreach.py, Numba's kernel and Triton's kernel.
WRONG_CODE = {
    "takes back by the shrunk step size": (
        ("torch.where(flipped, step_size, size, out=space.distance)", "size"),
        ("zip(flipped, step_sizes, sizes", "zip(flipped, sizes, sizes"),
        ("distance = before if flipped and take_back else step_size", "distance = step_size"),
        ("distance = tl.where(flipped & take_back, before, step_size)", "distance = step_size"),
    ),
    "takes back if the loss fell": (
        ("~take_back", "take_back"),
        ("& ~along", "& along"),
        ("forget and not take_back", "forget and take_back"),
        ("take_back == 0", "take_back != 0"),
    ),
    "always takes back": (
        ("forget and take_back is not True", "forget and take_back is False"),
        ("forget and take_back is not True", "forget and take_back is False"),
        ("        for i in range", "        take_back = True\n        for i in range"),
        ("= tl.load(take_back_at)", "= True"),
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
        ("forget & flipped, 0.0, grad", "flipped, 0.0, grad"),
    ),
    "does not forget the gradient": (
        ("if forget:", "if False:"),
        ("if forget:", "if False:"),
        ("zero if flipped and forget else grad", "grad"),
        ("tl.where(forget & flipped, 0.0, grad)", "grad"),
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
    "stores a NaN gradient": (
        ("torch.where(torch.ne(grad, grad, out=space.mask), prev, grad, out=space.kept)", "grad.clone()"),
        ("torch.where(grad.isnan(), prev, grad) for", "grad.clone() for"),
        ("grad = grad if grad == grad else prev", "pass"),
        ("grad = tl.where(grad == grad, grad, prev)", "pass"),
    ),
}


@pytest.fixture
def underflow(monkeypatch):
    """Add a tape on which the product of two gradients underflows."""
    monkeypatch.setitem(TAPES, "underflow", [(1e-200 * g, loss) for g, loss in TAPES["flips"]])


@pytest.mark.parametrize("module", IMPLEMENTATIONS, ids=PATHS)
@pytest.mark.parametrize("mutations", WRONG_CODE.values(), ids=WRONG_CODE)
def test_tapes_detect_wrong_code(mutations, module, underflow, monkeypatch):
    *unfused, numba, triton = mutations
    mutation = dict(zip(IMPLEMENTATIONS, (*unfused, triton if INTERPRETED else numba), strict=True))[module]
    use_mutant(monkeypatch, module, mutation)
    assert differs_from_twin(lambda variant, tape: rprop_rows(variant, tape, foreach=IMPLEMENTATIONS[module]))


@BY_PATH
def test_tapes_accept_right_code(foreach, underflow):
    assert not differs_from_twin(lambda variant, tape: rprop_rows(variant, tape, foreach=foreach))
