"""FullBatch works with Lightning's callbacks, lazy modules, validation and reloaded loaders."""

import pytest
import torch
from fitting import DATA, fit
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lit import all_equal, trainer
from torch import nn
from whole_set import Regression, make_data, network

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor

X, Y = make_data(20)


@pytest.mark.filterwarnings("ignore:net.1 normalizes by the statistics")
@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(8)])
def test_weight_averaging_matches_plain_loader(norm, size, tmp_path):
    def average(loader, callbacks):
        module = Regression(net=network(norm()))
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=3)
        trainer(tmp_path, [averaging, *callbacks], max_epochs=6).fit(module, loader)
        return module

    averaged = average(FullBatchLoader((X, Y), size), [FullBatch()])
    if size is None:
        expected = average(FullBatchLoader((X, Y)), [])
        assert all_equal(averaged.state_dict().values(), expected.state_dict().values())
    elif isinstance(averaged.net[1], nn.BatchNorm1d):
        assert averaged.net[1].num_batches_tracked == 3  # only of the last epoch, which trains nothing


@pytest.mark.parametrize("norm", [nn.Identity, nn.LazyBatchNorm1d])
@pytest.mark.parametrize("monitor", [False, True])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_lazy_modules_match_plain_loader(norm, monitor, tmp_path):
    def make():
        torch.manual_seed(0)
        return Regression(net=nn.Sequential(nn.LazyLinear(8), norm(), nn.Tanh(), nn.LazyLinear(1)))

    module, expected = make(), make()
    monitors = [StepSizeMonitor(every_n_steps=1, per_parameter=True, silence=["no_logger"])] if monitor else []
    torch.manual_seed(1)
    fit(tmp_path, module, None, (X, Y), steps=6, callbacks=monitors, per_epoch=1)
    torch.manual_seed(1)
    trainer(tmp_path, max_epochs=6).fit(expected, FullBatchLoader((X, Y)))
    assert all_equal(module.state_dict().values(), expected.state_dict().values())


def test_lazy_module_may_fail_in_its_first_step(tmp_path):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ArithmeticError("after the shapes are known")

    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    with pytest.raises(ArithmeticError):
        fit(tmp_path, Fails(net=net))


def test_finetuning_may_add_parameters(tmp_path):
    class Finetuned(Regression):
        def __init__(self):
            super().__init__(net=network())
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return Rprop(filter(lambda p: p.requires_grad, self.parameters()))

        def on_before_optimizer_step(self, optimizer):
            pass

    module = Finetuned()
    start = module.backbone.weight.detach().clone()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=3, backbone_initial_lr=1e-3, verbose=False)
    fitter = fit(tmp_path, module, steps=6, callbacks=[finetuning], per_epoch=1)
    assert not torch.equal(module.backbone.weight, start)
    assert len(fitter.optimizers[0].state) == 4


def test_lightning_counts_optimizer_steps(tmp_path):
    class Validated(Regression):
        validated_at = ()

        def validation_step(self, batch, batch_idx):
            self.validated_at += (self.trainer.global_step,)
            self.log("val", 1.0, batch_size=1)

    module = Validated()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    stop = EarlyStopping("val", patience=2)
    fitter = trainer(
        tmp_path, [checkpoint, stop, FullBatch()], enable_checkpointing=True, max_epochs=5, val_check_interval=4
    )
    loader = FullBatchLoader(DATA, 10, steps_per_epoch=8)
    fitter.fit(module, loader, FullBatchLoader(DATA))
    assert len(loader) == fitter.num_training_batches == 8
    assert module.validated_at == (4, 8, 12)  # stopped by patience
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {f"step={step}.ckpt" for step in (3, 6, 9, 12)}
    assert len(module.gradients) == 12

    fitter = trainer(tmp_path, [FullBatch()], max_epochs=2, limit_train_batches=3)
    fitter.fit(Regression(), FullBatchLoader(DATA, 10, steps_per_epoch=8))
    assert fitter.global_step == 6


def test_loader_may_be_reloaded_every_epoch(tmp_path):
    class Reloading(Regression):
        def train_dataloader(self):
            self.loaders = [*getattr(self, "loaders", []), FullBatchLoader(DATA, 10, steps_per_epoch=2)]
            return self.loaders[-1]

    module = Reloading()
    fitter = trainer(
        tmp_path,
        [StepSizeMonitor(silence=["no_logger"]), FullBatch()],
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=1,
    )
    fitter.fit(module)
    assert len(module.loaders) == 3
    assert len(module.gradients) == 6
    assert torch.equal(torch.cat(module.targets), DATA[1].flatten().repeat(6))
    assert fitter.callback_metrics["step_size/mean"] > 0
