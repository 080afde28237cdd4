"""Convergence with a loss for each member: each is judged as by its own Convergence, and all or the best one count."""

import math
import random

import pytest
import torch
from cases import through_file
from test_criteria import NoSync

from lightning_rprop import Convergence, Rprop

INF, NAN = math.inf, math.nan
N, STEPS = 4, 40


def random_tapes(generator):
    """Return losses and largest gradient entries of each step and member, and arguments of Convergence."""
    losses = [1.0, 1.0, 1.05, 1.1, 1.5, -1.0, 0.0] + [INF, -INF, NAN] * generator.choice([0, 1, 3])
    grads = [0.0, 0.1, 0.5, 2.0, 2.0, NAN]
    change, grad = generator.choice([(None, 0.1), (None, 0.5), (0.0, None), (0.1, None), (0.1, 0.1), (0.0, 0.5)])
    tapes = ([[generator.choice(values) for _ in range(N)] for _ in range(STEPS)] for values in (losses, grads))
    return *tapes, (change, grad, None, generator.choice([1, 2, 3]))


def weights_of(grads):
    """Return parameters with a row for each of these numbers, which is its largest absolute gradient entry."""
    grads = torch.tensor(grads, dtype=torch.float64)
    weights = [torch.nn.Parameter(grads.new_zeros(len(grads), *shape)) for shape in ((2, 3), (), (0,))]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for i, weight in enumerate(weights[:2]):
        weight.grad.view(len(grads), -1)[i::2, -1] = -grads[i::2]
    return weights


def play(convergence, losses, grads, first=0):
    """Update with each row of losses and gradients and return the first step at which ``update`` returns true."""
    for step in range(first, len(losses)):
        if convergence.update(torch.tensor(losses[step], dtype=torch.float64), weights_of(grads[step])):
            return step + 1
    return None


def expected_steps(losses, grads, arguments):
    """Return the steps at which all members that count, and the best one, have converged, each by its own."""
    each, found, lost = [Convergence(*arguments) for _ in range(N)], {"all": None, "best": None}, [0] * N
    for step in range(STEPS):
        ended = [one.update(losses[step][i], weights_of([grads[step][i]])) for i, one in enumerate(each)]
        finite = [i for i in range(N) if math.isfinite(losses[step][i])]
        lost = [0 if i in finite else lost[i] + 1 for i in range(N)]
        counted = [i for i in range(N) if lost[i] < arguments[3]]
        best = min(finite, key=lambda i: losses[step][i], default=None)
        for members, counts in (("all", counted), ("best", [best])):
            if counts not in ([], [None]) and found[members] is None and all(ended[i] for i in counts):
                found[members] = step + 1
    return found


def test_members_stop_as_separate_ones(place):
    generator = random.Random(0)
    steps = {"all": [], "best": []}
    for _ in range(60):
        losses, grads, arguments = random_tapes(generator)
        expected = expected_steps(losses, grads, arguments)
        for members, found in steps.items():
            convergence = Convergence(*arguments, members)
            found.append(play(convergence, losses, grads))
            assert found[-1] == expected[members]
            assert (convergence.reason is None) == (found[-1] is None)
    for found in steps.values():
        assert None in found
        assert len({*found}) > 10
    assert steps["all"] != steps["best"]


def test_resume_of_members_stops_alike(place):
    """From any step on, with the state as plain numbers and lists."""
    generator = random.Random(1)
    for members in ("all", "best") * 4:
        losses, grads, arguments = random_tapes(generator)
        whole = Convergence(*arguments, members)
        expected = play(whole, losses, grads)
        for cut in range(0, expected or STEPS, 3):
            first, second = Convergence(*arguments, members), Convergence(*arguments, members)
            play(first, losses[:cut], grads)
            second.load_state_dict(through_file(first.state_dict()))
            assert str(second.state_dict()) == str(first.state_dict())
            assert play(second, losses, grads, cut) == expected
            assert second.reason == whole.reason
    state = whole.state_dict()
    assert {type(value) for value in state.values()} == {int, list}
    other = Convergence(*arguments, "all")  # another option
    other.load_state_dict(state)
    assert other.reason is None
    assert other.state_dict()["before"] == state["before"]


def test_reason_names_the_members(place):
    losses = [[3.0, 2.0, NAN], [3.0, 2.0, 5.0], [3.0, 1.0, NAN], [3.0, 1.0, NAN]]

    def reason(patience, members, losses=losses):
        convergence = Convergence(0.0, None, None, patience, members)
        play(convergence, losses, [[1.0] * 3] * 4)
        again = Convergence(0.0, None, None, patience, members)
        again.load_state_dict(convergence.state_dict())
        assert again.reason == convergence.reason
        return convergence.reason

    what = "the loss changed by at most 0.0 of itself"
    assert reason(1, "best") == f"{what} in the best member (1) at step 2"
    assert reason(2, "all") is None
    assert reason(1, "all") == f"{what} in 2 of 3 members (the others have no finite loss) at step 3"
    assert reason(2, "all", [[3.0, 2.0, 1.0]] * 3) == f"{what} for 2 steps in a row in all 3 members, up to step 3"
    assert reason(3, "best", [[3.0, NAN, 4.0]] * 4) == (
        f"{what} for 3 steps in a row in the best member (0), up to step 4"
    )


def test_converged_member_may_move_again(place):
    """It counts as converged. One whose loss is NaN does not count after ``patience`` steps, but may come back."""
    losses = [[1.0, 5.0, 0.0], [1.0, 4.0, 0.5], [0.5, 3.0, NAN], [0.2, 3.0, NAN], [0.1, 3.0, NAN], [0.1, 3.0, 3.0]]
    losses += [[7.0, NAN, NAN]] * 2
    for members, patience, step in (("all", 1, 4), ("best", 1, 3), ("all", 2, None), ("best", 2, None)):
        assert play(Convergence(0.0, None, None, patience, members), losses, [[1.0] * 3] * 8) == step
    constant = [[1.0, loss] for loss in (3.0, 2.0, NAN, NAN, 1.5, NAN, INF, NAN, NAN)]
    for cut in range(8):
        first, second = (Convergence(0.0, None, None, 3, "all") for _ in range(2))
        assert play(first, constant[:cut], [[1.0] * 2] * 9) is None
        second.load_state_dict(through_file(first.state_dict()))
        assert play(second, constant, [[1.0] * 2] * 9, cut) == 8
    assert play(Convergence(0.0, None, None, 3, "best"), [row[::-1] for row in constant], [[1.0] * 2] * 9) == 4


def test_no_finite_loss_is_no_convergence(place):
    """Also if a member that is not the best has converged. Once the run has, the reason stays."""
    convergence = Convergence(0.0, None, None, 1, "best")
    assert play(convergence, [[2.0, 1.0], [2.0, 0.5], [NAN, NAN]], [[1.0] * 2] * 3) is None
    assert play(convergence, [[2.0, 3.0]], [[1.0] * 2]) == 1
    reason = convergence.reason
    assert "in the best member (0) at step 4" in reason
    for losses in ([1.0, 0.5], [1.0, 0.5]):
        assert play(convergence, [losses], [[1.0] * 2]) == 1
        assert convergence.reason == reason


@pytest.mark.parametrize("variant", ["irprop-", "rprop+"])
def test_step_sizes_of_each_member_count(variant, place):
    """Of Rprop with stacked parameters, which equals one Rprop for each member."""
    torch.manual_seed(0)
    starts = [torch.randn(N, 3, dtype=torch.float64), torch.randn(N, dtype=torch.cdouble)]

    def run(starts, members, loss_of):
        weights = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = Rprop(weights, lr=0.1, variant=variant)
        convergence = Convergence(None, None, 0.02, 3, members)
        for step in range(1, 400):
            optimizer.zero_grad()
            losses = weights[0].square().sum(-1) + (weights[1] - 1).abs().square()
            losses.sum().backward()
            optimizer.step()
            if convergence.update(loss_of(losses), optimizer):
                return step
        return None

    steps = [run([start[i] for start in starts], "all", lambda loss: loss) for i in range(N)]
    assert len({*steps}) > 2
    assert run(starts, "all", lambda losses: losses) == max(steps)
    worst = steps.index(max(steps))
    marked = lambda losses: torch.arange(N) == worst  # noqa: E731
    assert run(starts, "best", lambda losses: -marked(losses).double()) == max(steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.cfloat, torch.complex128])
def test_member_gradients_of_each_dtype(dtype, place):
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    above = torch.tensor(0.5, dtype=dtype.to_real()).nextafter(torch.ones((), dtype=dtype.to_real()))
    for unit in (1, -1, 1j, -1j) if dtype.is_complex else (1, -1):
        weight.grad = unit * torch.stack([above / 2, above, above / 4])[:, None].expand(3, 2).to(dtype)
        convergence = Convergence(None, 0.5, patience=1)
        assert not convergence.update(torch.ones(3), [weight])
        assert convergence.state_dict()["found"] == [2, 0, 2]
    if dtype.is_complex:  # the parts count separately
        weight.grad = torch.full_like(weight, 0.4 - 0.4j)
    else:
        weight.grad = torch.tensor([[0.0, 0.0], [0.0, -0.5], [0.5, 0.0]], dtype=dtype).to_sparse()
    assert convergence.update(torch.ones(3), [weight])
    weight.grad = None
    assert not Convergence(None, 0.5, patience=1).update(torch.ones(3), [weight])


def test_best_member_of_a_maximized_loss(place):
    weight = torch.nn.Parameter(torch.zeros(2))
    for maximize, expected in ((False, [True, True]), (True, [False, True])):
        optimizer = Rprop([weight], maximize=maximize)
        for params in (optimizer, optimizer.param_groups):
            convergence = Convergence(0.0, None, None, 1, "best")
            convergence.update(torch.tensor([1.0, 2.0]), params)
            found = [convergence.update(torch.tensor(losses), params) for losses in ([1.0, 3.0], [1.0, 3.0])]
            assert found == expected
    groups = [{"params": [weight], "maximize": True}, {"params": [torch.nn.Parameter(torch.zeros(2))]}]
    convergence = Convergence(members="best")
    before = convergence.state_dict()
    with pytest.raises(
        ValueError, match=r"members='best' cannot tell .* only some parameter groups have maximize=True"
    ):
        convergence.update(torch.zeros(2), Rprop(groups))
    assert str(convergence.state_dict()) == str(before)


def test_observation_of_members_copies_nothing(on_device):
    """On an accelerator; ``update`` then copies one number."""
    weights = [
        torch.nn.Parameter(torch.ones(N, size, dtype=dtype)) for size in (1, 5) for dtype in (torch.half, torch.cfloat)
    ]
    optimizer = Rprop(weights, lr=0.1)
    for members in ("all", "best"):
        convergence = Convergence(0.1, 0.5, 0.15, 3, members)
        for step in range(1, 6):
            losses = sum(weight.abs().square().sum(1) for weight in weights)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            with NoSync():
                convergence._observe(losses, optimizer, step)
        with pytest.raises(AssertionError, match="copied to the host"), NoSync():
            convergence.update(losses, optimizer)
        assert not convergence._before.requires_grad


@pytest.mark.parametrize(
    ("before", "losses", "message"),
    [
        (torch.zeros(2), torch.zeros(3), "loss has 3 elements, but earlier ones had 2. Pass one loss for each"),
        (torch.zeros(2), 0.0, "loss has 1 elements, but earlier ones had 2"),
        (0.0, torch.zeros(2), "loss has 2 elements, but earlier ones had 1"),
        (None, torch.zeros(3), r"3 elements, one for each member, but parameter 0 has the shape \(2, 2\): its first"),
        (None, torch.zeros(2, 1), r"loss must be a number, .* or a tensor of shape \(n,\)"),
    ],
)
def test_unfit_members_change_nothing(before, losses, message, place):
    weights, convergence = [torch.nn.Parameter(torch.zeros(2, 2))], Convergence()
    if before is not None:
        convergence.update(before, weights)
    state = str(convergence.state_dict())
    with pytest.raises(ValueError, match=message):
        convergence.update(losses, weights)
    assert str(convergence.state_dict()) == state


def test_frozen_parameters_may_be_shared(place):
    """And one element of any shape is an ordinary loss."""
    weight, shared = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    weight.grad = torch.zeros(2, 3)
    assert Convergence(None, 0.0, patience=1).update(torch.zeros(2), [weight, shared])
    with pytest.raises(ValueError, match=r"but parameter 1 has the shape \(5,\)"):
        Convergence().update(torch.zeros(2), [weight, shared.requires_grad_()])
    assert Convergence(None, 0.0, patience=1).update(torch.zeros(1), [weight])


def test_members_must_be_all_or_best():
    for value in ("some", None, 1):
        with pytest.raises(ValueError, match=f"members must be 'all' or 'best', got {value!r}"):
            Convergence(members=value)
