"""BestWeights with a loss for each member keeps what a separate BestWeights of each member would keep."""

import math
from itertools import chain

import pytest
import torch
from best_walks import move
from cases import through_file
from lit import all_equal
from test_best_weights import NoSync
from torch import nn

from lightning_rprop import BestWeights, Stacked
from lightning_rprop.best import weights

NAN, INF = math.nan, math.inf

# Losses of the members in each update. The last member never has a finite one.
LOSSES = [
    [3.0, NAN, 5.0, 1.0, NAN],
    [2.0, 7.0, NAN, 4.0, INF],
    [2.5, NAN, INF, 0.5, NAN],
    [NAN, NAN, NAN, NAN, NAN],
    [1.0, 6.0, 4.0, 0.5, NAN],
    [4.0, -INF, 4.5, 9.0, NAN],
]
BEST, STEPS = [1.0, -INF, 4.0, 0.5, INF], [4, 5, 4, 2, -1]
N = len(STEPS)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def stacked(dtype=torch.float32):
    """Return tensors of n members: several shapes, one of them tied, not contiguous or empty."""
    first = torch.arange(N * 6.0).reshape(N, 2, 3).to(dtype)
    return [
        first,
        torch.arange(N * 4.0).reshape(4, N).to(dtype).T,
        torch.zeros(N, dtype=dtype),
        torch.zeros(N, 0),
        first,
    ]


def rows_of(tensors, i):
    return [tensor[i].clone() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_members_equal_separate_ones(dtype, place):
    together = stacked(dtype)
    best = BestWeights(together)
    apart = [rows_of(together[:4], i) for i in range(N)]
    each = [BestWeights(tensors) for tensors in apart]
    for losses in LOSSES:
        best.update(torch.tensor(losses))
        for loss, one in zip(losses, each, strict=True):
            one.update(loss)
        move([*together[:4], *chain(*apart)])
    assert best.loss.tolist() == [one.loss for one in each] == BEST
    assert best.step.tolist() == [-1 if one.step is None else one.step for one in each] == STEPS
    assert (best.loss.dtype, best.step.dtype) == (torch.float64, torch.int64)
    for _ in range(2):
        best.restore()
        for one in each[:-1]:
            one.restore()
        for i in range(N):  # the last member stays as it is
            assert all_equal(rows_of(together[:4], i), apart[i])
        move([*together[:4], *chain(*apart)])


def test_stacked_module_ends_at_its_best(place):
    """Buffers of the members too; others are those of the lowest loss of all."""
    model = Stacked(lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), n=N)
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("history", torch.zeros(0))
    model.register_parameter("shared", nn.Parameter(torch.zeros(2), requires_grad=False))
    members = [name for name, tensor in model.state_dict().items() if tensor.dim() and len(tensor) == N]
    best, seen = BestWeights(model), []
    for step, losses in enumerate(LOSSES[:-1]):
        model.count, model.history = torch.tensor(float(step)), torch.arange(step + 1.0)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        best.update(torch.tensor(losses))
        move([*model.parameters(), *model.buffers()])
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best.restore()
    now = model.state_dict()
    assert len(members) == 7
    for name in members:
        for i, step in enumerate([4, 4, 4, 2]):
            assert torch.equal(now[name][i], seen[step][name][i])
        assert torch.equal(now[name][-1], end[name][-1])
    for name in ("count", "history", "shared"):
        assert torch.equal(now[name], seen[2][name])


def test_new_tensors_keep_the_rows_of_others(place):
    """Lazy parameters, buffers of another shape and new submodules. The last member has no finite loss."""
    net = nn.ModuleDict({"a": nn.Module(), "b": nn.LazyLinear(3)})
    net.a.weight = nn.Parameter(torch.arange(3.0))
    best = BestWeights(net)
    best.update(torch.tensor([1.0, 5.0, NAN]))
    net.b(torch.ones(1, 2))
    net.a.register_buffer("mean", torch.zeros(3, 1))
    net.c = nn.BatchNorm1d(3)
    best._find()
    move(net.parameters())
    before = [param.detach().clone() for param in net.b.parameters()]
    best.update(torch.tensor([2.0, 4.0, NAN]))
    move([*net.parameters(), net.a.mean])
    net.a.mean = net.a.mean.repeat(1, 2)
    best.update(torch.tensor([2.0, 4.5, NAN]))
    assert best.state_dict()["tensors"][-1].shape == ()
    best.restore()
    assert net.a.weight.tolist() == [0.0, 2.0, 4.0]  # the first update, the second and none
    assert all(torch.equal(param[:2], row[:2]) for param, row in zip(net.b.parameters(), before, strict=True))
    assert net.c.weight.tolist() == [2.0, 2.0, 3.0]
    assert net.a.mean.tolist() == [[0.0]] * 3
    net.a.mean = torch.full((3, 2), 7.0)
    best.update(torch.tensor([2.0, 3.0, NAN]))  # lower, but not the lowest: no copy of the other shape can remain
    net.a.mean += 1
    best.restore()
    assert net.a.mean.tolist() == [[7.0, 7.0]] * 2 + [[8.0, 8.0]]


def test_updates_of_members_do_not_synchronize(monkeypatch):
    monkeypatch.setattr(weights, "is_on_host", lambda tensor: False)
    tensors = stacked()
    best = BestWeights(tensors)
    with NoSync():
        for losses in LOSSES:
            best.update(torch.tensor(losses))
    with pytest.raises(AssertionError), NoSync():
        best.step  # noqa: B018
    assert best.loss.tolist() == BEST


@pytest.mark.parametrize("cut", range(len(LOSSES) + 1))
def test_state_of_members_continues(cut, place):
    tensors, others = stacked()[:4], stacked()[:4]
    first, second = BestWeights(tensors), BestWeights(others)
    for step, losses in enumerate(LOSSES):
        if step == cut:
            second.load_state_dict(through_file(first.state_dict()))
        first.update(torch.tensor(losses))
        if step >= cut:
            second.update(torch.tensor(losses))
        move(tensors + others)
    if cut == len(LOSSES):
        second.load_state_dict(through_file(first.state_dict()))
    assert (second.loss.tolist(), second.step.tolist()) == (BEST, STEPS)
    first.restore()
    second.restore()
    assert all_equal(tensors, others)
    state = second.state_dict()
    state["loss"].fill_(9), second.loss.fill_(9), second.step.fill_(9)  # copies
    assert (second.loss.tolist(), second.step.tolist()) == (BEST, STEPS)


def test_members_without_finite_loss_stay(place):
    tensors = stacked()
    best = BestWeights(tensors)
    assert (best.loss, best.step) == (INF, None)
    best.update(torch.full((N,), NAN))
    assert (best.loss.tolist(), best.step) == ([INF] * N, None)
    with pytest.raises(RuntimeError, match="BestWeights has nothing to restore, because no update had a finite loss"):
        best.restore()
    other = BestWeights(stacked())
    other.load_state_dict(through_file(best.state_dict()))
    assert (other.loss.tolist(), other.step) == ([INF] * N, None)
    other.update(torch.arange(N))
    assert other.step.tolist() == [1] * N


@pytest.mark.parametrize(
    ("before", "loss", "message"),
    [
        ([1.0, 2.0], torch.zeros(3), "loss has 3 elements, but earlier ones had 2. Pass one loss for each of the same"),
        ([1.0, 2.0], 0.0, "loss has 1 elements, but earlier ones had 2"),
        (1.0, torch.zeros(2), "loss has 2 elements, but earlier ones had 1"),
        (
            None,
            torch.zeros(3),
            r"3 elements, one for each member, but parameter 0 has the shape \(2, 2\): its first .* 3",
        ),
        (None, torch.zeros(2, 1), r"loss must be a number, .* or a tensor of shape \(n,\)"),
    ],
)
def test_unfit_losses_change_nothing(before, loss, message, place):
    tensors = [torch.zeros(2, 2)]
    best = BestWeights(tensors)
    if before is not None:
        best.update(torch.tensor(before))
    state = str(best.state_dict())
    move(tensors)
    with pytest.raises(ValueError, match=message):
        best.update(loss)
    assert str(best.state_dict()) == state


def test_module_without_members_is_refused():
    """Named in the error; one number may follow losses that were all NaN."""
    net = nn.Linear(3, 2)
    best = BestWeights(net)
    with pytest.raises(ValueError, match=r"but weight has the shape \(2, 3\): .* lightning_rprop.Stacked, or reduce"):
        best.update(torch.zeros(3))
    best.update(torch.zeros(1))  # one element is an ordinary loss
    assert (best.loss, best.step) == (0.0, 0)
