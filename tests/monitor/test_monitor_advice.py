"""What StepSizeMonitor warns about: each once, with the remedy, and only with reason."""

import re
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lit import Batches, Net, Recorder, trainer
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
    """The gradient of some weights turns at every step."""

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.net.parameters()) * (-1) ** batch_idx


class Rising(Net):
    """The gradient never changes."""

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.net.parameters())


class Underflowing(Net):
    """A loss so small that its gradients are nothing in float16."""

    def training_step(self, batch, batch_idx):
        return (self.net(batch.to(self.net[0].weight.dtype)).float() * 1e-9).mean()


class Noisy(Net):
    """Another sample of pure noise at each step."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(batch_idx)
        return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in self.net.parameters())


def scheduled(module):
    optimizer = Rprop(module.parameters())
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


def options(lr=0.1, **others):
    return lambda module: Rprop(module.parameters(), lr=lr, **others)


def case(topic):
    """Module, batches and options of the Trainer that give cause for one advice and no other."""
    module, batches, how = Net(options()), 3, {"logger": Recorder(), "log_every_n_steps": 1}
    if topic == "no_logger":
        how["logger"] = False
    elif topic == "lr_scheduler":
        module = Net(scheduled)
    elif topic == "gradient_clipping":
        how["gradient_clip_val"] = 0.5
    elif topic == "sign_changes":
        module, batches = Alternating(options(step_sizes=(1e-30, 1.0))), 15
    elif topic == "lower_bound":
        module, batches = Alternating(options(step_sizes=(0.1, 1.0))), 15  # there, changes of sign are no noise
    elif topic == "upper_bound":
        module = Rising(options(step_sizes=(1e-3, 0.1)))
    elif topic == "zero_gradients":
        module = Underflowing(options())
        how["precision"] = "16-true"
    elif topic == "no_rprop":
        module = Net(lambda module: torch.optim.SGD(module.parameters()))
    elif topic == "no_record":
        how["log_every_n_steps"] = 0
    return module, batches, how


def said(run):
    """The advice that a run gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "StepSizeMonitor says this once" in str(w.message)]


def fit(tmp_path, topic, silence=()):
    module, batches, how = case(topic)
    return said(lambda: trainer(tmp_path, [StepSizeMonitor(silence=silence)], **how).fit(module, Batches(batches)))


@pytest.mark.parametrize("topic", TOPICS)
def test_each_is_said_once_with_its_remedy_and_can_be_silenced(topic, tmp_path):
    (message,) = fit(tmp_path, topic)
    assert re.search(REMEDIES[topic], message)
    assert f"silence=['{topic}'] turns it off" in message
    assert fit(tmp_path, topic, silence=[topic]) == []


def test_every_topic_has_a_remedy():
    assert set(REMEDIES) == set(TOPICS)


@pytest.mark.parametrize("log_every_n_steps", [1, 10])
def test_pure_noise_is_noticed(log_every_n_steps, tmp_path):
    monitor = StepSizeMonitor(silence=["no_logger"])
    fitter = trainer(tmp_path, [monitor], log_every_n_steps=log_every_n_steps, max_epochs=1)
    (message,) = said(lambda: fitter.fit(Noisy(options(step_sizes=(1e-30, 50))), Batches(260)))
    assert "signs changed" in message


@pytest.mark.parametrize(
    ("variant", "log_every_n_steps"), [("irprop-", 10), ("irprop-", 1), ("irprop+", 1), ("rprop-", 1)]
)
def test_a_whole_data_set_gives_no_cause(variant, log_every_n_steps, tmp_path):
    callbacks = [FullBatch(), StepSizeMonitor(silence=["no_logger"])]
    fitter = trainer(tmp_path, callbacks, log_every_n_steps=log_every_n_steps, max_epochs=1)
    module = Regression(lambda params: Rprop(params, variant=variant))
    assert said(lambda: fitter.fit(module, FullBatchLoader(make_data(200), steps_per_epoch=220))) == []


def test_noise_that_ends_gives_no_cause(tmp_path):
    """It must be found in records over a long time, however often there is one."""

    class Calming(Noisy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx if batch_idx < 40 else 0)

    monitor = StepSizeMonitor(silence=["no_logger", "upper_bound"])
    fitter = trainer(tmp_path, [monitor], log_every_n_steps=1, max_epochs=1)
    assert said(lambda: fitter.fit(Calming(options(step_sizes=(1e-30, 50))), Batches(260))) == []


def test_mixed_precision_counts_all_gradients_as_half(tmp_path):
    class Mixed(Underflowing):
        def training_step(self, batch, batch_idx):
            return (self.net(batch) * 1e-9).mean()

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))
    how = {"logger": Recorder(), "log_every_n_steps": 1, "plugins": precision}
    (message,) = said(lambda: trainer(tmp_path, [StepSizeMonitor()], **how).fit(Mixed(options()), Batches(3)))
    assert "float16 gradients are exactly zero" in message


def test_another_optimizers_scheduler_is_none_of_our_business(tmp_path):
    def make(module):
        sgd = torch.optim.SGD(module.net[0].parameters())
        return [sgd, Rprop(module.net[2].parameters())], [torch.optim.lr_scheduler.StepLR(sgd, 3)]

    fitter = trainer(tmp_path, [StepSizeMonitor()], logger=Recorder(), log_every_n_steps=1)
    assert said(lambda: fitter.fit(Net(make, manual=True), Batches(2))) == []


def test_what_was_said_is_not_said_again_after_a_resume(tmp_path):
    def run(epochs, checkpoint=None):
        module, batches, how = case("sign_changes")
        fitter = trainer(tmp_path, [StepSizeMonitor()], max_epochs=epochs, **how)
        messages = said(lambda: fitter.fit(module, Batches(batches), ckpt_path=checkpoint))
        fitter.save_checkpoint(tmp_path / "last.ckpt")
        return messages

    assert len(run(1)) == 1
    assert run(2, tmp_path / "last.ckpt") == []


def test_several_records_count_across_a_resume(tmp_path):
    """Three records before, two after: it takes five."""

    def run(epochs, checkpoint=None):
        _, _, how = case("sign_changes")
        fitter = trainer(tmp_path, [StepSizeMonitor()], max_epochs=epochs, **how)
        module = Alternating(options(variant="rprop-"))  # in which every step can be compared with the one before
        messages = said(lambda: fitter.fit(module, Batches(4), ckpt_path=checkpoint))
        fitter.save_checkpoint(tmp_path / "last.ckpt")
        return messages

    assert run(1) == []
    assert len(run(2, tmp_path / "last.ckpt")) == 1
