"""Values that StepSizeMonitor publishes to the progress bar, EarlyStopping, ModelCheckpoint and schedulers."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lit import Batches, Net, ValidatedNet
from lit import trainer as make_trainer
from monitor_runs import BOUNDS, CLOSE, FLOAT32, make_ours, quiet_monitor
from monitor_truth import Truth

from lightning_rprop import Rprop


def test_progress_bar_shows_chosen_values(tmp_path):
    seen = []

    class Bar(pl.callbacks.ProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({k: v for k, v in self.get_metrics(trainer, pl_module).items() if k.startswith("step")})

    truth = Truth()
    callback = quiet_monitor(prog_bar=["median"], statistics=["max", "median"], every_n_steps=2)
    trainer = make_trainer(tmp_path, [truth, callback, Bar()], max_epochs=1, enable_progress_bar=True)
    trainer.fit(Net(make_ours), Batches(4))
    medians = {step: truth.expected(step, ["median"], BOUNDS) for step in (1, 3)}
    assert seen[0] == {}
    assert seen[1] == seen[2] == pytest.approx(medians[1], **CLOSE)
    assert seen[3] == pytest.approx(medians[3], **CLOSE)


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
@pytest.mark.parametrize("validate", [False, True])
def test_early_stopping_sees_fresh_values(log_every_n_steps, validate, tmp_path):
    """Even if no record is due and EarlyStopping comes before the monitor in the callbacks."""
    truth = Truth()
    stop = EarlyStopping("step_size/max", mode="max", stopping_threshold=0.2)
    make = lambda module: Rprop(module.parameters(), lr=0.1)  # noqa: E731
    callbacks = [stop, truth, quiet_monitor()]
    trainer = make_trainer(tmp_path, callbacks, max_epochs=50, log_every_n_steps=log_every_n_steps)
    trainer.fit(*([ValidatedNet(make), Batches(1), Batches(1)] if validate else [Net(make), Batches(1)]))
    largest = [max(s.max().item() for s in sizes.values()) for sizes in truth.after.values()]
    assert len(largest) == trainer.current_epoch < 50
    assert largest[-1] > 0.2
    assert all(value <= 0.2 for value in largest[:-1])


def test_checkpoints_see_fresh_values(tmp_path):
    """Even in the middle of an epoch, between two records."""
    truth = Truth()
    save = ModelCheckpoint(tmp_path, "{step}", "step_size/mean", save_top_k=-1, every_n_train_steps=2)
    trainer = make_trainer(tmp_path, [truth, quiet_monitor(), save], max_epochs=1, enable_checkpointing=True)
    trainer.fit(Net(make_ours), Batches(6))
    means = [truth.expected(step, ["mean"], BOUNDS)["step_size/mean"] for step in (1, 3, 5)]
    assert [v.item() for v in save.best_k_models.values()] == pytest.approx(means, **FLOAT32)


def test_schedulers_see_fresh_values(tmp_path):
    seen = []

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = make_ours(self)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            scheduler = {"scheduler": plateau, "monitor": "step_size/mean", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

        def lr_scheduler_step(self, scheduler, metric):
            seen.append(metric.item())

    truth = Truth()
    make_trainer(tmp_path, [truth, quiet_monitor()], max_epochs=1).fit(Scheduled(make_ours), Batches(6))
    means = [truth.expected(step, ["mean"], BOUNDS)["step_size/mean"] for step in range(6)]
    assert seen == pytest.approx(means, **FLOAT32)
