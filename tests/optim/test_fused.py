"""The fused kernels: when they are chosen, and that they are one implementation among others.

These tests run with Numba's kernel, and by test_triton.py with Triton's.
"""

import copy
import io
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, INTERPRETED, assert_same, gradients, parameters, proceed, run
from mutation import fused_kernel, put_mutant_in
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import Rprop
from lightning_rprop.optim import _dispatch, rprop
from lightning_rprop.optim._rule import AT_FLIP

if INTERPRETED:
    from lightning_rprop.optim import _triton as module

    PIECE, KERNEL = "_BLOCK", "update_triton"
else:
    from lightning_rprop.optim import _numba as module

    PIECE, KERNEL = "_CHUNK", "update_numba"

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut the work in so small pieces that every tensor has some, for three threads."""
    monkeypatch.setattr(module, PIECE, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chosen(monkeypatch):
    """Names of the implementations that are called, with the number of tensors each got."""
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
    _dispatch._load.cache_clear()
    for dtype in DTYPES[:4]:
        _dispatch._load(torch.device("cpu"), dtype)  # which tries Triton's kernel out
    calls.clear()
    yield calls
    _dispatch._load.cache_clear()


def dense(dtype):
    """Parameters that fill a piece of memory, in several orders, some longer than others."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)

    leaves = [
        normal(),
        normal(0, 3),
        normal(50),
        normal(5, 3),
        normal(16),
        normal(10, 7).T,
        normal(2, 3, 2, 3).contiguous(memory_format=torch.channels_last),
        normal(3, 1, 11),
        normal(0),
    ]
    return [leaf.detach().requires_grad_() for leaf in leaves]


def steps(optimizer, params, count, seed, **kwargs):
    """Make steps with gradients of the parameters' memory format."""
    for step in range(count):
        for p, g in zip(params, gradients(params, seed * 1000 + step), strict=True):
            p.grad = torch.empty_like(p).copy_(g)
        optimizer.step(**kwargs)


@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3}], ids=str)
@pytest.mark.parametrize("variant", AT_FLIP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_plain_loop_in_pieces(dtype, variant, options, small_pieces, chosen):
    ours, plain = dense(dtype), dense(dtype)
    a, b = Rprop(ours, fused=True, variant=variant, **options), Rprop(plain, foreach=False, variant=variant, **options)
    for step, loss in enumerate((3, 2, 4, 4, 5)):
        steps(a, ours, 1, step, loss=loss)
        steps(b, plain, 1, step, loss=torch.tensor(loss, dtype=torch.float64))
    assert chosen == {KERNEL: 5 * len(ours), "update": 5 * len(ours)}
    assert_same(*(SimpleNamespace(optimizer=o, params=p) for o, p in ((a, ours), (b, plain))))


def test_pieces_tell_wrong_shares_apart(small_pieces, monkeypatch):
    """As the test above is worth no more than what it finds."""
    if INTERPRETED:
        edits = [("offsets < size", "offsets < size - 1"), ("_BLOCK = 2048", "_BLOCK = 16")]
    else:
        edits = [("max(begin - start, 0)", "max(begin - start, 0) * 0")]
    put_mutant_in(monkeypatch, fused_kernel, *edits)
    ours, plain = dense(torch.float32), dense(torch.float32)
    a, b = Rprop(ours), Rprop(plain, foreach=False)
    for seed in range(4):
        steps(a, ours, 1, seed)
        steps(b, plain, 1, seed)
    assert not all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


# ------------------------------------------------------------------------------------------------ which is chosen


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


class Subclass(torch.Tensor):
    """A tensor that may be more than its memory."""


# How to make a parameter and a gradient, and why no kernel serves them; None if one does.
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
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
def test_choice_by_layout(make, reason, alone, chosen):
    """A parameter is served or not, whatever there is beside it, and moves as by the plain loop."""
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
def test_fused_true_demands(make, reason):
    """It names the parameter and the reason, before anything is changed, or it is served."""
    first, second = torch.zeros(7, requires_grad=True), made(make)
    first.grad = torch.ones(7)
    before = second.detach().clone()
    if reason is None:
        Rprop([first, second], fused=True).step()
        return
    with pytest.raises(
        RuntimeError, match=f"fused=True, but no fused kernel supports 'second': .*{reason}.* fused=None"
    ):
        # what the parameter alone does not show comes out at the step
        Rprop([{"params": [("first", first)]}, {"params": [("second", second)]}], fused=True).step()
    assert torch.equal(second, before)
    assert first.tolist() == [0.0] * 7


def test_fused_true_refuses_what_cannot_be_served_when_it_is_given():
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


def test_fused_true_with_state_of_another_dtype_changes_nothing():
    net = torch.nn.Linear(3, 2)
    optimizer = Rprop(net.named_parameters(), fused=True)
    steps(optimizer, list(net.parameters()), 2, seed=1)
    net.bfloat16()
    before, state = [p.detach().clone() for p in net.parameters()], copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=r"supports 'weight': .* differ in dtype: torch.bfloat16, .*, torch.float32"):
        steps(optimizer, list(net.parameters()), 1, seed=2)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(state[i][key], optimizer.state_dict()["state"][i][key]) for i in state for key in state[i])


def test_functional_form_demands_too():
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
def test_choice_by_options(options, expected, chosen):
    """As torch.optim.Adam chooses; and the group holds what was asked for, never what was chosen."""
    p = torch.zeros(3, requires_grad=not options.get("differentiable"))  # a leaf cannot be moved under autograd's eyes
    optimizer = Rprop([p], **options)
    p.grad = torch.ones(3)
    optimizer.step()
    assert chosen == {expected: 1}
    assert optimizer.param_groups[0]["fused"] is options.get("fused")
    assert optimizer.param_groups[0]["foreach"] is options.get("foreach")


def test_choice_by_loss(chosen):
    """One loss for all is served; one for each row is the plain loop's."""
    p, g = torch.zeros(3, 2), torch.ones(3, 2)
    for loss_rose in (torch.tensor(True), torch.tensor([True]), torch.tensor([[True], [False], [True]])):
        rprop(
            [p], [g], [g.clone().neg()], [g.clone()], [torch.zeros(())], loss_rose=loss_rose, variant="irprop+",
            step_size_min=1e-6, step_size_max=50, etaminus=0.5, etaplus=1.2,
        )  # fmt: skip
    assert chosen == {KERNEL: 2, "update": 1}


# ------------------------------------------------------------------------------- one implementation among others


def test_paths_may_change_from_step_to_step():
    turning, plain = run(Rprop, parameters(torch.float32), 0), run(Rprop, parameters(torch.float32), 0, foreach=False)
    for i in range(12):
        turning.optimizer.param_groups[0]["foreach"] = (None, False, True)[i % 3]
        proceed(turning, 1, seed=i)
        proceed(plain, 1, seed=i)
    assert_same(turning, plain)


@pytest.mark.parametrize("second", [Rprop, torch.optim.Rprop], ids=["ours", "torch"])
@pytest.mark.parametrize("before", [{"fused": True}, {"foreach": False}], ids=str)
def test_paths_may_change_across_a_checkpoint(before, second):
    begun = SimpleNamespace(params=dense(torch.float32))
    begun.optimizer = Rprop(begun.params, **before)
    steps(begun.optimizer, begun.params, 4, seed=1)
    file = io.BytesIO()
    torch.save(begun.optimizer.state_dict(), file)
    file.seek(0)
    params = [p.detach().clone().requires_grad_() for p in begun.params]
    resumed = SimpleNamespace(params=params, optimizer=second(params))
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    resumed.optimizer.param_groups[0].update(foreach=False if before.get("fused") else None, fused=None)
    for one in (begun, resumed):
        steps(one.optimizer, one.params, 6, seed=2)
    assert_same(begun, resumed)


def test_duplicates_work_on_memory_of_their_own():
    begun = run(Rprop, parameters(torch.float32), 3)
    duplicates = [copy.deepcopy(begun), pickle.loads(pickle.dumps(begun))]
    for one in (*duplicates, begun):
        proceed(one, 5, seed=2)
    assert_same(begun, duplicates[0])
    assert_same(begun, duplicates[1])


def test_autograd_learns_of_the_change():
    p = torch.ones(3, requires_grad=True)
    loss = p.square().sum()
    p.grad = torch.ones(3)
    Rprop([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_only_read():
    params = dense(torch.float32)
    optimizer = Rprop(params, fused=True, weight_decay=0.1, maximize=True)
    steps(optimizer, params, 1, seed=1)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("variant", AT_FLIP)
def test_no_operation_makes_a_tensor_of_a_parameters_size(variant):
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    sizes = {}
    for options in ({"fused": True}, {"foreach": False}):
        made = []
        params = [torch.zeros(1000, 10, requires_grad=True) for _ in range(2)]
        optimizer = Rprop(params, variant=variant, **options)
        steps(optimizer, params, 2, seed=1, loss=1.0)
        with Sizes():
            optimizer.step(loss=2.0)
        sizes[str(options)] = max(made, default=0)
    assert sizes["{'fused': True}"] < 1000
    assert sizes["{'foreach': False}"] == 10_000  # so that the measure is seen to measure
