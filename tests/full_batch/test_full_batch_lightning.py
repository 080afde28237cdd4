"""FullBatch beside other parts of Lightning: callbacks, tuners, checkpoints, metrics, and what it says of them."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lit import all_equal, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor

X, Y = make_data(20)


def fit(folder, module, size=7, callbacks=(), epochs=6, per_epoch=1, **options):
    fitter = trainer(folder, [*callbacks, FullBatch(**options)], max_epochs=epochs)
    fitter.fit(module, FullBatchLoader((X, Y), size, steps_per_epoch=per_epoch))
    return fitter


def layers(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *more, nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.filterwarnings("ignore:net.1 normalizes by the statistics")
@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(8)])
def test_stochastic_weight_averaging(norm, size, tmp_path):
    def average(loader, callbacks):
        module = Regression(net=layers(norm()))
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=3)
        trainer(tmp_path, [averaging, *callbacks], max_epochs=6).fit(module, loader)
        return module

    averaged = average(FullBatchLoader((X, Y), size), [FullBatch()])
    if size is None:
        expected = average(FullBatchLoader((X, Y)), [])
        assert all_equal(averaged.state_dict().values(), expected.state_dict().values())
    elif isinstance(averaged.net[1], nn.BatchNorm1d):
        assert averaged.net[1].num_batches_tracked == 3  # of the last epoch only, which computes no gradients


@pytest.mark.parametrize("norm", [nn.Identity, nn.LazyBatchNorm1d])
@pytest.mark.parametrize("monitor", [False, True])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_lazy_modules(norm, monitor, tmp_path):
    def make():
        torch.manual_seed(0)
        return Regression(net=nn.Sequential(nn.LazyLinear(8), norm(), nn.Tanh(), nn.LazyLinear(1)))

    module, expected = make(), make()
    monitors = [StepSizeMonitor(every_n_steps=1, per_parameter=True, silence=["no_logger"])] if monitor else []
    torch.manual_seed(1)
    fit(tmp_path, module, None, monitors)
    torch.manual_seed(1)
    trainer(tmp_path, max_epochs=6).fit(expected, FullBatchLoader((X, Y)))
    assert all_equal(module.state_dict().values(), expected.state_dict().values())


def test_lazy_module_that_fails_in_its_first_step(tmp_path):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ArithmeticError("after the shapes are known")

    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    with pytest.raises(ArithmeticError):
        fit(tmp_path, Fails(net=net))


def test_parameters_may_join(tmp_path):
    class Finetuned(Regression):
        def __init__(self):
            super().__init__(net=layers())
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return Rprop(filter(lambda p: p.requires_grad, self.parameters()))

        def on_before_optimizer_step(self, optimizer):
            pass

    module = Finetuned()
    start = module.backbone.weight.detach().clone()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=3, backbone_initial_lr=1e-3, verbose=False)
    fitter = fit(tmp_path, module, callbacks=[finetuning])
    assert not torch.equal(module.backbone.weight, start)
    assert len(fitter.optimizers[0].state) == 4


class Repeated(Dataset):
    """An epoch of five steps over the same samples, for a DataLoader."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return X[i % 20], Y[i % 20]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("first", ["full", "plain"])
@pytest.mark.parametrize("second", ["full", "plain"])
def test_checkpoint_goes_between_loaders_within_an_epoch(first, second, tmp_path):
    def part(kind, steps, callbacks=(), ckpt_path=None):
        callbacks = [*callbacks, *([FullBatch()] if kind == "full" else [])]
        loader = FullBatchLoader((X, Y), steps_per_epoch=5) if kind == "full" else DataLoader(Repeated(), batch_size=20)
        fitter = trainer(tmp_path, callbacks, max_epochs=-1, max_steps=steps, enable_checkpointing=bool(callbacks))
        module = Regression()
        fitter.fit(module, loader, ckpt_path=ckpt_path)
        return module

    whole = part("full", 15)
    part(first, 10, [ModelCheckpoint(tmp_path, "half", every_n_train_steps=8, save_top_k=-1)])
    resumed = part(second, 15, ckpt_path=tmp_path / "half.ckpt")
    assert all_equal(resumed.parameters(), whole.parameters())


class Tuned(pl.LightningModule):
    def __init__(self, size):
        super().__init__()
        self.lr, self.batch_size = 1e-2, size
        self.net = layers()

    def train_dataloader(self):
        return FullBatchLoader((X, Y), self.batch_size, steps_per_epoch=50)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    test_step = predict_step = training_step

    def configure_optimizers(self):
        return Rprop(self.parameters(), lr=self.lr)


class Validated(Tuned):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


HELPS_TUNERS = "for validate, test, predict, tuners and finders use micro_batch_size=None or a DataLoader"


class TunedPlainly(Tuned):
    def train_dataloader(self):
        return DataLoader(Repeated(), batch_size=self.batch_size)


LR_FINDERS = [
    lambda fitter, module: Tuner(fitter).lr_find(module, num_training=20),
    lambda fitter, module: add(fitter, LearningRateFinder(num_training_steps=20)).fit(module),
]
BATCH_SIZE_FINDERS = [
    lambda fitter, module: Tuner(fitter).scale_batch_size(module, max_trials=2, steps_per_trial=1),
    lambda fitter, module: add(fitter, BatchSizeFinder(max_trials=2, steps_per_trial=1)).fit(module),
]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The loaded state replaced options")  # lr_find puts the first lr back
@pytest.mark.parametrize("tune", [*LR_FINDERS, *BATCH_SIZE_FINDERS])
def test_tuners_say_what_helps_and_that_helps(tune, tmp_path):
    with pytest.raises(RuntimeError, match=re.escape(HELPS_TUNERS)):
        tune(trainer(tmp_path, [FullBatch()], max_epochs=1), Tuned(8))
    if tune in LR_FINDERS:
        tune(trainer(tmp_path, [FullBatch()], max_epochs=1), Tuned(None))
    tune(trainer(tmp_path, [], max_epochs=1), TunedPlainly(8))


def add(fitter, callback):
    fitter.callbacks.append(callback)
    return fitter


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_evaluation_loops_say_what_helps_and_that_helps(loop, tmp_path):
    def run(size):
        return getattr(trainer(tmp_path, [FullBatch()]), loop)(Validated(None), FullBatchLoader((X, Y), size))

    with pytest.raises(RuntimeError, match=re.escape(HELPS_TUNERS)):
        run(7)
    run(None)


def test_validation_in_fit_says_what_helps_and_that_helps(tmp_path):
    def run(size):
        trainer(tmp_path, [FullBatch()], max_epochs=1).fit(Validated(7), None, FullBatchLoader((X, Y), size))

    with pytest.raises(RuntimeError, match=re.escape(HELPS_TUNERS)):
        run(7)
    run(None)


class Alternating(pl.LightningModule):
    """Manual optimization with two optimizers, in the way that the error says."""

    automatic_optimization = False

    def __init__(self, loader=None):
        super().__init__()
        self.net = layers()
        self.loader = loader

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            for micro_batch in self.loader.micro_batches():
                x, y = micro_batch.data
                self.manual_backward((self.net(x) - y).square().sum() / self.loader.num_samples)
            optimizer.step()

    def configure_optimizers(self):
        return Rprop(self.net[0].parameters()), Rprop(self.net[2].parameters())


def test_manual_optimization_says_what_helps_and_that_helps(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"train_dataloaders=range\(steps\), and iterate over loader.mi"
    ):
        trainer(tmp_path, [FullBatch()]).fit(Alternating(), FullBatchLoader((X, Y), 7))
    ends = []
    for size in (None, 7):
        module = Alternating(FullBatchLoader((X, Y), size))
        trainer(tmp_path, max_epochs=2).fit(module, range(10))
        ends.append(list(module.parameters()))
    assert all_equal(*ends)  # signs are equal, whatever the rounding


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_training_step_of_an_iterator_is_refused(tmp_path):
    class Iterating(Regression):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(MisconfigurationException, match="takes dataloader_iter: take a batch"):
        fit(tmp_path, Iterating())


@pytest.mark.parametrize("log_as", [3, True, "", b"loss", ["loss"]])
def test_log_as_must_be_a_name(log_as):
    with pytest.raises(ValueError, match=re.escape(f"or None, got {log_as!r}")):
        FullBatch(log_as=log_as)


@pytest.mark.parametrize("name", ["prog_bar", "take_over"])
def test_switches_must_be_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        FullBatch(log_as="loss", **{name: "no"})


@pytest.mark.parametrize(
    "log", [{"on_step": True}, {"on_epoch": True, "on_step": False}, {"on_step": True, "on_epoch": True}]
)
@pytest.mark.parametrize("size", [None, 7])
def test_log_as_that_the_module_logs_is_an_error(log, size, tmp_path):
    module = Regression(**log)
    start = copy.deepcopy(list(module.parameters()))
    with pytest.raises(MisconfigurationException, match=r"log_as='loss'\) logs .* by a name that the module logs too"):
        fit(tmp_path, module, size, log_as="loss")
    assert all_equal(module.parameters(), start)


def test_log_as_in_a_second_fit_of_the_trainer(tmp_path):
    fitter = fit(tmp_path, Regression(), log_as="loss", epochs=2)
    fitter.fit_loop.max_epochs = 4
    fitter.fit(Regression(), FullBatchLoader((X, Y), 7))
    assert fitter.global_step == 4


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`")
def test_no_optimizer_is_an_error(tmp_path):
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
def test_loss_must_be_one_number(make, error, message, size, tmp_path):
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return make((self.net(x) - y).square())

    with pytest.raises(error, match=message):
        fit(tmp_path, Module(), size)


class Measured(pl.LightningModule):
    """It logs torchmetrics objects in every way."""

    def __init__(self, log_in="training_step"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 2)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2, average="micro")
        self.auc = torchmetrics.classification.MulticlassAUROC(2)  # keeps all predictions
        scores = {"f1": torchmetrics.classification.MulticlassF1Score(2)}
        scores["precision"] = torchmetrics.classification.MulticlassPrecision(2)  # shares its state with f1
        self.scores = torchmetrics.MetricCollection(scores)
        self.log_in, self.seen, self.truth = log_in, [], []

    def metrics(self):
        return {"accuracy": self.accuracy, "auc": self.auc, **self.scores}

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.net(x)
        probabilities = output.detach().softmax(dim=1)
        self.accuracy(probabilities, y)
        self.auc(probabilities, y)
        self.scores(probabilities, y)
        if self.log_in == "training_step":
            self.log_all()
        return nn.functional.cross_entropy(output, y)

    def log_all(self):
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("auc", self.auc, on_step=True, on_epoch=True)
        self.log_dict(self.scores, on_step=True, on_epoch=True)

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            probabilities = self.net(X).softmax(dim=1)
        fresh = {name: metric.clone() for name, metric in self.metrics().items()}
        for metric in fresh.values():
            metric.reset()
            metric.update(probabilities, LABELS)
        self.truth.append({name: metric.compute().item() for name, metric in fresh.items()})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.log_in == "on_train_batch_end":
            self.log_all()

    def configure_optimizers(self):
        return Rprop(self.parameters())


LABELS = (X.sum(dim=1) > 0).long()


@pytest.mark.parametrize("log_in", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize("size", [None, 7])
def test_torchmetrics_show_all_micro_batches(size, log_in, tmp_path):
    module = Measured(log_in)
    seen = []

    class Show(pl.Callback):
        def on_before_zero_grad(self, trainer, *args):  # of the step after, when the last one's values are there
            seen.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.endswith("_step")})

    fitter = trainer(tmp_path, [FullBatch(), Show()], max_epochs=1)
    fitter.fit(module, FullBatchLoader((X, LABELS), size, steps_per_epoch=4))
    for shown, truth in zip(seen[1:], module.truth, strict=False):
        assert shown == {f"{name}_step": pytest.approx(value, rel=1e-6) for name, value in truth.items()}
    metrics = fitter.callback_metrics
    accuracies = [truth["accuracy"] for truth in module.truth]
    assert metrics["accuracy_epoch"].item() == pytest.approx(sum(accuracies) / 4, rel=1e-6)
    assert all(not metric._forward_hooks for metric in module.metrics().values())


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_under_micro_batches_is_warned_of(make, tmp_path):
    with pytest.warns(UserWarning, match="estimate of the spectral norm at each micro-batch.*eval mode"):
        fit(tmp_path, Regression(net=layers(make(nn.Linear(8, 8)))), 7)
    fit(tmp_path, Regression(net=layers(make(nn.Linear(8, 8)))), None)
    fit(tmp_path, Regression(net=layers(make(nn.Linear(8, 8)).eval())), 7)


def clamp(param):
    param.grad.clamp_(-0.1, 0.1)


@pytest.mark.parametrize(
    "register",
    [
        lambda param: param.register_hook(lambda grad: grad.clamp(-0.1, 0.1)),
        lambda param: param.register_post_accumulate_grad_hook(clamp),
    ],
)
def test_parameter_hooks_under_micro_batches_are_warned_of(register, tmp_path):
    def make():
        module = Regression()
        register(module.net[0].weight)
        return module

    with pytest.warns(UserWarning, match=r"net.0.weight has a hook on its gradient.*Do that in on_after_backward"):
        fit(tmp_path, make(), 7)
    fit(tmp_path, make(), None)


def test_subclass_may_log(tmp_path):
    class Logging(FullBatch):
        def on_train_batch_end(self, trainer, module, outputs, *args):
            super().on_train_batch_end(trainer, module, outputs, *args)
            self.log("twice", 2 * outputs["loss"])

    fitter = trainer(tmp_path, [Logging(log_as="loss")], max_epochs=2)
    fitter.fit(Regression(), FullBatchLoader((X, Y), 7))
    assert fitter.callback_metrics["twice"] == 2 * fitter.callback_metrics["loss"]
