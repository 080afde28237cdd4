"""A step that fails leaves parameters, state and buffers as they were before it."""

import copy

import pytest
import torch
from fitting import fit as fit_data
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from whole_set import Regression, make_data, network

from lightning_rprop import FullBatch, Rprop

DATA = make_data(40)

# Lightning warns about checkpoints of OnExceptionCheckpoint and about resuming without the callback that saved
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.* normalizes by the statistics of a micro-batch"),
]


def fit(folder, module, steps=10, **options):
    """Train for two epochs of five steps with two micro-batches each; return the Trainer."""
    return fit_data(folder, module, 20, DATA, steps, per_epoch=5, **options)


def everything(module):
    """Return a copy of all that a resumed run depends on."""
    state = module.optimizers().optimizer.state_dict() if module._trainer is not None else {}
    return copy.deepcopy((module.state_dict(), state))


def same(a, b):
    """Return whether two nested containers are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Failing(Regression):
    """Fails in one call of training_step, and copies itself before each step."""

    def __init__(self, fail_at=None, make=Rprop):
        super().__init__(make, net=network(nn.BatchNorm1d(8)))
        self.fail_at = fail_at
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("extremes", None, persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].train(self.current_epoch > 0)  # frozen in the first epoch
        self.before = everything(self), copy.deepcopy(dict(self.named_buffers()))

    def training_step(self, batch, batch_idx):
        if len(self.targets) == self.fail_at:
            raise ArithmeticError("failed")
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(dim=0)  # reassigned, not changed in place
        if self.current_epoch > 0:
            self.extremes = batch[0].amax(dim=0)  # None until now
        self.count += 1
        return super().training_step((batch[0] - self.mean, batch[1]), batch_idx)


MAKES = {
    "Rprop": Rprop,
    "max_iter": lambda params: Rprop(params, variant="irprop+", max_iter=3),
    "Adam": torch.optim.Adam,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("make", MAKES)
def test_every_buffer_is_restored(make, tmp_path):
    whole = Failing(make=MAKES[make])
    fit(tmp_path, whole)
    calls = len(whole.targets)
    for at in range(1, calls, max(1, calls // 4)):
        failing = Failing(at, MAKES[make])
        saves = [OnExceptionCheckpoint(tmp_path, f"{make}-{at}")]
        with pytest.raises(ArithmeticError):
            fit(tmp_path, failing, callbacks=saves, enable_checkpointing=True)
        state, buffers = failing.before
        assert same(everything(failing), state)
        assert same(dict(failing.named_buffers()), buffers)
        resumed = Failing(make=MAKES[make])
        fit(tmp_path, resumed, ckpt_path=tmp_path / f"{make}-{at}.ckpt")
        assert same(everything(resumed), everything(whole)), at


@pytest.mark.parametrize("make", MAKES)
def test_exception_after_update_undoes_it(make, tmp_path):
    class Late(Failing):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 7:
                raise ArithmeticError("after the update")

    module = Late(make=MAKES[make])
    with pytest.raises(ArithmeticError, match="after the update"):
        fit(tmp_path, module)
    assert same(everything(module), module.before[0])
    resumed, whole = Failing(make=MAKES[make]), Failing(make=MAKES[make])
    late = Late(make=MAKES[make])
    with pytest.raises(ArithmeticError):
        fit(tmp_path, late, callbacks=[OnExceptionCheckpoint(tmp_path, "late")], enable_checkpointing=True)
    fitter = fit(tmp_path, resumed, ckpt_path=tmp_path / "late.ckpt")
    fit(tmp_path, whole)
    assert fitter.global_step == 10
    assert same(everything(resumed), everything(whole))


@pytest.mark.parametrize("fails_at", [0, 4])
def test_half_made_update_is_undone(fails_at, tmp_path):
    class OutOfMemory(Rprop):
        steps = 0

        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            if self.steps == fails_at:
                half = self.param_groups[0]["params"][:2]
                for p in half:  # these have moved and have a new state
                    p.data.add_(1)
                    self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
                raise torch.OutOfMemoryError("out of memory")
            self.steps += 1
            super().step()

    module = Failing(make=OutOfMemory)
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, module)
    assert same(everything(module), module.before[0])
    assert bool(module.optimizers().optimizer.state) == (fails_at > 0)


def test_grad_scaler_is_restored(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    class Late(Regression):
        def optimizer_step(self, *args, **kwargs):
            self.before = scaler.state_dict()
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 5:
                raise ArithmeticError("after the update")

    module = Late()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.state_dict() == module.before
    assert module.before["scale"] > 2.0**10


@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_unwritable_buffer_does_not_stop_undo(kind, tmp_path):
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise ArithmeticError("failed")
            return super().training_step(batch, batch_idx)

    module = Module()
    with torch.inference_mode(kind == "inference"):
        module.register_buffer("fixed", torch.ones(1).expand(3) if kind == "expanded" else torch.ones(3))
    full_batch = FullBatch()
    with pytest.raises(ArithmeticError, match="failed"):
        fit(tmp_path, module, full_batch=full_batch)
    assert full_batch._fit is None


def test_other_optimizer_state_is_restored(tmp_path):
    class Counting(Rprop):
        def step(self, closure=None):
            result = super().step(closure)
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
            self.state["calls"] = self.state.get("calls", 0) + 1
            return result

    class Module(Regression):
        def __init__(self):
            super().__init__(Counting)
            self.target = nn.Parameter(torch.zeros(()), requires_grad=False)

        def on_train_start(self):
            self.later = nn.BatchNorm1d(5)

        def training_step(self, batch, batch_idx):
            self.target += 1
            return super().training_step((self.later(batch[0]), batch[1]), batch_idx)

        def on_before_optimizer_step(self, optimizer):
            pass

        def configure_optimizers(self):
            return self.make(self.net.parameters())

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 2:
                raise ArithmeticError("after the update")

    module = Module()
    with pytest.raises(ArithmeticError):
        fit_data(tmp_path, module, None, DATA)
    optimizer = module.optimizers().optimizer
    assert (optimizer.param_groups[0]["k"], optimizer.state["calls"]) == (2, 2)
    assert (module.target.item(), module.later.num_batches_tracked.item()) == (2, 2)


def test_skipped_step_is_not_undone_later(tmp_path):
    class Skipping(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 else None

        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.net[0].bias.fill_(3)
                raise ArithmeticError("at the end")

    module = Skipping()
    with pytest.raises(ArithmeticError):
        fit_data(tmp_path, module, 7, DATA, per_epoch=1)
    assert (module.net[0].bias == 3).all()
