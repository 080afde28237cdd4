"""FullBatch refuses setups that it cannot train correctly, before a parameter changes."""

import copy

import pytest
from fitting import DATA, Reiterable, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lit import all_equal, trainer
from whole_set import Regression

from lightning_rprop import FullBatch, FullBatchLoader, Rprop


class NoLoss(Regression):
    def training_step(self, batch, batch_idx):
        return None if len(self.targets) == 2 else super().training_step(batch, batch_idx)


class Writing(Regression):
    def training_step(self, batch, batch_idx):
        batch[0].add_(1)
        return super().training_step(batch, batch_idx)


class Manual(Regression):
    automatic_optimization = False


class Twice(Regression):
    def configure_optimizers(self):
        return [Rprop([p]) for p in self.parameters()]


class Accumulating(SingleDeviceStrategy):
    handles_gradient_accumulation = True


UNEVEN = Reiterable(*[(DATA[0], DATA[1][:50])] * 2)


@pytest.mark.parametrize(
    ("module", "loader", "options", "error", "message"),
    [
        (Regression, None, {"accumulate_grad_batches": 2}, MisconfigurationException, "is 2: leave it at 1"),
        (
            Regression,
            None,
            {"callbacks": [FullBatch(), GradientAccumulationScheduler({0: 1})]},
            MisconfigurationException,
            "remove the GradientAccumulationScheduler",
        ),
        (Regression, None, {"callbacks": [FullBatch(), FullBatch()]}, MisconfigurationException, "leave one"),
        (Manual, None, {}, MisconfigurationException, "automatic_optimization=False"),
        (Regression, None, {"strategy": Accumulating("cpu")}, MisconfigurationException, "not support Accumulating,"),
        (Twice, None, {}, RuntimeError, "multiple optimizers is only supported with manual optimization"),
        (Regression, [DATA], {}, MisconfigurationException, r"needs a FullBatchLoader .* got list: wrap the data"),
        (NoLoss, None, {}, RuntimeError, "training_step returned no loss, but every micro-batch is part"),
        (Writing, None, {}, RuntimeError, "written to in place during a step.*x = x.clone"),
        (Regression, FullBatchLoader(UNEVEN), {}, ValueError, r"cannot be counted.*FullBatch\(weight=lambda batch"),
        (Regression, FullBatchLoader(Reiterable()), {}, RuntimeError, "yielded no batch on this rank"),
        (
            Regression,
            None,
            {"callbacks": [FullBatch(weight=lambda batch: -1.0)]},
            ValueError,
            "weight must return a finite number >= 0 for each micro-batch, got -1.0",
        ),
        (
            Regression,
            FullBatchLoader(DATA, 10),
            {"callbacks": []},
            RuntimeError,
            r"callbacks=\[lightning_rprop.FullBatch",
        ),
    ],
)
def test_error_names_the_remedy_before_a_step(module, loader, options, error, message, tmp_path):
    module = module()
    start = copy.deepcopy(list(module.parameters()))
    with pytest.raises(error, match=message):
        trainer(tmp_path, **{"callbacks": [FullBatch()], **options}).fit(module, loader or FullBatchLoader(DATA, 10))
    assert all_equal(module.parameters(), start)
    # a correct run still works afterwards
    module = Regression()
    fit(tmp_path, module, 10)
    assert len(module.gradients) == 3


def test_loader_in_train_and_val_is_refused(tmp_path):
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            pass

    loader = FullBatchLoader(DATA, 10)
    with pytest.raises(MisconfigurationException, match="another FullBatchLoader for the validation"):
        trainer(tmp_path, [FullBatch()]).fit(Validated(), loader, loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "avg"}, "reduction must be 'mean' or 'sum', got 'avg'"),
        ({"weight": 3}, "weight must be a function of a micro-batch, or None, got 3"),
        ({"prog_bar": True}, "prog_bar=True shows the logged loss, got log_as=None"),
    ],
)
def test_invalid_callback_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FullBatch(**arguments)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_dataloader_iter_is_refused(tmp_path):
    class Iterating(Regression):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(MisconfigurationException, match="takes dataloader_iter: take a batch"):
        fit(tmp_path, Iterating())


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`")
def test_missing_optimizer_is_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="configure_optimizers returned None: return one"):
        fit(tmp_path, Regression(lambda params: None))


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda losses: losses, ValueError, r"got a loss of shape \(\d+, 1\). Reduce it: loss.mean\(\)"),
        (lambda losses: {"loss": losses[:3, 0]}, ValueError, r"got a loss of shape \(3,\)"),
        (lambda losses: losses.mean().item(), TypeError, r"must return the loss as a tensor, got .* \(float\)"),
        (lambda losses: {"x": losses}, RuntimeError, r"returned no loss.*0 \* loss"),
        (lambda losses: None, RuntimeError, r"returned no loss"),
    ],
)
def test_loss_must_be_a_single_number(make, error, message, size, tmp_path):
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return make((self.net(x) - y).square())

    with pytest.raises(error, match=message):
        fit(tmp_path, Module(), size)


def test_plugin_with_a_skipped_hook_is_refused(tmp_path):
    class Scaling(Precision):
        def pre_backward(self, tensor, module):
            return super().pre_backward(tensor, module) * 1024

    with pytest.raises(MisconfigurationException, match=r"and so not .*Scaling.pre_backward: override backward\(\)"):
        fit(tmp_path, Regression(), plugins=[Scaling()])
