"""FullBatch with an Rprop that takes back a step into a bad loss: the warning, the limit, and a GradScaler."""

import math
from contextlib import nullcontext

import pytest
import torch
from domain import ONES, Domain, is_solved
from fitting import fit
from lightning.pytorch.plugins import MixedPrecision
from watching import watch

from lightning_rprop import FullBatch, Rprop
from lightning_rprop.full_batch._bad_losses import BadLosses

WARNING = r"The loss was nan at step 1, so Rprop took back .* use a smaller lr or a smaller upper bound of step_sizes"
ADVICE = "ignore:The loss was .*Rprop took back"
VARIANTS = ("irprop-", "irprop+", "rprop-", "rprop+")


def rprop(**options):
    return lambda params: Rprop(params, **{"lr": 2.0, **options})


@pytest.mark.parametrize("max_iter", [1, 4])
def test_retreat_is_reported_once(max_iter, tmp_path):
    for variant in VARIANTS:
        module = Domain(rprop(variant=variant, max_iter=max_iter))
        step = {1: 1, 4: 0}[max_iter]
        with pytest.warns(UserWarning, match=WARNING.replace("step 1", f"step {step}")) as seen:
            fit(tmp_path, module, 3, ONES, 200 // max_iter)
        assert sum("took back" in str(warning.message) for warning in seen) == 1
        assert module.optimizers().optimizer.retreats >= 1
        assert is_solved(module), variant


def test_remedies_of_the_warning_work(tmp_path):
    for options in ({"lr": 0.1}, {"step_sizes": (1e-6, 0.3)}):  # warnings are errors
        module = Domain(rprop(**options))
        fit(tmp_path, module, 3, ONES, 100)
        assert is_solved(module)


@pytest.mark.filterwarnings(ADVICE)
@pytest.mark.parametrize("max_iter", [1, 4])
@pytest.mark.parametrize("bad", [9, 10])
def test_ten_retreats_in_a_row_stop(bad, max_iter, tmp_path):
    """Counted by evaluations. The step that fails is undone."""

    class Seeing(Domain):
        def on_train_batch_start(self, batch, batch_idx):
            self.before, self.count = self.w.detach().clone(), int(self.trainer.optimizers[0].retreats)

    module = Seeing(rprop(lr=0.1, max_iter=max_iter), bad=[*range(5, 5 + bad), *range(20, 29)])
    message = (
        rf"loss is nan at step {14 // max_iter} and was NaN or infinite 10 times in a row, although Rprop took back "
        "its last move; no parameter or input is NaN or infinite. Check what else training_step depends on"
    )
    with pytest.raises(RuntimeError, match=message) if bad == 10 else nullcontext():
        fit(tmp_path, module, None, ONES, 40)
    assert (len(module.losses) == 15) == (bad == 10)
    if bad == 10:
        assert torch.equal(module.w, module.before)
        assert module.optimizers().optimizer.retreats == module.count == (7 if max_iter > 1 else 9)


@pytest.mark.filterwarnings(ADVICE)
def test_limit_names_a_buffer(tmp_path):
    class Module(Domain):
        def __init__(self):
            super().__init__(rprop(lr=0.1))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("scale", torch.ones(3))

        def training_step(self, batch, batch_idx):
            if len(self.losses) >= 5:
                self.scale[2] = torch.nan
            return super().training_step(batch * self.scale.mean(), batch_idx)

    message = r"buffer 'scale' has 1 of 3 entries that are NaN or infinite, the first at \(2,\). Give it finite values"
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, Module(), 3, ONES, 40)


def test_infinity_counts_in_the_bad_direction(tmp_path):
    for maximize, value in ((False, math.inf), (True, -math.inf)):
        for bad, good in ((value, -value), (-value, value)):
            module = Domain(rprop(lr=0.01, maximize=maximize), bad=[3], value=bad)
            expectation = pytest.warns(UserWarning, match=f"The loss was {bad} at step 3, so Rprop")
            with expectation if bad == value else nullcontext():
                fit(tmp_path, module, None, ONES, 6)
            assert module.optimizers().optimizer.retreats == (bad == value), good


def test_other_optimizers_keep_going(tmp_path):
    """As well as an Rprop with retreat=False: no warning, no error, and NaN stays."""
    makes = {
        "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
        "torch": lambda params: torch.optim.Rprop(params, lr=0.1),
        "ours": rprop(retreat=False),
    }
    for name, make in makes.items():
        module = Domain(make, bad=range(3, 40))
        fit(tmp_path, module, None, ONES, 20)
        assert len(module.losses) == 20, name
        assert math.isnan(module.losses[-1])


@pytest.mark.parametrize("retreat", [None, False])
def test_grad_scaler_does_not_skip_retreats(retreat, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module = Domain(rprop(retreat=retreat))
    with pytest.warns(UserWarning, match=WARNING) if retreat is None else nullcontext():
        fit(tmp_path, module, 3, ONES, 100, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    if retreat is None:
        assert is_solved(module)
        assert scaler.get_scale() == 4
        assert module.optimizers().optimizer.retreats >= 1
    else:  # the scaler skips every later step and halves the scale
        assert math.isnan(module.losses[-1])
        assert scaler.get_scale() < 4


def test_accelerator_is_read_every_ten_losses():
    nan = math.nan
    assert watch([1.0] * 25) == [*range(1, 10), 0] * 2 + [*range(1, 6)]
    with pytest.warns(UserWarning, match="The loss was nan at step 13, so Rprop"):
        watch([1.0] * 13 + [nan] * 9 + [1.0] * 9 + [nan] * 3)
    with pytest.raises(RuntimeError, match=r"nan at step 19 .* 13 times in a row"), pytest.warns(match="at step 7"):
        watch([1.0] * 7 + [nan] * 20)
    with pytest.raises(RuntimeError, match=r"nan at step 23 .* 11 times in a row"), pytest.warns(match="at step 13"):
        watch([1.0] * 13 + [nan] * 11)  # found at the end of the fit


def test_grad_scaler_is_read_in_each_step():
    """It reads from the device itself in each step."""
    zeroed = []
    with pytest.warns(UserWarning, match="The loss was nan at step 1, so Rprop"):
        unread = watch([1.0, math.nan, 1.0, math.nan], scaler=1, zero_gradients=lambda: zeroed.append(1))
    assert unread == [0] * 4
    assert len(zeroed) == 2


def test_last_losses_are_read_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(
        BadLosses, "check", lambda self, loss, *_: self._unread.append((3, {False}, loss.detach() * torch.nan))
    )
    with pytest.warns(UserWarning, match="The loss was nan at step 3, so Rprop"):
        fit(tmp_path, Domain(rprop(lr=0.01)), None, ONES, 2, full_batch=FullBatch())
