"""FullBatch with losses of members: exact means, who gets them, logs and errors."""

import csv
import math
from statistics import median

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from members import WAVES, Members, Outputs, compare, stacked
from whole_set import Regression

from lightning_rprop import FullBatch, Rprop


@pytest.mark.parametrize("size", [None, 1, 8, 50])
def test_members_match_separate_fits(size, tmp_path):
    def run(module, outputs):
        fit(tmp_path, module, size, WAVES, 12, [outputs], full_batch=FullBatch(module.reduction))

    compare(3, run, lambda params: Rprop(params, variant="irprop+", weight_decay=1e-3))
    if size != 1:  # each micro-batch takes time
        compare(2, run, lambda params: Rprop(params, variant="rprop+", max_iter=3), "sum")


def test_many_members_match_separate_fits(tmp_path):
    """From 16 on, torch would add up the rows of a matrix in another order."""
    compare(18, lambda module, outputs: fit(tmp_path, module, 8, WAVES, 3, [outputs]))


def test_weighted_members_match_separate_fits(tmp_path):
    x, y = WAVES
    data = x, y.where(torch.arange(103).unsqueeze(1) % 20 < 15, torch.nan)
    full_batch = FullBatch(weight=lambda batch: 0.3 * batch[1].isfinite().all())
    losses = compare(3, lambda module, out: fit(tmp_path, module, 5, data, 12, [out], full_batch=full_batch))
    assert losses.isfinite().all()


class Closures(Members):
    """Records the results of the closure."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.results = []

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        def recorded():
            self.results.append(closure())
            return self.results[-1]

        optimizer.step(recorded)


class Listener(pl.Callback):
    """Listens to FullBatch, like KeepBest."""

    def on_train_start(self, trainer, pl_module):
        self.heard = []
        trainer.callbacks[0]._listen(lambda loss, step: self.heard.append(loss))


def test_rprop_and_listeners_get_member_losses(tmp_path):
    makes = (Rprop, 4), (torch.optim.Rprop, 4), (torch.optim.LBFGS, 4), (Rprop, 1)
    for make, n in makes:
        module, listener, sums, each = Closures(stacked(n), make), Listener(), Outputs("loss"), Outputs()
        fit(tmp_path, module, 8, WAVES, 3, [sums, each, listener])
        shape = () if n == 1 else (n,)  # one is an ordinary loss
        assert all(loss.shape == shape for loss in listener.heard)
        assert all(loss.shape == (shape if make is Rprop else ()) for loss in module.results)
        assert len(module.results) == len(listener.heard) == (60 if make is torch.optim.LBFGS else 3)
        assert [loss.shape for loss in each.values] == [(n,)] * 3
        first = listener.heard[:: len(listener.heard) // 3]
        assert torch.equal(torch.stack(first).view(3, n), torch.stack(each.values))
        # float64 rounding: the sum of means against the mean of sums
        assert torch.allclose(torch.stack(sums.values), torch.stack(each.values).sum(1), rtol=1e-14, atol=0)


def test_scaled_step_gets_member_losses(tmp_path):
    seen = []

    class Spy(Rprop):
        def step(self, closure=None, *, loss=None):
            seen.append(loss)
            return super().step(closure, loss=loss)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    outputs = Outputs()
    fit(tmp_path, Members(stacked(3), Spy), 8, WAVES, 3, [outputs], plugins=[plugin])
    assert torch.equal(torch.stack(seen), torch.stack(outputs.values))


def logged(folder, module, callbacks=(), **options):
    """Fit, and return the Trainer and the logged rows without the step and the epoch."""
    logger = CSVLogger(folder, name="", version="")
    fitter = fit(folder, module, 8, WAVES, 4, callbacks, logger=logger, log_every_n_steps=1, **options)
    with open(folder / "metrics.csv", newline="") as lines:
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(lines)]
    return fitter, [{name: value for name, value in row.items() if name not in ("step", "epoch")} for row in rows]


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("maximize", [False, True])
def test_summary_of_members_is_logged(n, maximize, tmp_path):
    def spoil(losses, i):
        return losses + torch.where((torch.arange(n) == 1) & (i >= 13), torch.nan, 0.0)  # in the second step

    def make(params):
        return Rprop(params, retreat=False, maximize=maximize)

    outputs = Outputs()
    full_batch = FullBatch(log_as="train/loss", prog_bar=True)
    fitter, rows = logged(tmp_path, Members(stacked(n), make, spoil=spoil), [outputs], full_batch=full_batch)
    worst = -math.inf if maximize else math.inf
    assert torch.stack(outputs.values).isnan().any() == (n > 1)
    for row, losses in zip(rows, outputs.values, strict=True):
        values = [worst if math.isnan(loss) else loss for loss in losses.tolist()]
        expected = {"min": min(values), "median": median(values), "max": max(values)}
        # Lightning logs float32
        assert row == pytest.approx({f"train/loss/{name}": value for name, value in expected.items()}, rel=1e-6)
    assert {name for name in fitter.progress_bar_metrics if "loss" in name} == rows[0].keys()
    assert "train/loss" not in fitter.callback_metrics


def test_names_of_the_summary_must_be_free(tmp_path):
    class Logging(Members):
        def training_step(self, batch, batch_idx):
            self.log(self.name, 1.0)
            return super().training_step(batch, batch_idx)

    module = Logging(stacked(2))
    module.name = "loss/median"
    with pytest.raises(MisconfigurationException, match="by a name that the module logs too"):
        fit(tmp_path, module, full_batch=FullBatch(log_as="loss"), data=WAVES)
    module.name = "loss"
    fit(tmp_path, module, full_batch=FullBatch(log_as="loss"), data=WAVES)


def changed(losses, i):
    return losses[: 4 - (i == 5)]


ERRORS = {
    "type": (lambda losses, i: losses.tolist(), TypeError, "a tensor of real numbers, got list. Return one loss for"),
    "complex": (lambda losses, i: losses + 0j, TypeError, "a tensor of real numbers, got torch.complex128"),
    "scalar": (lambda losses, i: losses.sum(), ValueError, r"shape \(n,\) for n members, got \(\)"),
    "matrix": (lambda losses, i: losses[None], ValueError, r"shape \(n,\) for n members, got \(1, 4\)"),
    "empty": (lambda losses, i: losses[:0], ValueError, r"shape \(n,\) for n members, got \(0,\)"),
    "changed": (changed, ValueError, "returned 3 member_losses after 4 in an earlier micro-batch"),
    "missing": (lambda losses, i: losses if i < 5 else None, ValueError, "no member_losses after 4 in an earlier"),
    "late": (lambda losses, i: losses if i > 5 else None, ValueError, "4 member_losses after none in an earlier"),
    "length": (
        lambda losses, i: losses[:3],
        ValueError,
        r"returned 3 member_losses, but the parameter 'net.a' has the shape \(4,\): its first dimension must be 3",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_wrong_member_losses_are_an_error(kind, tmp_path):
    change, error, message = ERRORS[kind]
    module = Members(stacked(4))

    def training_step(batch, batch_idx):
        outputs = Members.training_step(module, batch, batch_idx)
        return outputs | {"member_losses": change(outputs["member_losses"], module.steps - 1)}

    module.training_step = training_step
    before = [param.clone() for param in module.parameters()]
    with pytest.raises(error, match=message):
        fit(tmp_path, module, 8, WAVES)
    assert all(map(torch.equal, before, module.parameters()))


class Plain(Regression):
    """An ordinary module that returns losses as if it had members."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "member_losses": loss.expand(4)}


def test_plain_module_with_member_losses_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the parameter 'net.0.weight' has the shape \(8, 5\)"):
        fit(tmp_path, Plain())
    fit(tmp_path, Plain(lambda params: Rprop(params, retreat=False)))  # which looks at no loss


def test_vector_loss_error_names_member_losses(tmp_path):
    class Vector(Members):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["member_losses"]

    with pytest.raises(ValueError, match=r"got a loss of shape \(4,\).* 'member_losses': losses\}"):
        fit(tmp_path, Vector(stacked(4)), 8, WAVES)


def test_norm_of_members_is_not_clipped(tmp_path):
    message = "gradient_clip_val=1.0 clips the norm of all members' gradients.*use gradient_clip_algorithm='value'"
    for algorithm in (None, "norm"):
        with pytest.raises(MisconfigurationException, match=message):
            fit(tmp_path, Members(stacked(4)), 8, WAVES, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)
    fit(tmp_path, Members(stacked(4)), 8, WAVES, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    fit(tmp_path, Members(stacked(1)), 8, WAVES, gradient_clip_val=1.0)
