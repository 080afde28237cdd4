"""FullBatch in one process: gradients, losses, logs, hooks, counts, resuming, breaking off, warnings and errors."""

import copy
import os
import random
import re
import signal
import threading
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lit import all_equal, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, exact, make_data, relative_error

from lightning_rprop import FullBatch, FullBatchLoader, Rprop, StepSizeMonitor
from lightning_rprop.full_batch._atomic_step import Interrupts

N = 103
DATA = make_data(N)


# what Lightning says to those who save on an exception, and to those who resume without the callback that saved
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(folder, module, micro_batch_size=8, steps=3, callbacks=(), per_epoch=4, data=DATA, full_batch=None, **options):
    fitter = trainer(
        folder, [*callbacks, full_batch or FullBatch()], **{"max_epochs": -1, "max_steps": steps, **options}
    )
    fitter.fit(module, FullBatchLoader(data, micro_batch_size, steps_per_epoch=per_epoch))
    return fitter


def by_hand(make, evaluations, net=None, data=DATA):
    """The loop that one writes without Lightning; returns the parameters and the losses that step returned."""
    module = Regression(make, net=net)
    optimizer = module.configure_optimizers()
    x, y = data

    def closure():
        optimizer.zero_grad()
        loss = (module.net(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(evaluations)]
    return list(module.parameters()), losses


class Losses(pl.Callback):
    """Keeps what other callbacks see."""

    def __init__(self):
        self.losses, self.gradients, self.calls = [], [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.calls.append("backward")
        self.before = loss.item()

    def on_after_backward(self, trainer, pl_module):
        self.calls.append("after")
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.calls.append("zero_grad")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.calls.append("end")
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [None, 1, 8, 50, 102, 103, 1000])
def test_gradient_of_any_cut_is_that_of_all_samples(size, reduction, tmp_path):
    module = Regression(reduction=reduction)
    loss, gradient = exact(module.net, DATA)
    seen = Losses()
    fit(tmp_path, module, size, callbacks=[seen], full_batch=FullBatch(reduction))
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32's rounding
    assert all(all_equal(a, b) for a, b in zip(seen.gradients, module.gradients, strict=True))
    assert seen.losses[0] == pytest.approx(loss, rel=1e-6)  # the same


def test_a_single_batch_equals_the_loop_by_hand_to_the_last_bit(tmp_path):
    module, seen = Regression(), Losses()
    fit(tmp_path, module, None, steps=200, callbacks=[seen])
    parameters, losses = by_hand(lambda params: Rprop(params), 200)
    assert all_equal(module.parameters(), parameters)
    assert seen.losses == losses


@pytest.mark.parametrize("size", [8, 50])
def test_long_runs_come_as_far_as_the_loop_by_hand(size, tmp_path):
    module, seen = Regression(), Losses()
    fit(tmp_path, module, size, steps=300, callbacks=[seen])
    _, losses = by_hand(lambda params: Rprop(params), 300)
    # equal signs make equal weights; where a gradient is down at its rounding, the runs may part
    assert seen.losses[:50] == pytest.approx(losses[:50], rel=1e-5)
    assert seen.losses[-1] == pytest.approx(losses[-1], rel=0.05)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("size", [None, 10])
def test_lbfgs_evaluates_the_full_batch_each_time(line_search, size, tmp_path):
    def lbfgs(params):
        return torch.optim.LBFGS(params, lr=0.5, max_iter=10, line_search_fn=line_search)

    double = make_data(N)[0].double(), make_data(N)[1].double()
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    module, seen = Regression(lbfgs, net=copy.deepcopy(net)), Losses()
    fit(tmp_path, module, size, steps=3, callbacks=[seen], data=double)
    parameters, losses = by_hand(lbfgs, 3, net=net, data=double)
    if size is None:
        assert seen.losses == losses
        assert all_equal(module.parameters(), parameters)
    else:  # float64's rounding, which LBFGS amplifies
        assert seen.losses == pytest.approx(losses, rel=1e-8)


@pytest.mark.parametrize("variant", ["irprop-", "irprop+"])
def test_max_iter_moves_as_often_and_needs_no_more_batches(variant, tmp_path):
    often, once = (Regression(lambda p, k=k: Rprop(p, variant=variant, max_iter=k)) for k in (5, 1))
    seen = Losses()
    assert fit(tmp_path, often, 50, steps=4, callbacks=[seen]).global_step == 4
    fit(tmp_path, once, 50, steps=20)
    assert all_equal(often.parameters(), once.parameters())
    assert len(often.targets) == 4 * 5 * 3
    assert seen.calls == (["zero_grad", "backward", "after"] * 5 + ["end"]) * 4  # as in Lightning without us


def test_an_optimizer_whose_step_calls_its_parents(tmp_path):
    class Talking(Rprop):
        def step(self, closure=None):
            def told():
                self.told = closure()
                return self.told

            super().step(told)
            return super().step(closure)

    module, once = (
        Regression(lambda p: Talking(p, variant="irprop+")),
        Regression(lambda p: Rprop(p, variant="irprop+")),
    )
    fit(tmp_path, module, 10, steps=4)
    fit(tmp_path, once, 10, steps=8)
    assert all_equal(module.parameters(), once.parameters())


def test_irprop_plus_gets_the_loss_of_all_samples(tmp_path):
    plus = lambda params: Rprop(params, lr=0.5, variant="irprop+")  # noqa: E731
    module = Regression(plus)
    fit(tmp_path, module, 7, steps=40)
    parameters, losses = by_hand(plus, 40)
    assert any(b > a for a, b in pairwise(losses))  # so that the loss matters
    assert all_equal(module.parameters(), parameters)


def test_weights_other_than_samples(tmp_path):
    mask = (torch.rand(N, generator=torch.Generator().manual_seed(3)) < 0.4).float().unsqueeze(1)

    class Masked(Regression):
        def training_step(self, batch, batch_idx):
            x, y, mask = batch
            return ((self.net(x) - y).square() * mask).sum() / mask.sum()

    chosen = mask.flatten() > 0
    loss, gradient = exact(Masked().net, [t[chosen] for t in DATA])
    for weight in (lambda batch: batch[2].sum(dim=0), lambda batch: int(batch[2].sum())):
        module, seen = Masked(), Losses()
        fit(tmp_path, module, 20, data=(*DATA, mask), callbacks=[seen], full_batch=FullBatch(weight=weight))
        assert all(relative_error(g, gradient) < 1e-6 for g in module.gradients[:1])  # float32's rounding
        assert seen.losses[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}]
)
def test_clipping_sees_the_gradient_of_all_samples(clip, tmp_path):
    class Clipped(Regression):
        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            self.clipped.append([p.grad.clone() for p in self.parameters()])
            self.log("clipped", self.clipped[0][0].norm())

    for evaluations in (1, 3):  # which move next to nothing
        module = Clipped(lambda p, n=evaluations: Rprop(p, lr=1e-30, step_sizes=(1e-30, 1e-30), max_iter=n))
        module.clipped = []
        _, gradient = exact(module.net, DATA)
        fit(tmp_path, module, 10, steps=1, **clip)
        expected = [nn.Parameter(g) for g in gradient]
        for p, g in zip(expected, gradient, strict=True):
            p.grad = g.clone()
        if "gradient_clip_algorithm" in clip:
            nn.utils.clip_grad_value_(expected, 1e-3)
        else:
            nn.utils.clip_grad_norm_(expected, 0.1)
        assert len(module.clipped) == evaluations
        for clipped in module.clipped:
            assert relative_error(clipped, [p.grad for p in expected]) < 1e-6  # float32's rounding


@pytest.mark.parametrize(("data", "size"), [(DATA, 10), (DataLoader(TensorDataset(*DATA), batch_size=10), None)])
def test_64_true_converts_every_micro_batch(data, size, tmp_path):
    module = Regression()
    _, gradient = exact(module.net, DATA)
    fit(tmp_path, module, size, data=data, precision="64-true")
    assert relative_error(module.gradients[0], gradient) < 1e-14  # float64's rounding


def test_bf16_mixed(tmp_path):
    # bfloat16 rounds each sample's share at 2^-9, however they are cut
    gradients = []
    for size in (None, 10):
        module = Regression()
        fit(tmp_path, module, size, precision="bf16-mixed")
        gradients.append(module.gradients[0])
    assert relative_error(gradients[1], [g.double() for g in gradients[0]]) < 4e-3


@pytest.mark.parametrize("variant", ["irprop-", "irprop+"])
def test_fp16_with_a_gradient_scaler(variant, tmp_path):
    module, seen = Regression(lambda p: Rprop(p, variant=variant)), Losses()
    loss, gradient = exact(module.net, DATA)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fit(tmp_path, module, 10, steps=20, callbacks=[seen], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert relative_error(module.gradients[0], gradient) < 2e-3  # float16's rounding of each sample's share
    assert seen.losses[0] == pytest.approx(loss, rel=2e-3)
    assert seen.losses[-1] < 0.9 * loss
    if variant == "irprop+":
        state = next(iter(state_of(module)))
        assert state["prev_loss"].item() == pytest.approx(seen.losses[-1], rel=1e-6)


def state_of(module):
    return module.optimizers().optimizer.state.values()


def test_an_overflowing_scaler_loses_no_step_of_memory(tmp_path):
    module = Regression(lambda p: Rprop(p, variant="irprop+"))
    start = copy.deepcopy(list(module.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    fit(tmp_path, module, 10, steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert all_equal(module.parameters(), start)  # infinite gradients: the scaler skips the step
    module = Regression(lambda p: Rprop(p, variant="irprop+"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    fit(tmp_path, module, 10, steps=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert [state["step"].item() for state in state_of(module)] == [2.0] * 4


@pytest.mark.parametrize(
    ("source", "size"),
    [
        (lambda: DataLoader(TensorDataset(*DATA), batch_size=20), None),
        (lambda: DataLoader(TensorDataset(*DATA), batch_size=20, num_workers=1, persistent_workers=True), None),
        (lambda: DataLoader(TensorDataset(*DATA), batch_size=None, sampler=[range(50), range(50, N)]), None),
        (lambda: Stream(), 20),
        (lambda: DataLoader(Stream(), batch_size=20), None),
        (lambda: [DATA][0], 20),
        (lambda: list(DATA), 20),
        (lambda: TensorDataset(*DATA), 20),
        (lambda: PairDataset(), 20),
    ],
    ids=[
        "DataLoader",
        "workers",
        "batches",
        "stream",
        "DataLoader of a stream",
        "tuple",
        "list",
        "dataset",
        "map-style",
    ],
)
def test_sources(source, size, tmp_path):
    module = Regression()
    _, gradient = exact(module.net, DATA)
    fit(tmp_path, module, size, data=source(), steps=4)
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32's rounding
    assert torch.equal(torch.cat(module.targets), DATA[1].flatten().repeat(4))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(*DATA, strict=True))


class PairDataset(torch.utils.data.Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return DATA[0][i], DATA[1][i]


def test_dicts_and_nested_batches(tmp_path):
    class Nested(Regression):
        def training_step(self, batch):  # without batch_idx
            x = batch.pop("inputs")["x"]  # what is done to the dict stays in this step
            (y, weights) = batch["rest"]
            return ((self.net(x) - y).square() * weights).mean()

    module = Nested()
    _, gradient = exact(module.net, DATA)
    data = {"inputs": {"x": DATA[0]}, "rest": [DATA[1], torch.ones(N, 1)]}
    fit(tmp_path, module, 10, data=data, steps=3)
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32's rounding


def test_inputs_may_be_differentiated(tmp_path):
    class Derivative(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

        def training_step(self, batch, batch_idx):
            x = batch.requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return (slope - x.detach().cos()).square().mean()

        def configure_optimizers(self):
            return Rprop(self.parameters(), max_iter=2)

    for size in (None, 7):
        x = torch.linspace(0, 1, 20).unsqueeze(1)
        fit(tmp_path, Derivative(), size, data=x)
        assert not x.requires_grad
        assert x.grad is None


def test_transfer_hooks_run_for_every_micro_batch(tmp_path):
    class Transferring(Regression):
        calls = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.calls += ("before",)
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls += ("after",)
            return [batch[0] + 1, batch[1]]

    module = Transferring()
    _, gradient = exact(module.net, (DATA[0] + 1, DATA[1]))
    fit(tmp_path, module, 50, steps=2)
    assert module.calls == ("before", "after") * 6
    assert relative_error(module.gradients[0], gradient) < 1e-6  # float32's rounding


@pytest.mark.parametrize("size", [None, 10])
def test_self_log_weighs_by_samples(size, tmp_path):
    module, seen = Regression(on_step=True, on_epoch=True), Losses()
    logger = CSVLogger(tmp_path, name="", version="log")
    log = {"logger": logger, "log_every_n_steps": 1}
    fit(tmp_path, module, size, steps=6, callbacks=[seen], per_epoch=3, full_batch=FullBatch(log_as="full"), **log)
    rows = [line.split(",") for line in (tmp_path / "log" / "metrics.csv").read_text().splitlines()]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    for key in ("loss_step", "full"):
        assert [float(row[key]) for row in table if row[key]] == pytest.approx(seen.losses, rel=1e-6)
    epochs = [sum(seen.losses[i : i + 3]) / 3 for i in (0, 3)]
    assert [float(row["loss_epoch"]) for row in table if row["loss_epoch"]] == pytest.approx(epochs, rel=1e-6)
    assert [int(row["step"]) for row in table if row["full"]] == list(range(6))


@pytest.mark.parametrize("size", [None, 10])
def test_what_is_logged_now_and_then_stays_in_between(size, tmp_path):
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                self.log("even", float(batch_idx))
            return super().training_step(batch, batch_idx)

    log = {"logger": CSVLogger(tmp_path, name="", version="log"), "log_every_n_steps": 1}
    fit(tmp_path, Logs(), size, steps=4, **log)
    assert [row.split(",")[1] for row in (tmp_path / "log" / "metrics.csv").read_text().split()[1:]] == ["0.0"] * 2 + [
        "2.0"
    ] * 2


@pytest.mark.parametrize("reduce", ["min", "max", "sum"])
def test_self_log_of_other_reductions_runs_over_all_micro_batches(reduce, tmp_path):
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            self.log("target", getattr(batch[1], reduce)(), reduce_fx=reduce, on_step=True)
            return super().training_step(batch, batch_idx)

    metrics = fit(tmp_path, Logs(), 10, steps=2).callback_metrics
    assert metrics["target"].item() == pytest.approx(
        getattr(DATA[1], reduce)().item(), rel=1e-5
    )  # another order of sums


def test_logs_of_other_hooks_do_not_reset_those_of_the_first_micro_batch(tmp_path):
    class Logs(Regression):
        def on_before_zero_grad(self, optimizer):
            self.log("zeroed", 1.0)

    seen = Losses()
    metrics = fit(
        tmp_path, Logs(on_step=False, on_epoch=True), 10, steps=1, callbacks=[seen], per_epoch=1
    ).callback_metrics
    assert metrics["loss"].item() == pytest.approx(seen.losses[0], rel=1e-6)


def test_steps_are_what_lightning_counts(tmp_path):
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
    assert module.validated_at == (4, 8, 12)  # and stopped at the third that is not better
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == [
        "step=12.ckpt",
        "step=3.ckpt",
        "step=6.ckpt",
        "step=9.ckpt",
    ]
    assert len(module.gradients) == 12

    fitter = trainer(tmp_path, [FullBatch()], max_epochs=2, limit_train_batches=3)
    fitter.fit(Regression(), FullBatchLoader(DATA, 10, steps_per_epoch=8))
    assert fitter.global_step == 6


def test_the_progress_bar_counts_steps_and_shows_the_loss(tmp_path, capsys):
    full_batch = FullBatch(log_as="full", prog_bar=True)
    fit(tmp_path, Regression(), 10, steps=4, full_batch=full_batch, enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "4/4" in shown
    assert re.search(r"full[:=] ?1\.", shown)


def test_monitor_and_reloaded_data_loaders(tmp_path):
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


@pytest.mark.parametrize("make", [lambda p: Rprop(p, variant="irprop+"), lambda p: Rprop(p, max_iter=3)])
def test_resuming_at_any_step_equals_the_whole_run(make, tmp_path):
    every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = Regression(make)
    fit(tmp_path, whole, 10, steps=10, callbacks=[every], enable_checkpointing=True)
    for step in range(1, 10):
        resumed = Regression(make)
        fitter = trainer(tmp_path, [FullBatch()], max_epochs=-1, max_steps=10)
        loader = FullBatchLoader(DATA, 10, steps_per_epoch=4)
        fitter.fit(resumed, loader, ckpt_path=tmp_path / f"step={step}.ckpt")
        evaluations = fitter.optimizers[0].param_groups[0]["max_iter"]
        assert len(resumed.gradients) == (10 - step) * evaluations
        assert all_equal(whole.parameters(), resumed.parameters())


class Broken(Regression):
    """Breaks off at one call of training_step."""

    def __init__(self, make, break_at, net=None):
        super().__init__(make, net=net)
        self.break_at = break_at

    def training_step(self, batch, batch_idx):
        if len(self.targets) == self.break_at:
            raise ArithmeticError("broken off")
        return super().training_step(batch, batch_idx)


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.filterwarnings("ignore:net.1 normalizes by the statistics of a micro-batch")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: Rprop(p),
        lambda p: Rprop(p, variant="irprop+", max_iter=3),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
    ids=["Rprop", "max_iter", "LBFGS"],
)
def test_an_exception_in_a_step_saves_no_half_of_it(make, tmp_path):
    whole = Regression(make, net=normalized())
    fit(tmp_path, whole, 26, steps=5)
    calls = len(whole.targets)
    for at in range(1, calls, 5):
        broken = Broken(make, at, normalized())
        saves = [OnExceptionCheckpoint(tmp_path, f"broken{at}")]
        with pytest.raises(ArithmeticError, match="broken off"):
            fit(tmp_path, broken, 26, steps=5, callbacks=saves, enable_checkpointing=True)
        resumed = Regression(make, net=normalized())
        fitter = trainer(tmp_path, [FullBatch()], max_epochs=-1, max_steps=5)
        loader = FullBatchLoader(DATA, 26, steps_per_epoch=4)
        fitter.fit(resumed, loader, ckpt_path=tmp_path / f"broken{at}.ckpt")
        saved, expected = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(saved[key], expected[key]) for key in expected), at


@pytest.mark.parametrize("max_iter", [1, 3])
def test_an_exception_after_a_step_leaves_it_made(max_iter, tmp_path):
    class Scheduled(Regression):
        breaks = False

        def lr_scheduler_step(self, scheduler, metric):  # the step is made and counted, the batch is not at its end
            if self.breaks and self.trainer.global_step == 3:
                raise ArithmeticError("broken off")

        def configure_optimizers(self):
            optimizer = Rprop(self.parameters(), max_iter=max_iter)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    whole, broken, resumed = Scheduled(), Scheduled(), Scheduled()
    fit(tmp_path, whole, 26, steps=5)
    broken.breaks = True
    saves = [OnExceptionCheckpoint(tmp_path, "broken")]
    with pytest.raises(ArithmeticError, match="broken off"):
        fit(tmp_path, broken, 26, steps=5, callbacks=saves, enable_checkpointing=True)
    fitter = trainer(tmp_path, [FullBatch()], max_epochs=-1, max_steps=5)
    fitter.fit(resumed, FullBatchLoader(DATA, 26, steps_per_epoch=4), ckpt_path=tmp_path / "broken.ckpt")
    assert len(resumed.gradients) == 2 * max_iter
    assert all_equal(whole.parameters(), resumed.parameters())


@pytest.mark.parametrize("plugins", [[], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]])
def test_ctrl_c_while_weights_move_waits_for_the_end_of_the_step(plugins, tmp_path):
    class Interrupted(Rprop):
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)
            return result

    handler = signal.getsignal(signal.SIGINT)
    saves = [OnExceptionCheckpoint(tmp_path, "broken")]
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(tmp_path, Regression(Interrupted), 26, callbacks=saves, enable_checkpointing=True, plugins=plugins)
    finally:
        signal.signal(signal.SIGINT, handler)
    saved = torch.load(tmp_path / "broken.ckpt")
    assert saved["global_step"] == 1
    assert {state["step"].item() for state in saved["optimizer_states"][0]["state"].values()} == {1.0}


# Python reports an interrupt that comes in a callback of its garbage collector, as Hypothesis has one, and drops it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("max_iter", [1, 10])
def test_ctrl_c_at_any_moment_saves_no_half_step(max_iter, tmp_path):
    make = lambda p: Rprop(p, max_iter=max_iter)  # noqa: E731
    steps = 240 // max_iter
    whole = Regression(make)
    fit(tmp_path, whole, 50, steps=steps, per_epoch=37)
    moments = random.Random(0)
    interrupted = 0
    for attempt in range(8):
        path = tmp_path / f"broken{attempt}.ckpt"
        saves = [OnExceptionCheckpoint(tmp_path, path.stem)]
        timer = threading.Timer(moments.uniform(0.05, 0.5), os.kill, (os.getpid(), signal.SIGINT))
        handler = signal.getsignal(signal.SIGINT)
        try:
            timer.start()
            fit(tmp_path, Regression(make), 50, steps=steps, per_epoch=37, callbacks=saves, enable_checkpointing=True)
            timer.join()  # it may come too late
        except (SystemExit, KeyboardInterrupt):
            interrupted += 1
        finally:
            timer.cancel()
            signal.signal(signal.SIGINT, handler)
        if path.exists():
            resumed = Regression(make)
            fitter = trainer(tmp_path, [FullBatch()], max_epochs=-1, max_steps=steps)
            loader = FullBatchLoader(DATA, 50, steps_per_epoch=37)
            fitter.fit(resumed, loader, ckpt_path=path)
            assert all_equal(whole.parameters(), resumed.parameters())
    assert interrupted >= 4


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


class Reiterable:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


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
        (Regression, FullBatchLoader(Reiterable()), {}, RuntimeError, "gave this rank no batch"),
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
def test_errors_name_the_remedy_before_anything_moves(module, loader, options, error, message, tmp_path):
    module = module()
    start = copy.deepcopy(list(module.parameters()))
    with pytest.raises(error, match=message):
        trainer(tmp_path, **{"callbacks": [FullBatch()], **options}).fit(module, loader or FullBatchLoader(DATA, 10))
    assert all_equal(module.parameters(), start)
    # nothing is left behind that would keep a right run from working
    module = Regression()
    fit(tmp_path, module, 10)
    assert len(module.gradients) == 3


def test_afterwards_loader_and_optimizer_are_as_they_were(tmp_path):
    module, source = (
        Regression(),
        DataLoader(TensorDataset(*DATA), batch_size=20, num_workers=1, persistent_workers=True),
    )
    loader = FullBatchLoader(source)
    fitter = trainer(tmp_path, [FullBatch()])
    fitter.fit(module, loader)
    assert source._iterator is None  # as after a fit of Lightning's alone
    with pytest.raises(RuntimeError, match="gives only the first of them"):
        next(iter(loader))
    own = torch.tensor(3.0)
    assert fitter.optimizers[0].step(lambda: own) is own


def test_a_loader_for_two_purposes_is_refused(tmp_path):
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
def test_arguments_of_the_callback(arguments, message):
    with pytest.raises(ValueError, match=message):
        FullBatch(**arguments)


def layers(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *more, nn.Linear(8, 1))


class Noisy(Regression):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0 * torch.randn_like(x), y), batch_idx)


class Shuffling:
    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([[t.roll(self.passes, 0) for t in DATA]])


@pytest.mark.parametrize(
    ("make", "data", "size", "message"),
    [
        (
            lambda: Regression(net=layers(nn.BatchNorm1d(8))),
            DATA,
            10,
            "net.1 normalizes by the statistics of a micro-b",
        ),
        (lambda: Regression(net=layers(nn.BatchNorm1d(8))), DATA, None, None),
        (lambda: Regression(net=layers(nn.BatchNorm1d(8).eval())), DATA, 10, None),
        (lambda: Regression(net=layers(nn.Dropout(0.1))), DATA, None, "net.1 drops at random.*Set p=0"),
        (lambda: Regression(net=layers(nn.Dropout(0.0))), DATA, None, None),
        (Noisy, DATA, 10, "training_step draws random numbers.*Draw them once"),
        (Regression, Shuffling(), None, "not the same at the second step.*fixed order"),
        (Regression, DATA, 10, None),
    ],
)
def test_warnings_come_once_with_a_remedy(make, data, size, message, tmp_path, recwarn):
    module = make()
    modes = [m.training for m in module.modules()]
    fit(tmp_path, module, size, steps=5, data=data)
    assert [m.training for m in module.modules()] == modes
    found = [
        str(w.message)
        for w in recwarn
        if issubclass(w.category, UserWarning) and "Found 1 module" not in str(w.message)
    ]
    if message is None:
        assert not found
    else:
        (only,) = found
        assert pytest.raises(AssertionError, match=message), only


def test_a_second_ctrl_c_goes_through_while_weights_move():
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.release()
    interrupts.release()
