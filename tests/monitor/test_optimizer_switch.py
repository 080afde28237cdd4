"""StepSizeMonitor when optimizers are replaced during a fit."""

import lightning.pytorch as pl
import pytest
import torch
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from monitor_runs import TakingTurns
from monitor_truth import GRADIENT, Truth

from lightning_rprop import Rprop, StepSizeMonitor
from lightning_rprop.monitor._warnings import TOPICS

OLD, NEW = (0.03, 0.2), (0.01, 0.7)  # the step_sizes of the first and the second Rprop


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def old(module):
    return Rprop(module.parameters(), lr=0.1, step_sizes=OLD)


def new(module):
    return Rprop(module.parameters(), lr=0.5, step_sizes=NEW, variant="irprop+")


def new_torch(module):
    return torch.optim.Rprop(module.parameters(), lr=0.5, step_sizes=NEW)


def by_trainer(trainer, optimizer):
    trainer.optimizers = [optimizer]


def by_strategy(trainer, optimizer):
    trainer.strategy.optimizers = [optimizer]


def by_setup(trainer, optimizer):
    trainer.lightning_module.make = lambda _: optimizer
    trainer.strategy.setup_optimizers(trainer)


class Switch(pl.Callback):
    """Replace the optimizer before some steps; ``makes`` maps each step to a function that makes the optimizer."""

    def __init__(self, makes, replace=by_trainer):
        self.makes, self.replace = makes, replace

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.makes:
            self.replace(trainer, self.makes[batch_idx](pl_module))


def fit(tmp_path, first, switch, steps=9, callbacks=(), module=Net, **options):
    """Return the monitor, its records, the truth to compare them with, and the Trainer."""
    log, truth = Recorder(), Truth()
    monitor = StepSizeMonitor(**{"every_n_steps": 1, "silence": TOPICS} | options)
    trainer = make_trainer(tmp_path, [switch, truth, *callbacks, monitor], logger=log, max_epochs=1)
    trainer.fit(module(first), Batches(steps))
    return monitor, log.records(), truth, trainer


@pytest.mark.parametrize("replace", [by_trainer, by_strategy, by_setup])
@pytest.mark.parametrize("second", [new, new_torch])
def test_records_begin_with_the_first_rprop(replace, second, tmp_path):
    monitor, records, truth, trainer = fit(tmp_path, sgd, Switch({4: second}, replace))
    assert [step for step, _ in records] == [4, 5, 6, 7, 8]
    for step, metrics in records:
        assert metrics == pytest.approx(truth.expected(step, bounds=NEW), rel=1e-12)
    assert trainer.callback_metrics["step_size/max"] == max(s.max() for s in truth.after[8].values())
    assert monitor._history.series()["step_size/mean"][0] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("replace", [by_trainer, by_strategy, by_setup])
def test_records_end_with_the_last_rprop(replace, tmp_path):
    _, records, truth, trainer = fit(tmp_path, old, Switch({4: sgd}, replace))
    assert [step for step, _ in records] == [0, 1, 2, 3]
    for step, metrics in records:
        assert metrics == pytest.approx(truth.expected(step, bounds=OLD), rel=1e-12)
    last_mean = records[-1][1]["step_size/mean"]
    assert trainer.callback_metrics["step_size/mean"].item() == pytest.approx(last_mean, rel=1e-6)


@pytest.mark.parametrize("replace", [by_trainer, by_strategy, by_setup])
def test_records_follow_the_current_rprop(replace, tmp_path):
    _, records, truth, _ = fit(tmp_path, old, Switch({3: new, 5: sgd, 7: old}, replace), per_parameter=True)
    assert [step for step, _ in records] == [0, 1, 2, 3, 4, 7, 8]
    for step, metrics in records:
        names = [*truth.after[step]]
        right = truth.expected(step, bounds=NEW if step in (3, 4) else OLD, parameters=names)
        assert metrics == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("first", [sgd, old])
def test_reused_group_object_is_noticed(first, tmp_path):
    """A new group may get the address of a freed one, with the same number of parameters."""

    def with_the_same_group(module):
        optimizer, group = new(module), module.trainer.optimizers[0].param_groups[0]
        group.update(optimizer.param_groups[0])
        optimizer.param_groups = [group]
        return optimizer

    _, records, truth, _ = fit(tmp_path, first, Switch({4: with_the_same_group}))
    assert [step for step, _ in records] == [*range(4 if first is sgd else 0, 9)]
    for step, metrics in records:
        assert metrics == pytest.approx(truth.expected(step, bounds=NEW if step >= 4 else OLD), rel=1e-12)


def test_replaced_parameter_is_noticed(tmp_path):
    """Replace it in place, so that the group keeps its length."""

    def exchange(module):
        optimizer = module.trainer.optimizers[0]
        old_bias, module.net[2].bias = module.net[2].bias, torch.nn.Parameter(torch.ones(1))
        params = optimizer.param_groups[0]["params"]
        params[[p is old_bias for p in params].index(True)] = module.net[2].bias
        return optimizer

    _, records, truth, _ = fit(tmp_path, old, Switch({4: exchange}), per_parameter="net.2.bias")
    for step, metrics in records:
        assert metrics == pytest.approx(truth.expected(step, bounds=OLD, parameters=["net.2.bias"]), rel=1e-12)


@pytest.mark.filterwarnings("ignore:The loaded state replaced options")
def test_gradients_of_replaced_rprop_are_dropped(tmp_path):
    """Replace the optimizer between a step and its record, which then has no gradient statistics."""
    stepped = []

    class Behind(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.optimizers = [new(pl_module)]
                trainer.optimizers[0].load_state_dict(stepped[0].state_dict())

    def keep(module):
        stepped.append(old(module))
        return stepped[0]

    _, records, _, _ = fit(tmp_path, keep, Switch({}), callbacks=[Behind()], steps=5)
    gradient = {f"step_size/{name}" for name in GRADIENT}
    assert [step for step, metrics in records if gradient <= metrics.keys()] == [0, 1, 3, 4]
    assert not gradient & dict(records)[2].keys()


def test_rprops_sharing_parameters_stay_apart(tmp_path):
    log = Recorder()
    monitor = StepSizeMonitor(every_n_steps=1, per_group=True, statistics=["max", "zero_gradient"], silence=TOPICS)
    module = TakingTurns(lambda m: [Rprop(m.parameters(), lr=0.25), Rprop(m.parameters(), lr=0.5)], manual=True)
    make_trainer(tmp_path, [monitor], logger=log, max_epochs=1).fit(module, Batches(2))
    (_, first), (_, second) = log.records()
    assert first["step_size/optimizer0.group0/max"] == 0.25
    assert second["step_size/optimizer1.group0/max"] == 0.5
    assert [k for k in first if "zero" in k] == ["step_size/zero_gradient", "step_size/optimizer0.group0/zero_gradient"]
    assert [k for k in second if "zero" in k] == [
        "step_size/zero_gradient",
        "step_size/optimizer1.group0/zero_gradient",
    ]


def test_epoch_records_follow_the_optimizer(tmp_path):
    class AtEpoch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.optimizers = [[old, sgd, new][trainer.current_epoch](pl_module)]

    log, truth = Recorder(), Truth()
    monitor = StepSizeMonitor("epoch", silence=TOPICS)
    make_trainer(tmp_path, [AtEpoch(), truth, monitor], logger=log).fit(Net(sgd), Batches(3))
    assert [step for step, _ in log.records()] == [2, 8]
    for (step, metrics), bounds in zip(log.records(), (OLD, NEW), strict=True):
        assert metrics == pytest.approx(truth.expected(step, bounds=bounds), rel=1e-12)


@pytest.mark.parametrize("make", [sgd, lambda module: None], ids=["sgd", "none"])
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
def test_run_without_an_rprop_is_warned_about(make, tmp_path):
    """It is not an error, because an Rprop may come later. The clipping warning does not apply."""
    log, monitor = Recorder(), StepSizeMonitor()
    trainer = make_trainer(tmp_path, [monitor], logger=log, log_every_n_steps=1, gradient_clip_val=0.5)
    with pytest.warns(UserWarning, match=r"needs an Rprop optimizer, .*returned: .*Return lightning_rprop"):
        trainer.fit(Net(make), Batches(2))
    assert trainer.global_step > 0
    assert log.records() == []
    with pytest.raises(ValueError, match=r"no record to plot: .*no Rprop among the optimizers\. Return lightning_rp"):
        monitor.plot()


def test_late_scheduler_sees_fresh_values(tmp_path):
    """Values are published at every step once a scheduler monitors them."""
    seen = []

    class Late(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.make = watched
                self.trainer.strategy.setup_optimizers(self.trainer)

        def lr_scheduler_step(self, scheduler, metric):
            seen.append(metric.item())

    def watched(module):
        optimizer = new(module)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        scheduler = {"scheduler": plateau, "monitor": "step_size/mean", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    truth = Truth()
    monitor = StepSizeMonitor(every_n_steps=100, silence=TOPICS)
    make_trainer(tmp_path, [truth, monitor], max_epochs=2).fit(Late(sgd), Batches(3))
    means = [truth.expected(step, ["mean"], NEW)["step_size/mean"] for step in (3, 4, 5)]
    assert seen == pytest.approx(means, rel=1e-6)
