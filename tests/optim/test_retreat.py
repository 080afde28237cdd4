"""Retreat: a step whose loss is not finite takes back the last move, with the same bits in every implementation."""

import importlib
import math

import pytest
import torch
from cases import BY_PATH, INTERPRETED, VARIANTS, assert_same, parameters, set_gradients, train
from mutation import fused_kernel, use_mutant
from tapes import INF, NAN, comparable, descend, round_gradients, rprop_rows, twin_rows
from twin import ROUND

from lightning_rprop import Rprop
from lightning_rprop.optim import _foreach, _loss, _rule

rprop_module = importlib.import_module("lightning_rprop.optim.rprop")

# Gradients and losses without a bad loss. Steps 2, 5 and 7 flip: the loss has fallen, risen and fallen there.
TAPE = [(1, 9), (1, 8), (-1, 7), (-1, 6), (0, 5), (1, 6), (1, 5), (-1, 4), (NAN, 3), (-1, 2), (1, 3), (1, 1)]


def bad_tapes():
    """Yield the tape with bad losses at every position, and at every two positions in a row."""
    for i in (0, 3, 6) if INTERPRETED else range(len(TAPE)):
        for count in (1, 2):
            for bad in ((NAN, NAN), (-1, INF))[: 1 if INTERPRETED else 2]:
                yield [*TAPE[:i], *[bad] * count, *TAPE[i:]]


def differs_from_twin(dtype, variant, **options):
    rounded = ROUND[str(dtype).removeprefix("torch.")]
    return any(
        comparable(rprop_rows(variant, tape, dtype, **options))
        != comparable(twin_rows(variant, round_gradients(tape, rounded), rounded))
        for tape in bad_tapes()
    )


@pytest.fixture(params=["tensor"] if INTERPRETED else ["number", "tensor"])
def flag(request, monkeypatch):
    """Whether the host knows the loss; if not, as on an accelerator, the flag is a tensor."""
    if request.param == "tensor":
        monkeypatch.setattr(_loss, "_is_known", lambda loss: False)
    return request.param


@BY_PATH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_losses_match_twin(variant, dtype, foreach, flag):
    assert not differs_from_twin(dtype, variant, foreach=foreach)


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
def test_maximizing_retreats_from_minus_inf(variant, foreach, flag):
    for tape in bad_tapes():
        rows = rprop_rows(variant, [(-g, -loss) for g, loss in tape], maximize=True, foreach=foreach)
        assert comparable(rows) == comparable(twin_rows(variant, tape))
        good = [(g, INF if math.isfinite(loss) else loss) for g, loss in TAPE]  # infinite in the good direction
        if variant != "irprop+":  # which compares the losses
            assert comparable(rprop_rows(variant, good, maximize=True, foreach=foreach)) == comparable(
                rprop_rows(variant, TAPE, maximize=True, foreach=foreach)
            )


MUTANTS = {
    _rule: {
        "no move back": ("torch.sign(torch.neg(prev, out=space.kept), out=space.kept)", "torch.zeros_like(prev)"),
        "wrong direction": ("torch.neg(prev, out=space.kept)", "prev"),
        "takes back by the shrunk step size": (
            "torch.where(bad, step_size, distance",
            "torch.where(bad, size, distance",
        ),
        "does not shrink": ("agreement.masked_fill_(bad, -1)", "agreement"),
        "does not forget": ("kept.masked_fill_(bad, 0)", "pass"),
    },
    _foreach: {
        "no move back": ("for row in zip(bad, opposites, signs", "for row in zip(bad, signs, signs"),
        "wrong direction": ("torch._foreach_neg(prevs)", "prevs"),
        "takes back by the shrunk step size": ("zip(bad, step_sizes, distances", "zip(bad, sizes, distances"),
        "does not shrink": ("agreement.masked_fill_(is_bad, -1)", "pass"),
        "does not forget": ("grad.masked_fill_(is_bad, 0)", "pass"),
    },
}
TRITON_MUTANTS = {
    "no move back": ("tl.where(retreat, (prev < 0).to(NUMBER) - (prev > 0).to(NUMBER), sign)", "sign"),
    "wrong direction": ("(prev < 0).to(NUMBER) - (prev > 0)", "(prev > 0).to(NUMBER) - (prev < 0)"),
    "takes back by the shrunk step size": ("tl.where(retreat, before, distance)", "distance"),
    "does not shrink": ("agreement = tl.where(retreat, -1.0, agreement)", "pass"),
    "does not forget": ("grad = tl.where(retreat, 0.0, grad)", "pass"),
}
NUMBA_MUTANTS = {
    "no move back": ("sign_of(-widen(prevs[i])) * step_size", "zero"),
    "wrong direction": ("sign_of(-widen(prevs[i]))", "sign_of(widen(prevs[i]))"),
    "takes back by the shrunk step size": ("* step_size)\n", "* step_size * etaminus)\n"),
    "does not shrink": ("narrow(step_size * etaminus)", "narrow(step_size)"),
    "does not forget": ("prevs[i] = narrow(zero)\n", "pass\n"),
}
if INTERPRETED:
    MUTANTS = {fused_kernel: TRITON_MUTANTS}
else:
    MUTANTS[fused_kernel] = NUMBA_MUTANTS


@pytest.mark.parametrize(
    ("module", "mutation"),
    [pytest.param(m, x, id=f"{m.__name__.split('.')[-1]}: {x}, fused") for m in MUTANTS for x in MUTANTS[m]],
)
def test_bad_losses_detect_wrong_code(module, mutation, monkeypatch):
    foreach = {_rule: False, _foreach: True}.get(module)
    use_mutant(monkeypatch, module, MUTANTS[module][mutation])
    assert any(differs_from_twin(torch.float64, variant, foreach=foreach) for variant in VARIANTS)


@BY_PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_large_and_complex_parameters_agree(variant, dtype, foreach, flag):
    """Against the readable implementation on the real parts, for parameters above and below the scratch limit."""
    runs = []
    for options in ({"foreach": foreach}, {"fused": False, "foreach": False}):
        params = [*parameters(dtype), torch.linspace(-1, 1, 5000).to(dtype).requires_grad_()]
        runs.append(train(Rprop, params, 0, variant=variant, **options))
        for step in range(12):
            set_gradients(params, step)
            runs[-1].optimizer.step(loss=torch.tensor(NAN if step in (3, 7, 8) else float(step % 4)))
        assert runs[-1].optimizer.retreats == 3
    assert_same(*runs)


FITS = {
    "w - log(w)": (lambda w: w - w.log(), (1.5, 3.0), 2.0, 1.0),
    "w - 2 sqrt(w)": (lambda w: w - 2 * w.sqrt(), (1.5, 3.0), 2.0, 1.0),
    "w log(w)": (lambda w: w * w.log(), (0.5, 2.0), 1.0, math.exp(-1)),
    "w^1.5 - w": (lambda w: w.pow(1.5) - w, (0.5, 2.0), 1.0, 4 / 9),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("function", "start", "lr", "minimum"), FITS.values(), ids=FITS)
def test_fits_leave_the_domain_and_return(function, start, lr, minimum, variant):
    ends = {}
    for retreat in (None, False, "torch"):
        w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        ours = {"variant": variant, "retreat": retreat} if retreat != "torch" else {}
        optimizer = (Rprop if ours else torch.optim.Rprop)([w], lr=lr, **ours)

        def closure(w=w, optimizer=optimizer):
            optimizer.zero_grad()
            loss = function(w).sum()
            loss.backward()
            return loss

        for _ in range(300):
            loss = optimizer.step(closure)
        ends[retreat] = loss.item()
        if retreat is None:
            assert 1 <= optimizer.retreats <= 5
            # the smallest step size is 1e-6
            assert torch.allclose(w, torch.full_like(w, minimum), rtol=0, atol=2e-6)
    assert math.isnan(ends[False])
    assert math.isnan(ends["torch"])
    assert math.isfinite(ends[None])


@BY_PATH
@pytest.mark.parametrize("variant", VARIANTS)
def test_finite_losses_change_nothing(variant, foreach, flag):
    runs = [descend(variant, 12 if INTERPRETED else 60, retreat=retreat, foreach=foreach) for retreat in (True, False)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][3] == runs[1][3]
    for a, b in zip(*(run[1].state[run[0]].values() for run in runs), strict=True):
        assert torch.equal(a, b)
    assert [int(run[1].retreats) for run in runs] == [0, 0]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap
def test_functional_retreat_works_under_vmap():
    numbers = {"step_size_min": 1e-6, "step_size_max": 50, "etaminus": 0.5, "etaplus": 1.2}
    w, g, prev, size = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    bad = torch.tensor([True, False, True])

    def step(w, g, prev, size, bad):
        tensors = [t.clone() for t in (w, g, prev, size.abs())]
        rprop_module.rprop(*([t] for t in tensors), [torch.zeros(())], retreat=bad, **numbers)
        return tensors

    stacked = torch.func.vmap(step)(w, g, prev, size, bad)
    for i in range(3):
        single = step(w[i], g[i], prev[i], size[i], bool(bad[i]))
        assert all(torch.equal(all_rows[i], row) for all_rows, row in zip(stacked, single, strict=True))
