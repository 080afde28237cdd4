"""Convergence stops at the steps that a hand-written rule finds, on the host and on a device."""

import math
import random

import pytest
import torch
from stopping import stop_step
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import Convergence, Rprop

INF, NAN = math.inf, math.nan

# Options, losses, largest gradient entries, and the step at which the run has converged.
BY_HAND = {
    "two small changes": ({"change": 0.1}, [10, 9.5, 9.4, 9.3], None, 3),
    "a large change in between": ({"change": 0.1}, [10, 9.5, 5, 4.9, 4.8], None, 5),
    "relative to the larger loss": ({"change": 0.5}, [2, 1, 0.5], None, 3),
    "relative to a risen loss": ({"change": 0.5}, [0.5, 1, 2], None, 3),
    "a little too large": ({"change": 0.5}, [2, 0.999, 0.4, 0.1], None, None),
    "negative losses": ({"change": 0.1}, [-10, -10.5, -11], None, 3),
    "opposite signs": ({"change": 1}, [-1, 1, -1, 1], None, None),
    "zero": ({"change": 0}, [0, 0, -0.0, 0], None, 3),
    "equal losses": ({"change": 0}, [3, 2, 2, 2], None, 4),
    "infinite": ({"change": 1}, [INF, INF, INF, -INF, -INF], None, None),
    "NaN": ({"change": 1}, [NAN, NAN, NAN], None, None),
    "one NaN": ({"change": 0.1}, [1, 1, NAN, 1, 1, 1], None, 6),
    "after infinity": ({"change": 0.1}, [INF, 1, 1, 1], None, 4),
    "overflow": ({"change": 0.1}, [1e308, -1e308, 1e308], None, None),
    "gradient": ({"grad": 0.5}, [9, 5, 1, 0], [2, 0.5, 0.25, 0], 3),
    "gradient of the first steps": ({"grad": 0.5}, [9, 5], [0, 0.5], 2),
    "gradient of NaN": ({"grad": 0.5}, [9, 5, 1, 2], [0.5, NAN, 0.5, 0.5], 4),
    "infinite gradient": ({"grad": 0.5}, [9, 5, 1], [INF, INF, INF], None),
    "small gradient of a NaN loss": ({"grad": 0.5}, [9, NAN, 5, 1], [0, 0, 0, 0], 4),
    "no gradient": ({"grad": 0.5}, [9, 9, 9], [None, None, None], None),
    "one criterion, then the other": ({"change": 0.1, "grad": 0.5}, [9, 5, 5, 1], [1, 0.1, 1, 1], 3),
    "neither in between": ({"change": 0.1, "grad": 0.5}, [9, 9, 5, 5, 1], [1, 1, 1, 1, 0.1], 5),
}


def make(change=None, grad=None, step=None, patience=2):
    return Convergence(change, grad, step, patience)


def play(convergence, losses, grads, first=0):
    """Update with each loss and gradient and return the first step at which ``update`` returns true."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    found = None
    for i, loss in enumerate(losses):
        entry = grads[i] if grads else None
        weight.grad = None if entry is None else torch.tensor([0, -entry, 0], dtype=torch.float64)
        stops = convergence.update(torch.tensor(loss, dtype=torch.float64) if i % 2 else loss, [weight])
        assert stops == (convergence.reason is not None)
        assert stops or found is None  # once true, it stays true
        if stops and found is None:
            found = first + i + 1
    return found


@pytest.mark.parametrize("name", BY_HAND)
def test_stop_steps_match_those_by_hand(name, place):
    options, losses, grads, expected = BY_HAND[name]
    assert play(make(**options), losses, grads) == expected
    assert stop_step(losses, grads, **options, patience=2) == expected


def test_loss_of_low_precision_is_compared_widely(place):
    """In float16, the difference of these losses would overflow."""
    convergence = Convergence(2, None, patience=1)
    for loss in (6e4, -6e4):
        converged = convergence.update(torch.tensor([loss], dtype=torch.float16), [torch.zeros(1)])
    assert converged


def random_tape(generator):
    losses = [generator.choice([1.0, 1.0, 1.05, 1.5, -1.0, 0.0, INF, NAN]) for _ in range(60)]
    grads = [generator.choice([None, 0.0, 0.1, 0.5, 2.0, 2.0, NAN]) for _ in range(60)]
    options = {"change": generator.choice([None, 0.0, 0.1]), "grad": generator.choice([0.0, 0.1, 0.5])}
    return losses, grads, options | {"patience": generator.choice([1, 2, 3, 4])}


def test_random_tapes_match_the_plain_rule(place):
    generator = random.Random(0)
    steps = []
    for _ in range(200):
        losses, grads, options = random_tape(generator)
        steps.append(stop_step(losses, grads, **options))
        assert play(make(**options), losses, grads) == steps[-1]
    assert None in steps
    assert len(set(steps)) > 20


def test_resume_stops_at_the_same_step(place):
    """From any step on, with the state as plain numbers."""
    generator = random.Random(1)
    for _ in range(20):
        losses, grads, options = random_tape(generator)
        expected = stop_step(losses, grads, **options)
        for cut in range(0, 60, 7):
            first, second = make(**options), make(**options)
            play(first, losses[:cut], grads[:cut])
            state = first.state_dict()
            assert {type(value) for value in state.values()} == {float, int, list}
            second.load_state_dict(state)
            assert second.reason == first.reason
            if expected is not None and cut >= expected:
                assert second.update(losses[cut], [torch.zeros(1)])
            else:
                assert play(second, losses[cut:], grads[cut:], cut) == expected
                assert expected is None or second.reason.endswith(f"step {expected}")


def test_other_tolerances_count_from_zero():
    tape = [5.0, 5.0, 5.0]
    converged = make(change=0.1)
    assert play(converged, tape, None) == 3
    for other in (make(change=0.01), make(change=0.1, grad=0), make(change=0.1, patience=3)):
        other.load_state_dict(converged.state_dict())
        assert other.reason is None
        assert play(other, tape, None, 3) == 3 + other.patience  # the last loss is kept
    state = converged.state_dict()
    del state["held"]
    with pytest.raises(ValueError, match=r"The state has no held. Load a state saved by Convergence"):
        other.load_state_dict(state)


def test_reason_names_criteria_and_step(place):
    def reason(losses, grads, **options):
        convergence = make(**options)
        play(convergence, losses, grads)
        return convergence.reason

    assert reason([9, 9, 9, 9], None, change=1e-9) == (
        "the loss changed by at most 1e-09 of itself for 2 steps in a row, up to step 3"
    )
    assert reason([9, 8], [1, 0], grad=0.1, patience=1) == "no gradient entry was larger than 0.1 at step 2"
    assert reason([9, 9, 7], [1, 1, 0], change=0.1, grad=0.1) == (
        "the loss changed by at most 0.1 of itself or no gradient entry was larger than 0.1 for 2 steps in a row, "
        "up to step 3"
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer = Rprop([weight], lr=0.5)
    optimizer.step()
    convergence = make(step=0.5, patience=1)
    assert convergence.update(1.0, optimizer)
    assert convergence.reason == "no step size was larger than 0.5 at step 1"


class NoSync(TorchDispatchMode):
    """Fails where a value is copied to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "copied to the host"
        return function(*args, **(kwargs or {}))


def test_observation_copies_nothing_to_the_host(on_device):
    """On an accelerator; ``update`` then copies one number."""
    weights = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (1, 5) for dtype in (torch.half, torch.cfloat)]
    optimizer = Rprop([*weights, torch.nn.Parameter(torch.ones(2))], lr=0.1)  # one has no gradient
    convergence = make(change=0.1, grad=0.5, step=0.15, patience=3)
    for step in range(1, 6):
        loss = sum(weight.abs().square().sum() for weight in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with NoSync():
            convergence._observe(loss, optimizer, step)
            convergence._observe(3.0, optimizer, step)
    with pytest.raises(AssertionError, match="copied to the host"), NoSync():
        convergence.update(loss, optimizer)
    assert not convergence._end.requires_grad
    assert not convergence._before.requires_grad
