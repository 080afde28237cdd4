"""StepSizeMonitor's warnings: when each is given, how often, and with which remedy."""

import re
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor
from lightning_rprop.monitor._warnings import TOPICS

REMEDIES = {
    "no_logger": "Give the Trainer one, for example logger=CSVLogger",
    "lr_scheduler": "StepLR schedules the lr of an Rprop, which has no effect.*Return only the optimizer",
    "gradient_clipping": "gradient_clip_val=0.5 has no effect on Rprop.*Leave it out",
    "sign_changes": "signs changed.*gradient is noisy.*FullBatch",
    "lower_bound": "100% of the step sizes are at their lower bound, 0.1: .*converged, or is stuck.*Stop it",
    "upper_bound": "100% of the step sizes are at their upper bound, 0.1: .*Raise the bound",
    "zero_gradients": "of the float16 gradients are exactly zero.*scale the loss up",
    "no_rprop": r"configure_optimizers returned: torch\.optim\.sgd\.SGD.*Return lightning_rprop\.Rprop",
    "no_record": r"log_every_n_steps=0.*Set StepSizeMonitor\(every_n_steps=1\)",
}


class Alternating(Net):
    """Flip the sign of every gradient at each step."""

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.net.parameters()) * (-1) ** batch_idx


class Rising(Net):
    """Compute the same gradient at every step."""

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.net.parameters())


class Underflowing(Net):
    """Compute so small a loss that its float16 gradients underflow to zero."""

    def training_step(self, batch, batch_idx):
        return (self.net(batch.to(self.net[0].weight.dtype)).float() * 1e-9).mean()


class Noisy(Net):
    """Compute a new random gradient at each step."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(batch_idx)
        return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in self.net.parameters())


def make_scheduled(module):
    optimizer = Rprop(module.parameters())
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


def make_rprop(lr=0.1, **others):
    return lambda module: Rprop(module.parameters(), lr=lr, **others)


def case(topic):
    """Return a module, the number of batches and Trainer options that cause only the warning of a topic."""
    module, batches, options = Net(make_rprop()), 3, {"logger": Recorder(), "log_every_n_steps": 1}
    if topic == "no_logger":
        options["logger"] = False
    elif topic == "lr_scheduler":
        module = Net(make_scheduled)
    elif topic == "gradient_clipping":
        options["gradient_clip_val"] = 0.5
    elif topic == "sign_changes":
        module, batches = Alternating(make_rprop(step_sizes=(1e-30, 1.0))), 15
    elif topic == "lower_bound":
        # sign changes at the lower bound are not noise
        module, batches = Alternating(make_rprop(step_sizes=(0.1, 1.0))), 15
    elif topic == "upper_bound":
        module = Rising(make_rprop(step_sizes=(1e-3, 0.1)))
    elif topic == "zero_gradients":
        module = Underflowing(make_rprop())
        options["precision"] = "16-true"
    elif topic == "no_rprop":
        module = Net(lambda module: torch.optim.SGD(module.parameters()))
    elif topic == "no_record":
        options["log_every_n_steps"] = 0
    return module, batches, options


def warnings_of(run):
    """Return the monitor's warnings during a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "StepSizeMonitor says this once" in str(w.message)]


def fit(tmp_path, topic, silence=()):
    module, batches, options = case(topic)
    trainer = make_trainer(tmp_path, [StepSizeMonitor(silence=silence)], **options)
    return warnings_of(lambda: trainer.fit(module, Batches(batches)))


@pytest.mark.parametrize("topic", TOPICS)
def test_warning_is_given_once_with_its_remedy(topic, tmp_path):
    (message,) = fit(tmp_path, topic)
    assert re.search(REMEDIES[topic], message)
    assert f"silence=['{topic}'] turns it off" in message
    assert fit(tmp_path, topic, silence=[topic]) == []


def test_every_topic_has_a_remedy():
    assert set(REMEDIES) == set(TOPICS)


@pytest.mark.parametrize("log_every_n_steps", [1, 10])
def test_noisy_gradient_is_warned_about(log_every_n_steps, tmp_path):
    monitor = StepSizeMonitor(silence=["no_logger"])
    trainer = make_trainer(tmp_path, [monitor], log_every_n_steps=log_every_n_steps, max_epochs=1)
    (message,) = warnings_of(lambda: trainer.fit(Noisy(make_rprop(step_sizes=(1e-30, 50))), Batches(260)))
    assert "signs changed" in message


@pytest.mark.parametrize(
    ("variant", "log_every_n_steps"), [("irprop-", 10), ("irprop-", 1), ("irprop+", 1), ("rprop-", 1)]
)
def test_full_batch_run_is_not_warned_about(variant, log_every_n_steps, tmp_path):
    callbacks = [FullBatch(), StepSizeMonitor(silence=["no_logger"])]
    trainer = make_trainer(tmp_path, callbacks, log_every_n_steps=log_every_n_steps, max_epochs=1)
    module = Regression(lambda params: Rprop(params, variant=variant))
    assert warnings_of(lambda: trainer.fit(module, FullBatchLoader(make_data(200), steps_per_epoch=220))) == []


def test_brief_noise_is_not_warned_about(tmp_path):
    """Noise must last for many steps, even if every step is recorded."""

    class Calming(Noisy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx if batch_idx < 40 else 0)

    monitor = StepSizeMonitor(silence=["no_logger", "upper_bound"])
    trainer = make_trainer(tmp_path, [monitor], log_every_n_steps=1, max_epochs=1)
    assert warnings_of(lambda: trainer.fit(Calming(make_rprop(step_sizes=(1e-30, 50))), Batches(260))) == []


def test_mixed_precision_checks_all_gradients(tmp_path):
    class Mixed(Underflowing):
        def training_step(self, batch, batch_idx):
            return (self.net(batch) * 1e-9).mean()

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))
    trainer = make_trainer(tmp_path, [StepSizeMonitor()], logger=Recorder(), log_every_n_steps=1, plugins=precision)
    (message,) = warnings_of(lambda: trainer.fit(Mixed(make_rprop()), Batches(3)))
    assert "float16 gradients are exactly zero" in message


def test_scheduler_of_sgd_is_not_warned_about(tmp_path):
    def make(module):
        sgd = torch.optim.SGD(module.net[0].parameters())
        return [sgd, Rprop(module.net[2].parameters())], [torch.optim.lr_scheduler.StepLR(sgd, 3)]

    trainer = make_trainer(tmp_path, [StepSizeMonitor()], logger=Recorder(), log_every_n_steps=1)
    assert warnings_of(lambda: trainer.fit(Net(make, manual=True), Batches(2))) == []


def test_resume_does_not_repeat_a_warning(tmp_path):
    def run(epochs, checkpoint=None):
        module, batches, options = case("sign_changes")
        trainer = make_trainer(tmp_path, [StepSizeMonitor()], max_epochs=epochs, **options)
        messages = warnings_of(lambda: trainer.fit(module, Batches(batches), ckpt_path=checkpoint))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return messages

    assert len(run(1)) == 1
    assert run(2, tmp_path / "last.ckpt") == []


def test_noisy_records_count_across_a_resume(tmp_path):
    """The warning takes five records: three before the resume and two after it."""

    def run(epochs, checkpoint=None):
        _, _, options = case("sign_changes")
        trainer = make_trainer(tmp_path, [StepSizeMonitor()], max_epochs=epochs, **options)
        module = Alternating(make_rprop(variant="rprop-"))  # compares signs at every step
        messages = warnings_of(lambda: trainer.fit(module, Batches(4), ckpt_path=checkpoint))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return messages

    assert run(1) == []
    assert len(run(2, tmp_path / "last.ckpt")) == 1
