"""The fused kernels: when they are chosen, and that they equal the plain loop.

These tests run with Numba's kernel. test_triton.py runs them with Triton's.
"""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, INTERPRETED, VARIANTS, assert_same, dense_parameters, take_dense_steps
from mutation import fused_kernel, use_mutant

from lightning_rprop import Rprop
from lightning_rprop.optim import _dispatch, rprop

if INTERPRETED:
    from lightning_rprop.optim import _triton as module

    PIECE, KERNEL = "_BLOCK", "update_triton"
else:
    from lightning_rprop.optim import _numba as module

    PIECE, KERNEL = "_CHUNK", "update_numba"

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut every tensor into several small pieces, for three threads."""
    monkeypatch.setattr(module, PIECE, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chosen(monkeypatch):
    """Count the tensors that each implementation gets, by the name of its function."""
    calls = Counter()

    def count(place, name):
        function = getattr(place, name)

        def counting(params, *args, **kwargs):
            calls[name] += len(params)
            return function(params, *args, **kwargs)

        monkeypatch.setattr(place, name, counting)

    count(_dispatch, "update")
    count(_dispatch, "update_foreach")
    count(module, KERNEL)
    keys = [(torch.device("cpu"), dtype) for dtype in DTYPES[:4]]
    monkeypatch.setattr(_dispatch, "check", lambda *_: None)  # Triton's interpreter takes seconds
    monkeypatch.setattr(_dispatch, "_loaded", {key: _dispatch._load(*key) for key in keys})
    calls.clear()  # Numba's kernel is called when it is compiled
    return calls


@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_match_the_plain_loop(dtype, variant, options, small_pieces, chosen):
    ours, plain = dense_parameters(dtype), dense_parameters(dtype)
    a, b = Rprop(ours, fused=True, variant=variant, **options), Rprop(plain, foreach=False, variant=variant, **options)
    for step, loss in enumerate((3, 2, 4, 4, 5)):
        take_dense_steps(a, ours, 1, step, loss=loss)
        take_dense_steps(b, plain, 1, step, loss=torch.tensor(loss, dtype=torch.float64))
    assert chosen == {KERNEL: 5 * len(ours), "update": 5 * len(ours)}
    assert_same(*(SimpleNamespace(optimizer=o, params=p) for o, p in ((a, ours), (b, plain))))


def test_pieces_detect_wrong_boundaries(small_pieces, monkeypatch):
    if INTERPRETED:
        edits = [("offsets < size", "offsets < size - 1"), ("_BLOCK = 2048", "_BLOCK = 16")]
    else:
        edits = [("max(begin - start, 0)", "max(begin - start, 0) * 0")]
    use_mutant(monkeypatch, fused_kernel, *edits)
    ours, plain = dense_parameters(torch.float32), dense_parameters(torch.float32)
    a, b = Rprop(ours), Rprop(plain, foreach=False)
    for seed in range(4):
        take_dense_steps(a, ours, 1, seed)
        take_dense_steps(b, plain, 1, seed)
    assert not all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


class Subclass(torch.Tensor):
    """A tensor subclass, which may be more than its memory."""


# Functions that build parameter and gradient, and the reason why no kernel supports them, or None.
LAYOUTS = {
    "contiguous": (lambda: (torch.randn(3, 4), torch.randn(3, 4)), None),
    "0-dim": (lambda: (torch.randn(()), torch.randn(())), None),
    "empty": (lambda: (torch.randn(0, 4), torch.randn(0, 4)), None),
    "complex": (lambda: torch.randn(2, 3, dtype=torch.complex64).unbind(), None),
    "conjugated gradient": (lambda: (torch.ones(3) * 1j, (torch.randn(3) * (1 + 2j)).conj()), None),
    "channels last": (lambda: (channels_last(2, 3, 4, 5), channels_last(2, 3, 4, 5)), None),
    "transposed": (lambda: (torch.randn(4, 6).T, torch.randn(4, 6).T), None),
    "permuted": (lambda: torch.randn(2, 4, 1, 6, 2).permute(0, 3, 1, 4, 2).unbind(), None),
    "view inside another": (lambda: (torch.randn(9)[3:7], torch.randn(9)[1:5]), None),
    "gradient of another format": (lambda: (channels_last(2, 3, 4, 5), torch.randn(2, 3, 4, 5)), "differ in strides"),
    "transposed gradient": (lambda: (torch.randn(4, 6), torch.randn(6, 4).T), "differ in strides"),
    "gaps": (lambda: (torch.randn(6, 8)[:, ::2], torch.randn(6, 8)[:, ::2]), "gaps or overlaps|differ in strides"),
    "expanded gradient": (lambda: (torch.randn(6, 4), torch.randn(1).expand(6, 4)), "differ in strides"),
    "negative bit": (lambda: (torch.randn(1), torch.randn(1, dtype=torch.complex64).conj().imag), "negative bit"),
    "subclass": (lambda: (torch.randn(3).as_subclass(Subclass), torch.randn(3)), "only plain tensors .* not Subclass"),
}
BY_LAYOUT = pytest.mark.parametrize(("make", "reason"), LAYOUTS.values(), ids=LAYOUTS)


def made(make):
    torch.manual_seed(0)
    param, grad = make()
    param = param.detach().requires_grad_()
    param.grad = grad
    return param


@BY_LAYOUT
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with another"])
def test_choice_depends_on_layout(make, reason, alone, chosen):
    """The choice does not depend on other parameters, and the moves equal those of the plain loop."""
    moved = []
    for foreach in (None, False):
        params = [made(make)] if alone else [torch.zeros(7, requires_grad=True), made(make)]
        params[0].grad = torch.ones(7) if not alone else params[0].grad
        optimizer = Rprop(params, foreach=foreach)
        for _ in range(3):
            optimizer.step()
        moved.append((params, optimizer))
        if foreach is None:
            assert chosen == Counter({KERNEL: 3 * (len(params) - bool(reason))}) + Counter(update=3 * bool(reason))
    assert_same(*(SimpleNamespace(params=params, optimizer=optimizer) for params, optimizer in moved))


@BY_LAYOUT
def test_fused_true_refuses_bad_layouts(make, reason):
    """The error names parameter and reason before anything changes."""
    first, second = torch.zeros(7, requires_grad=True), made(make)
    first.grad = torch.ones(7)
    before = second.detach().clone()
    if reason is None:
        Rprop([first, second], fused=True).step()
        return
    with pytest.raises(
        RuntimeError, match=f"fused=True, but no fused kernel supports 'second': .*{reason}.* fused=None"
    ):
        # the constructor checks parameters, the step also checks gradients
        Rprop([{"params": [("first", first)]}, {"params": [("second", second)]}], fused=True).step()
    assert torch.equal(second, before)
    assert first.tolist() == [0.0] * 7


def test_fused_true_checks_new_parameters():
    gaps = torch.randn(6, 8)[:, ::2].detach().requires_grad_()
    good = torch.zeros(3, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"supports parameter 1: its memory has gaps or overlaps: .* strides \(8, 2\)"
    ):
        Rprop([good, gaps], fused=True)
    optimizer = Rprop([good], fused=True)
    with pytest.raises(RuntimeError, match="supports parameter 0: its memory has gaps"):
        optimizer.add_param_group({"params": [gaps]})
    assert len(optimizer.param_groups) == 1


def test_fused_true_refuses_state_of_other_dtype():
    net = torch.nn.Linear(3, 2)
    optimizer = Rprop(net.named_parameters(), fused=True)
    take_dense_steps(optimizer, list(net.parameters()), 2, seed=1)
    net.bfloat16()
    before, state = [p.detach().clone() for p in net.parameters()], copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=r"supports 'weight': .* differ in dtype: torch.bfloat16, .*, torch.float32"):
        take_dense_steps(optimizer, list(net.parameters()), 1, seed=2)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(state[i][key], optimizer.state_dict()["state"][i][key]) for i in state for key in state[i])


def test_functional_form_checks_fused_true():
    p, g = torch.zeros(3, 2), torch.ones(2, 3).T
    numbers = {"step_size_min": 1e-6, "step_size_max": 50, "etaminus": 0.5, "etaplus": 1.2}
    lists = [[torch.zeros(3, 2), p], [torch.ones(3, 2), g], [torch.zeros(3, 2), p], [torch.ones(3, 2), p]]
    counters = [torch.zeros(()), torch.zeros(())]
    with pytest.raises(RuntimeError, match=r"fused=True, but no fused kernel supports parameter 1: .* strides"):
        rprop(*lists, counters, fused=True, **numbers)
    assert counters == [0, 0]
    assert torch.equal(lists[0][0], p)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, KERNEL),
        ({"fused": True}, KERNEL),
        ({"fused": False}, "update"),
        ({"foreach": True}, "update_foreach"),
        ({"foreach": False}, "update"),
        ({"foreach": False, "fused": True}, KERNEL),
        ({"differentiable": True}, "update"),
    ],
    ids=str,
)
def test_choice_depends_on_options(options, expected, chosen):
    """The choice follows torch.optim.Adam, and the group keeps the given options."""
    p = torch.zeros(3, requires_grad=not options.get("differentiable"))  # autograd forbids moving a leaf in place
    optimizer = Rprop([p], **options)
    p.grad = torch.ones(3)
    optimizer.step()
    assert chosen == {expected: 1}
    assert optimizer.param_groups[0]["fused"] is options.get("fused")
    assert optimizer.param_groups[0]["foreach"] is options.get("foreach")


def test_members_need_pieces_of_memory(chosen):
    """The kernel supports one loss for all rows, and one per row unless the rows are interleaved in memory."""
    for p, loss_rose in (
        (torch.zeros(3, 2), torch.tensor(True)),
        (torch.zeros(3, 2), torch.tensor([True])),
        (torch.zeros(3, 2), torch.tensor([True, False, True])),
        (channels_last(3, 2, 2, 2), torch.tensor([True, False, True])),
        (torch.zeros(3, 0), torch.tensor([True, False, True])),
        (torch.zeros(2, 3).T, torch.tensor([True, False, True])),
    ):
        g = torch.ones_like(p)
        rprop(
            [p], [g], [g.clone().neg()], [g.clone()], [torch.zeros(())], loss_rose=loss_rose, variant="irprop+",
            step_size_min=1e-6, step_size_max=50, etaminus=0.5, etaplus=1.2,
        )  # fmt: skip
    assert chosen == {KERNEL: 5, "update": 1}
