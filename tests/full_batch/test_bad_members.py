"""FullBatch when the losses of some or all members are NaN or infinite."""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from fitting import fit
from lightning.pytorch.plugins import MixedPrecision
from lit import all_equal
from members import WAVES, Members, Outputs, stacked
from watching import watch

from lightning_rprop import Rprop


def spoiling(members, steps, value=torch.nan, n=4):
    """Return a function that makes the losses of these members bad at these steps, and their gradients NaN."""
    chosen = torch.tensor([i in members for i in range(n)])
    return lambda losses, i: losses * torch.where(chosen & (i in steps), value, 1.0)


def train(folder, spoil=lambda losses, i: losses, make=Rprop, steps=30, **options):
    """Fit four members with one micro-batch per step; return the module, the losses and the warnings."""
    module, outputs = Members(stacked(4), make, spoil=spoil), Outputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, module, None, WAVES, steps, [outputs], **options)
    return module, outputs.values, [str(each.message) for each in caught if "members" in str(each.message)]


def rows(module, keep):
    return [param[keep] for param in module.parameters()]


VARIANTS = ("irprop-", "irprop+", "rprop-", "rprop+")
WARNING = "The loss of {} of 4 members was NaN or infinite at step {}, so Rprop took back the last move of each of "
GOOD = [0, 2]


def test_bad_members_leave_the_others_alone(tmp_path):
    for variant in VARIANTS:
        make = lambda params, variant=variant: Rprop(params, variant=variant)  # noqa: E731
        calm, _, told = train(tmp_path, make=make)
        assert not told
        for steps in ([7], range(7, 100)):  # once, and from then on
            module, losses, told = train(tmp_path, spoiling([1, 3], steps), make)
            assert [loss.isnan().any().item() for loss in losses] == [i in steps for i in range(30)]
            assert len(told) == 1
            assert told[0].startswith(
                WARNING.format(2, 7) + "their weights and shrank its step size. If this happens often"
            )
            assert all_equal(rows(module, GOOD), rows(calm, GOOD)), variant
            assert not any(map(torch.equal, rows(module, [1, 3]), rows(calm, [1, 3])))
            assert all(param.isfinite().all() for param in module.parameters())


def test_member_bad_at_first_is_reported_once(tmp_path):
    start = stacked(4)
    calm, _, _ = train(tmp_path)
    module, _, told = train(tmp_path, spoiling([1], range(100), math.inf))
    (warning,) = told
    assert warning.startswith("The loss of 1 of 4 members is NaN or infinite at the first evaluation, before any move")
    assert "such members do not train. Start from other parameters, or scale inputs and targets" in warning
    assert all_equal(rows(module, [0, 2, 3]), rows(calm, [0, 2, 3]))
    assert all_equal(rows(module, [1]), rows(start, [1]))


def test_later_bad_member_is_reported_too(tmp_path):
    def spoil(losses, i):
        return spoiling([1], range(100))(spoiling([2], [6])(losses, i), i)

    _, _, told = train(tmp_path, spoil)
    assert ["first evaluation" in told[0], told[1].startswith(WARNING.format(2, 6))] == [True, True]
    assert len(told) == 2


def test_fit_stops_only_if_all_members_are_bad(tmp_path):
    first = "The loss of each of the 4 members is NaN or infinite at the first evaluation, before any move that could"
    with pytest.raises(RuntimeError, match=first):
        train(tmp_path, spoiling(range(4), range(100)))
    module, _, _ = train(tmp_path, spoiling(range(4), range(3, 12)))  # 9 in a row
    assert module.steps == 30
    later = r"The loss of each of the 4 members is NaN or infinite at step 12 and was NaN or infinite 10 times in a row"
    with pytest.raises(RuntimeError, match=later):
        train(tmp_path, spoiling(range(4), range(3, 13)))


def test_infinity_counts_in_the_bad_direction(tmp_path):
    for maximize, value in ((False, math.inf), (True, -math.inf)):
        for bad in (value, -value):
            make = lambda params, maximize=maximize: Rprop(params, maximize=maximize)  # noqa: E731
            module, _, told = train(tmp_path, spoiling([0], [5], bad), make)
            assert len(told) == (bad == value)
            assert module.optimizers().optimizer.retreats == (bad == value)


def test_retreat_false_is_not_reported(tmp_path):
    module, _, told = train(tmp_path, spoiling(range(4), range(100)), lambda params: Rprop(params, retreat=False))
    assert not told
    assert module.steps == 30


@pytest.mark.parametrize("make", [Rprop, lambda params: Rprop(params, retreat=False), torch.optim.Rprop])
def test_grad_scaler_steps_despite_bad_members(make, tmp_path):
    def scaled(spoil):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        module, _, _ = train(tmp_path, spoil, make, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert scaler.get_scale() == 4
        return module

    module, calm = scaled(spoiling([1], range(7, 100))), scaled(lambda losses, i: losses)
    assert all_equal(rows(module, [0, 2, 3]), rows(calm, [0, 2, 3]))
    assert not all_equal(rows(module, [1]), rows(calm, [1]))


def test_accelerator_is_read_every_ten_evaluations():
    good, bad, worst = [1.0, 1.0, 1.0], [1.0, math.nan, 1.0], [math.nan] * 3
    with pytest.warns(UserWarning, match="The loss of 1 of 3 members was NaN or infinite at step 13"):
        assert watch([good] * 13 + [bad] * 12) == [*range(1, 10), 0] * 2 + [*range(1, 6)]
    failing = pytest.raises(RuntimeError, match=r"each of the 3 members is .* 13 times")
    for last, expectation in ((worst, failing), (bad, nullcontext())):
        with expectation, pytest.warns(UserWarning, match="The loss of 3 of 3 members was"):
            watch([*[good] * 7, *[worst] * 12, last])
