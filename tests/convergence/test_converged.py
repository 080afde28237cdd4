"""Converged stops a fit at the step that a plain loop finds, resumes there, and leaves nothing behind."""

import copy
import gc
import pickle
import weakref

import lightning.pytorch as pl
import pytest
import torch
from fitting import DATA, Losses, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lit import Batches, Net, trainer
from programs import HELPERS, run
from stopping import stop_step
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression

from lightning_rprop import Converged, Convergence, FullBatch, FullBatchLoader, Rprop

CHANGE = {"tolerance_change": 1e-3, "tolerance_grad": None, "patience": 4}

MAKERS = {
    "irprop-": Rprop,
    "irprop+": lambda params: Rprop(params, variant="irprop+"),
    "rprop+": lambda params: Rprop(params, variant="rprop+"),
    "torch": torch.optim.Rprop,
    "groups": lambda params: Rprop([{"params": [p]} for p in params], lr=0.05),
    "LBFGS": lambda params: torch.optim.LBFGS(params, max_iter=4),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.05),
}


def play(make, steps):
    """Train in a plain loop; return losses, largest gradient entries and largest step sizes."""
    module = Regression(make)
    optimizer = module.configure_optimizers()
    x, y = DATA

    def closure():
        optimizer.zero_grad()
        loss = (module.net(x) - y).square().mean()
        loss.backward()
        return loss

    losses, grads, step_sizes = [], [], []
    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
        grads.append(max(p.grad.abs().max().item() for p in module.parameters()))
        found = [state["step_size"].max().item() for state in optimizer.state.values() if "step_size" in state]
        step_sizes.append(max(found, default=None))
    return losses, grads, step_sizes


@pytest.mark.parametrize("name", MAKERS)
def test_fit_stops_where_a_plain_loop_does(name, tmp_path):
    losses, grads, step_sizes = play(MAKERS[name], 200)
    cases = [
        ({"change": 1e-3}, 4),
        ({"change": 1e-2}, 3),
        ({"grad": grads[100]}, 1),
        ({"change": 1e-3, "grad": 0.05}, 2),
    ]
    if step_sizes[-1] is not None:
        cases.append(({"step": sorted(step_sizes)[80]}, 2))
    found = []
    for options, patience in cases:
        expected = stop_step(losses, grads, step_sizes, **options, patience=patience)
        every = {f"tolerance_{key}": options.get(key) for key in ("change", "grad", "step")}
        converged = Converged(**every, patience=patience)
        fitter = fit(tmp_path, Regression(MAKERS[name]), None, steps=200, callbacks=[converged])
        assert fitter.global_step == (expected or 200), options
        assert converged.reason is None if expected is None else converged.reason.endswith(f"step {expected}")
        found.append(expected)
    assert len({*found} - {None}) >= 3


def test_fit_without_full_batch_stops_alike(tmp_path):
    """With a batch that is the whole set; one with several batches follows the loss of each."""
    losses, grads, _ = play(Rprop, 200)
    expected = stop_step(losses, grads, change=1e-3, patience=4)
    converged = Converged(**CHANGE)
    fitter = trainer(tmp_path, [converged], max_steps=200, max_epochs=-1)
    fitter.fit(Regression(), DataLoader(TensorDataset(*DATA), batch_size=103))
    assert fitter.global_step == expected


def test_min_steps_are_respected(tmp_path):
    converged, early = Converged(**CHANGE), Converged(**CHANGE)
    first = fit(tmp_path, Regression(), None, steps=200, callbacks=[early]).global_step
    fitter = fit(tmp_path, Regression(), None, steps=200, callbacks=[converged], min_steps=first + 7)
    assert fitter.global_step == first + 7
    assert converged.reason == early.reason  # names the step of convergence


def test_reason_is_printed_once(tmp_path):
    program = """
from fitting import fit
from whole_set import Regression
from lightning_rprop import Converged
converged = Converged(1e-3, None, patience=4)
fitter = fit(".", Regression(), None, steps=200, callbacks=[converged], min_steps=190)
assert fitter.global_step == 190
print("reason", converged.reason)
"""
    environment = {"PYTHONPATH": f"{HELPERS}:{HELPERS.parents[1]}"}
    output = run(tmp_path, "-c", program, streams="both", environment=environment)
    reason = next(line for line in output.splitlines() if line.startswith("reason ")).removeprefix("reason ")
    assert output.count(f"Converged: {reason}.") == 1
    assert output.count("Converged") == 1


def saving(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_stops_at_the_same_step(tmp_path):
    """From before, within and after the patience, and without another step if the run had converged."""

    def go(ckpt_path=None):
        converged, module = Converged(**CHANGE), Regression()
        callbacks = [converged, saving(tmp_path)]
        options = {"steps": 200, "ckpt_path": ckpt_path, "enable_checkpointing": True}
        fitter = fit(tmp_path, module, None, callbacks=callbacks, **options)
        return fitter.global_step, converged.reason, [p.detach().clone() for p in module.parameters()]

    end, reason, params = go()
    for step in (end - 20, end - 3, end - 1, end):
        again = go(tmp_path / f"step={step}.ckpt")
        assert again[:2] == (end, reason)
        assert all(map(torch.equal, again[2], params))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_evaluation_with_checkpoint_keeps_reason(tmp_path):
    class Tested(Regression):
        def test_step(self, batch, batch_idx):
            pass

    converged, module = Converged(**CHANGE), Tested()
    fitter = fit(tmp_path, module, None, steps=200, callbacks=[converged, saving(tmp_path)], enable_checkpointing=True)
    reason = converged.reason
    fitter.test(module, DataLoader(TensorDataset(*DATA)), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    assert converged.reason == reason
    second = fit(tmp_path, Regression(), None, steps=200, callbacks=[converged])  # starts afresh
    assert (second.global_step, converged.reason) == (fitter.global_step, reason)
    fit(tmp_path, Regression(), None, steps=3, callbacks=[converged])
    assert converged.reason is None


def test_replaced_optimizer_is_followed(tmp_path):
    """Also by one without step sizes, although tolerance_step is set."""

    class Replacing(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step in makers:
                before.append(trainer.optimizers[0])
                trainer.optimizers = [makers[trainer.global_step](pl_module.parameters())]

    makers = {
        3: lambda params: torch.optim.SGD(params, lr=0.0),
        5: lambda params: Rprop(params, lr=0, step_sizes=(0, 1)),
    }
    before, converged = [], Converged(None, None, tolerance_step=1e-3, patience=2)
    fitter = fit(tmp_path, Regression(), None, steps=20, callbacks=[converged, Replacing()])
    assert fitter.global_step == 7
    assert len(before) == 2
    for optimizer in (*before, *fitter.optimizers):
        assert not optimizer._optimizer_step_post_hooks
        assert "_is_done" not in vars(optimizer)


class Skipping(Regression):
    """Has an infinite gradient, but a finite loss, in the first steps in float16."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).float()


def test_steps_skipped_by_scaler_do_not_count(tmp_path):
    """The loss stays the same during them; afterwards the unscaled gradients count."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    losses, converged = Losses(), Converged(0.0, None, patience=3)

    class Count(pl.Callback):
        steps = 0

        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(self.add)

        def add(self, *args):
            self.steps += 1

    count = Count()
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    make = lambda params: torch.optim.SGD(params, lr=1e-30)  # noqa: E731
    fitter = fit(tmp_path, Skipping(make), None, steps=60, callbacks=[losses, converged, count], plugins=plugins)
    skipped = fitter.global_step - count.steps
    assert skipped > 5
    assert len({*losses.losses}) == 1
    assert fitter.global_step == skipped + 4  # the first one has no loss before it

    largest = max(p.grad.abs().max().item() for p in fitter.lightning_module.parameters())
    for tolerance, stops in ((largest * 1.01, True), (largest * 0.99, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        converged = Converged(None, tolerance, patience=1)
        assert fit(tmp_path, Skipping(make), None, steps=5, callbacks=[converged], plugins=plugins).global_step == (
            1 if stops else 5
        )


@pytest.mark.parametrize("hook", [None, "on_train_start", "on_before_optimizer_step", "on_train_end"])
def test_fit_leaves_nothing_behind(hook, tmp_path):
    class Failing(Regression):
        pass

    def fail(*args):
        raise ArithmeticError

    if hook is not None:
        setattr(Failing, hook, fail)
    converged, module = Converged(), Failing()
    fitter = trainer(tmp_path, [converged, FullBatch()])
    try:
        fitter.fit(module, FullBatchLoader(DATA))
    except ArithmeticError:
        assert hook is not None
    optimizer = fitter.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert "_is_done" not in vars(optimizer)
    watched = [weakref.ref(each) for each in (module, optimizer, *module.parameters())]
    del fitter, module, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copy_during_a_fit_takes_no_part(duplicate, tmp_path):
    copies = []

    class Copying(pl.Callback):
        def on_before_optimizer_step(self, trainer, *args):
            copies.append(duplicate(converged))

    converged = Converged(**CHANGE)
    fitter = fit(tmp_path, Regression(), None, steps=200, callbacks=[converged, Copying()])
    assert len(pickle.dumps(copies[-1])) < 1500
    assert copies[-1].state_dict()["step"] == fitter.global_step - 1
    assert fit(tmp_path, Regression(), None, steps=200, callbacks=[copies[-1]]).global_step == fitter.global_step
    assert copies[-1].reason == converged.reason


@pytest.mark.parametrize(
    ("module", "options", "arguments", "message"),
    [
        (lambda: Net(lambda m: Rprop(m.parameters()), manual=True), {}, {}, "automatic_optimization=False. Use .*Conv"),
        (lambda: Net(lambda m: None), {}, {}, "one optimizer, but the Trainer has 0. Return one from"),
        (
            lambda: Net(lambda m: Rprop(m.parameters())),
            {"accumulate_grad_batches": 2},
            {},
            "is 2. Leave it at 1, and use",
        ),
        (
            lambda: Net(lambda m: torch.optim.Adam(m.parameters())),
            {},
            {"tolerance_step": 0.1},
            "tolerance_step=0.1 needs the step sizes of Rprop, but the optimizer is Adam. Set it to None",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_unsuitable_setup_raises_clear_error(module, options, arguments, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, [Converged(**arguments)], **options).fit(module(), Batches(2))


def test_second_optimizer_raises_clear_error(tmp_path):
    class Adding(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.optimizers = trainer.optimizers * 2

    with pytest.raises(MisconfigurationException, match="Converged needs one optimizer, but the Trainer has 2"):
        trainer(tmp_path, [Converged(), Adding()]).fit(Net(lambda m: Rprop(m.parameters())), Batches(2))


def test_invalid_arguments_raise_clear_errors():
    for value, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="every_n_steps must be an integer >= 1, got"):
            Converged(every_n_steps=value)
    with pytest.raises(ValueError, match="patience must be"):
        Converged(patience=0)
    with pytest.raises(ValueError, match="are all None"):
        Converged(None, None)
    assert vars(Converged()._criteria) == pytest.approx(vars(Convergence()), nan_ok=True)
