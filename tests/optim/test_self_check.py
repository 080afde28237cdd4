"""The kernels' self-check detects errors in every branch, and leaves no trace.

The tests of the fused kernel run with Numba's. test_triton.py runs them with Triton's.
"""

from functools import partial

import pytest
import torch
from cases import DTYPES, INTERPRETED
from mutation import fused_kernel, mutate, use_mutant
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop.optim import _numba, _rule
from lightning_rprop.optim._foreach import update_foreach
from lightning_rprop.optim._self_check import check

CPU = torch.device("cpu")
right = partial(_rule.update, scratch={})

# Replacements in the source of _rule.py.
WRONG_RULES = {
    "maximize ignored": [("if maximize:", "if False:")],
    "maximize negates the decay": [
        ("grad = torch.neg(grad, out=space.gradient)", "pass"),
        ("# compare signs", "grad = torch.neg(grad) if maximize else grad  #"),
    ],
    "decay ignored": [("if weight_decay != 0:\n            grad", "if False:\n            grad")],
    "decay of 0 added": [("if weight_decay != 0:\n            grad", "if True:\n            grad")],
    "decay rounds otherwise": [
        (
            "torch.add(grad, torch.mul(param, weight_decay, out=space.kept), out=space.gradient)",
            "(grad / weight_decay + param) * weight_decay",
        )
    ],
    "gradients multiplied": [
        ("torch.mul(sign, torch.sign(prev, out=space.size), out=space.size)", "(grad * prev).sign()")
    ],
    "subnormal gradients flushed": [
        ("torch.sign(grad, out", "torch.sign(grad * (grad.abs() >= torch.finfo(grad.dtype).tiny), out")
    ],
    "infinite gradients without sign": [("torch.sign(grad, out", "torch.sign(grad.masked_fill(grad.isinf(), 0), out")],
    "zero counts as a flip": [("torch.lt(agreement, 0", "torch.le(agreement, 0")],
    "factors swapped": [("torch.mul(agreement, etaplus", "torch.mul(agreement, -etaplus")],
    "step size rounds otherwise": [("torch.mul(before, factor, out=space.size)", "before + before * (factor - 1)")],
    "no upper bound": [("size.clamp_(step_size_min, step_size_max)", "size.clamp_(min=step_size_min)")],
    "no lower bound": [("size.clamp_(step_size_min, step_size_max)", "size.clamp_(max=step_size_max)")],
    "moves at a flip": [("if forget and take_back is not True:", "if False:")],
    "takes back by the shrunk step size": [("torch.where(flipped, step_size, size, out=space.distance)", "size")],
    "never takes back": [("size if take_back is False else", "size if True else")],
    "always takes back": [("forget and take_back is not True", "forget and take_back is False")],
    "takes back if the loss fell": [("~take_back", "take_back")],
    "takes back for all members": [("along(fell[param.device], param)", "fell[param.device].all()")],
    "retreat ignored": [("if retreat is not False:", "if False:")],
    "retreats by the new step size": [("torch.where(bad, step_size, distance, out=space.distance)", "distance")],
    "retreats along the gradient": [("sign = torch.where(bad, opposite, sign, out=space.sign)", "pass")],
    "retreat keeps the step size": [("else agreement.masked_fill_(bad, -1)", "else agreement")],
    "retreat keeps the gradient": [("kept.masked_fill_(bad, 0)", "pass")],
    "retreats for all members": [("along(is_bad[param.device], param)", "is_bad[param.device].any()")],
    "rprop- forgets": [("if forget:", "if True:")],
    "does not forget": [("if forget:", "if False:")],
    "stores a NaN gradient": [
        ("torch.where(torch.ne(grad, grad, out=space.mask), prev, grad, out=space.kept)", "grad.clone()")
    ],
    "a NaN gradient forgets": [
        ("torch.where(torch.ne(grad, grad, out=space.mask), prev, grad, out=space.kept)", "grad.nan_to_num(0, *INF)"),
        ("    names = [", "    INF = (float('inf'), -float('inf'))\n    names = ["),
    ],
}


def assert_detects(wrong, match=""):
    for dtype in DTYPES[:4]:
        with pytest.raises(RuntimeError, match=match):
            check(wrong, dtype, CPU)


@pytest.mark.parametrize("edits", WRONG_RULES.values(), ids=WRONG_RULES)
def test_check_detects_wrong_rules(edits):
    assert_detects(partial(mutate(_rule, *edits).update, scratch={}), "instead of")


def skipping(keep):
    """Return an implementation that moves only some of the tensors or of their elements."""

    def update(params, grads, prevs, step_sizes, rule):
        rows = [keep(*row) for row in zip(params, grads, prevs, step_sizes, strict=True)]
        return right(*map(list, zip(*filter(None, rows), strict=True)), rule)

    return update


def also(change):
    """Return an implementation that makes another change after the move."""

    def update(params, grads, prevs, step_sizes, rule):
        move = right(params, grads, prevs, step_sizes, rule)
        return lambda: (move(), change(params, grads))

    return update


def is_aligned(*row):
    return not any(tensor.data_ptr() % 16 for tensor in row)


WRONG_LOOPS = {
    "only the first tensor": skipping(lambda *row: row if len(row[0].flatten()) > 2048 else None),
    "not the first tensor": skipping(lambda *row: row if len(row[0].flatten()) < 2048 else None),
    "only the first member": skipping(lambda *row: [tensor[:1] for tensor in row]),
    "only whole blocks": skipping(lambda *row: [tensor.flatten()[:4096].view(2, -1) for tensor in row]),
    "only aligned tensors": skipping(lambda *row: row if is_aligned(*row) else [row[0][:0]] * 4),
    "only unaligned tensors": skipping(lambda *row: row if not is_aligned(*row) else [row[0][:0]] * 4),
    "writes behind a tensor": also(lambda params, _: params[-1].as_strided((3,), (1,)).zero_()),
    "writes to a gradient": also(lambda _, grads: grads[0].zero_()),
    "loses the sign of zeros": also(lambda params, _: params[0].add_(0.0)),
}


@pytest.mark.parametrize("wrong", WRONG_LOOPS.values(), ids=WRONG_LOOPS)
def test_check_detects_wrong_loops(wrong):
    assert_detects(wrong, "instead of")


# Replacements in the source of the fused kernel, in what the readable rules do not have.
WRONG_KERNELS = (
    {
        "member of a later block": ("first + (elements", "0 * first + (elements"),
        "border of members": ("(short - left)", "(short - short)"),
        "flags of members": ("member * tl.load(switches + 2)", "member * tl.load(switches + 3)"),
        "last element": ("offsets < size", "offsets < size - 1"),
        "rounding of ties": ("0x7FFF + ((bits >> 16) & 1)", "0x7FFF"),
    }
    if INTERPRETED
    else {
        "border of members": ("+ max(begin - start, 0)", "* 0 + max(begin - start, 0)"),
        "start of a chunk": ("max(begin - start, 0)", "0 * max(begin - start, 0)"),
        "next chunk": ("take(table, chunk)", "take(table, 2 * chunk)"),
        "flags of members": ("and actions[after] == action", ""),
        "last element": ("in range(first, last)", "in range(first, last - 1)"),
        "rounding of ties": ("+ ((bits >> np.uint32(16)) & np.uint32(1))", ""),
    }
)


@pytest.mark.parametrize("edit", WRONG_KERNELS.values(), ids=WRONG_KERNELS)
def test_check_detects_wrong_fused_kernels(edit, monkeypatch):
    use_mutant(monkeypatch, fused_kernel, edit)
    implementation = fused_kernel.update_triton if INTERPRETED else partial(_numba.update_numba, chunk=1000)
    with pytest.raises(RuntimeError, match="instead of"):
        check(implementation, torch.bfloat16, CPU)


def test_check_raises_errors_of_the_kernel():
    def failing(*_):
        raise OSError("no device today")

    with pytest.raises(OSError, match="no device today"):
        check(failing, torch.float32, CPU)


def test_difference_is_described():
    """The text names the first element that differs, what it was computed from, and how."""
    wrong = partial(mutate(_rule, ("if retreat is not False:", "if False:")).update, scratch={})
    with pytest.raises(RuntimeError) as caught:
        check(wrong, torch.float64, CPU)
    assert str(caught.value) == (
        "a parameter becomes -1e-06 instead of 5e-324, given parameter 5e-324, gradient 5e-324, prev 0.0, step_size "
        "0.0 at an aligned address, and Rule(etaminus=0.5, etaplus=1.2, step_size_min=1e-06, step_size_max=50.0, "
        "weight_decay=0.1, maximize=False, forget=False, take_back=False, retreat=True)"
    )


class Operations(TorchDispatchMode):
    """Record all operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [partial(torch.device, "meta"), Operations], ids=["device", "mode"])
def test_check_is_isolated_from_the_caller(context):
    before = torch.get_rng_state()
    with context() as mode:
        for implementation in (update_foreach, right):
            check(implementation, torch.float32, CPU)
    assert not getattr(mode, "seen", [])
    assert torch.equal(torch.get_rng_state(), before)


def test_check_ignores_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        check(update_foreach, torch.float32, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
