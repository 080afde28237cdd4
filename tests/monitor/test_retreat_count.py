"""StepSizeMonitor counts the steps that take back the last move, across resumes and optimizers."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from monitor_runs import quiet_monitor
from test_optimizer_switch import Switch, sgd

from lightning_rprop import Rprop, StepSizeMonitor

KEY = "step_size/retreats"


def ours(module, **options):
    return Rprop(module.parameters(), lr=0.1, **options)


class Bad(Net):
    """A network whose loss is NaN in some steps."""

    def __init__(self, bad, make=ours):
        super().__init__(make)
        self.bad = bad

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_step in self.bad else loss


def fit(tmp_path, module, steps, callbacks=(), ckpt_path=None, **options):
    """Return the monitor, the retreats in its records, and the Trainer."""
    log, monitor = Recorder(), quiet_monitor(**{"every_n_steps": 1} | options)
    trainer = make_trainer(
        tmp_path,
        [*callbacks, monitor],
        logger=log,
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=bool(callbacks),
    )
    trainer.fit(module, Batches(4), ckpt_path=ckpt_path)
    return monitor, {step: metrics.get(KEY) for step, metrics in log.records()}, trainer


def test_retreats_are_counted_in_total_only(tmp_path):
    monitor, counts, trainer = fit(
        tmp_path, Bad({2, 3, 6}), 8, per_parameter=True, per_group=True, prog_bar=["retreats"]
    )
    assert counts == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3, 7: 3}
    assert trainer.callback_metrics[KEY].item() == trainer.progress_bar_metrics[KEY] == 3
    assert [key for key in monitor._history.series() if key.endswith("retreats")] == [KEY]
    monitor.plot()
    assert StepSizeMonitor().statistics[-1] == "retreats"


def test_retreats_need_our_rprop(tmp_path):
    def torchs(module):
        return torch.optim.Rprop(module.parameters(), lr=0.1)

    for make, number in ((torchs, None), (lambda module: ours(module, retreat=False), 0)):
        _, counts, _ = fit(tmp_path, Bad({2}, make), 4)
        assert counts == dict.fromkeys(range(4), number)
    _, counts, _ = fit(tmp_path, Bad({2, 6}), 8, [Switch({1: torchs})], statistics=["max"])
    assert counts == dict.fromkeys(range(8))  # not asked for


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("every", [1, 3])
def test_count_continues_after_a_resume(every, tmp_path):
    """Even if the checkpoint is saved between two records."""
    bad, saves = {1, 4, 5, 8}, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    _, right, _ = fit(tmp_path, Bad(bad), 12, [saves], every_n_steps=every)
    assert right[11] == 4
    for step in (2, 5, 6, 9):
        path = tmp_path / f"step={step}.ckpt"
        _, counts, _ = fit(tmp_path, Bad(bad), 12, (), path, every_n_steps=every)
        assert counts == {at: count for at, count in right.items() if at >= step}


def test_older_checkpoints_load(tmp_path):
    _, _, trainer = fit(tmp_path, Bad({1}), 4)
    trainer.save_checkpoint(tmp_path / "4.ckpt")
    checkpoint = torch.load(tmp_path / "4.ckpt", weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("StepSizeMonitor"))
    assert state.pop("retreats") == 1
    torch.save(checkpoint, tmp_path / "old.ckpt")
    _, counts, _ = fit(tmp_path, Bad({6}), 8, ckpt_path=tmp_path / "old.ckpt")
    assert counts == {4: 0, 5: 0, 6: 1, 7: 1}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_count_covers_replaced_optimizers(every, tmp_path):
    """Also of one that is replaced between two records, and of one that comes back."""
    made = []

    def make(module):
        made.append(ours(module, variant="irprop+"))
        return made[-1]

    module = Bad({1, 3, 5, 7, 9, 11, 13}, make)
    log, monitor = Recorder(), quiet_monitor(every_n_steps=every)
    switch = Switch({4: make, 8: lambda _: made[0], 12: sgd})
    trainer = make_trainer(tmp_path, [switch, monitor], logger=log, max_epochs=1)
    trainer.fit(module, Batches(16))
    counts = {step: metrics[KEY] for step, metrics in log.records()}
    right = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert counts == {step: right[step] for step in range(12) if (step + 1) % every == 0}


def test_earlier_retreats_do_not_count(tmp_path):
    module = Bad({2})
    optimizer = ours(module)
    optimizer.retreats = 7
    module.make = lambda _: optimizer
    monitor, counts, _ = fit(tmp_path, module, 4)
    assert counts == {0: 0, 1: 0, 2: 1, 3: 1}
    assert monitor.state_dict()["retreats"] == 1


def test_counts_on_a_device_are_copied(tmp_path):
    """As a tensor that the optimizer changes in place."""
    module = Bad({1, 2})

    def make(module):
        optimizer = ours(module)
        optimizer.retreats = torch.zeros((), dtype=torch.int64)
        return optimizer

    module.make = make
    monitor, counts, _ = fit(tmp_path, module, 4)
    assert counts == {0: 0, 1: 1, 2: 2, 3: 2}
    assert monitor.state_dict()["retreats"] == 2


def test_exception_keeps_the_count(tmp_path):
    """A callback may save a checkpoint after the monitor has released the optimizers."""

    class Failing(Bad):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 6:
                raise ArithmeticError("failed")

    monitor = quiet_monitor(every_n_steps=4)
    with pytest.raises(ArithmeticError, match="failed"):
        make_trainer(tmp_path, [monitor]).fit(Failing({1, 5}), Batches(8))
    assert monitor.state_dict()["retreats"] == 2
