"""Further cases of faults that were found once: writes during the transfer, gradients from outside, undone state."""

from collections import OrderedDict
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lit import all_equal, trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

X, Y = (t.double() for t in make_data(20))


def double(make=Rprop, kind=Regression, **options):
    return kind(make, **options).double()


def fit(folder, module, size=7, data=None, callbacks=(), epochs=4, full_batch=None, **options):
    fitter = trainer(folder, [*callbacks, full_batch or FullBatch()], max_epochs=epochs, **options)
    fitter.fit(module, FullBatchLoader((X, Y) if data is None else data, size))
    return fitter


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hook_that_writes_to_held_data_is_refused(hook, size, tmp_path):
    class Halving(Regression):
        pass

    def halve(self, batch, dataloader_idx):
        batch[0].mul_(0.5)
        return batch

    setattr(Halving, hook, halve)
    with pytest.raises(RuntimeError, match=r"written to in place during a step.*x = x.clone\(\)"):
        fit(tmp_path, double(kind=Halving), size, (X.clone(), Y))


@pytest.mark.parametrize("how", ["copy_", "data", "set_"])
def test_new_memory_of_points_is_seen(how, tmp_path):
    points, other = X.clone(), X + 1

    class Move(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                if how == "data":
                    points.data = other
                else:
                    getattr(points, how)(other)

    seen = []

    class See(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0][0, 0].item())
            return super().training_step(batch, batch_idx)

    fit(tmp_path, double(kind=See), 20, (points, Y), [Move()])
    assert seen == [X[0, 0].item()] * 2 + [other[0, 0].item()] * 2


def test_points_move_under_a_transfer_hook_for_all_micro_batches(tmp_path):
    points = torch.zeros_like(X)
    seen = []

    class Transferring(Regression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 0, batch[1]]

        def training_step(self, batch, batch_idx):
            seen.append(batch[0].sum().item() / batch[0].numel())
            return super().training_step(batch, batch_idx)

    class Move(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            points.fill_(trainer.global_step)

    fit(tmp_path, double(kind=Transferring), 7, (points, Y), [Move()], epochs=2)
    assert seen == [0, 0, 0, 1, 1, 1]


def test_gradients_from_outside_are_not_scaled(tmp_path):
    class Penalized(Regression):
        def on_before_backward(self, loss):
            self.net[0].weight.square().sum().backward()

    class Keeping(Regression):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            if batch_idx % 2 == 0:
                optimizer.zero_grad()

    for kind in (Penalized, Keeping):
        ends = []
        for size in (None, 7):
            module = double(sgd, kind)
            loader = FullBatchLoader((X, Y), size, steps_per_epoch=4)
            trainer(tmp_path, [FullBatch()], max_epochs=1).fit(module, loader)
            ends.append(list(module.parameters()))
        for p, q in zip(*ends, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # float64's rounding of another order of sums


class AttributeDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


def test_attributes_of_mappings_are_cut():
    for micro_batch in FullBatchLoader(AttributeDict(x=X, y=Y), 7).micro_batches():
        assert len(micro_batch.data.x) == len(micro_batch.data["x"]) == micro_batch.size


@dataclass
class WithMask:
    x: torch.Tensor

    def __post_init__(self):
        self.mask = torch.ones(len(self.x))


def test_tensor_beside_the_fields_is_refused():
    with pytest.raises(TypeError, match=r"data.mask is a tensor but not a field of WithMask: make it a field"):
        FullBatchLoader(WithMask(X), 7)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ([{"x": x} for x in X], "Give torch.utils.data.default_collate(data) for samples"),
        ([X[:3], X[:4], X[:4]], "Give a DataLoader with a collate_fn for samples"),
        ([WithMask(x) for x in X], "Give a DataLoader with a collate_fn for samples"),
    ],
)
def test_remedy_for_a_list_fits_its_samples(data, remedy):
    with pytest.raises((ValueError, TypeError)) as error:
        FullBatchLoader(data)
    assert remedy in str(error.value) or "but not a field of" in str(error.value)
    if "default_collate" in remedy:
        FullBatchLoader(default_collate(data), 7)


def test_dataset_with_names_needs_a_data_loader(tmp_path):
    class Named(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return X[i], Y[i], f"sample {i}"

    with pytest.raises(TypeError, match=r"data\[2\]\[0\] must be a tensor, got str.*give a DataLoader"):
        FullBatchLoader(Named())

    class OfNamed(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    module = double(kind=OfNamed)
    fit(tmp_path, module, None, DataLoader(Named(), batch_size=7))
    assert torch.equal(torch.cat(module.targets[:3]), Y.flatten())


def test_persistent_workers_of_a_loader_that_was_looked_at():
    source = DataLoader(TensorDataset(X, Y), batch_size=5, num_workers=1, persistent_workers=True)
    next(iter(source))
    for rank in range(2):
        loader = FullBatchLoader(source)
        loader.share(rank, 2, torch.device("cpu"))
        counted = [m.data[1] for m in loader.micro_batches() if m.size]
        assert torch.equal(torch.cat(counted), torch.cat([Y[i : i + 5] for i in range(5 * rank, 20, 10)]))
        loader._release()


def test_time_axis_of_a_stream_is_not_taken_for_samples(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    def time_first(samples):
        x, y = zip(*samples, strict=True)
        return torch.stack(x).expand(5, -1, -1), torch.stack(y).expand(5, -1, -1)

    class TimeFirst(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0][0], batch[1][0]), batch_idx)

    source = DataLoader(Stream(), batch_size=7, collate_fn=time_first)
    with pytest.raises(ValueError, match="cannot be counted"):
        fit(tmp_path, double(kind=TimeFirst), None, source)
    fit(tmp_path, double(kind=TimeFirst), None, source, full_batch=FullBatch(weight=lambda b: b[0].shape[1]))


def test_float8_data_are_streamed(tmp_path):
    x = X.to(torch.float8_e4m3fn)

    class OfFloat8(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].double(), batch[1]), batch_idx)

    class Batches:
        def __iter__(self):
            return iter([(x, Y)])

    fit(tmp_path, double(kind=OfFloat8), None, Batches())


def test_weight_that_overflows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="weight must return a finite number"):
        fit(tmp_path, double(), full_batch=FullBatch(weight=lambda batch: 10**400))


def test_metric_objects_leave_out_what_weighs_nothing(tmp_path):
    y = torch.where(torch.arange(20).unsqueeze(1) < 13, Y, torch.nan)

    class Measured(Regression):
        def __init__(self, make):
            super().__init__(make)
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.error(self.net(x), y)
            self.log("error", self.error, on_step=True, on_epoch=True)
            return (self.net(x) - y).square().nanmean()

    module = Measured(lambda params: Rprop(params, lr=0.0, step_sizes=(0, 1))).double()
    weighed = FullBatch(weight=lambda batch: batch[1].isfinite().sum())
    metrics = fit(tmp_path, module, 7, (X, y), full_batch=weighed, epochs=2).callback_metrics
    expected = (module.net(X[:13]) - Y[:13]).square().mean().item()
    assert metrics["error_epoch"].item() == pytest.approx(expected, rel=1e-6)
    assert metrics["error_step"].item() == pytest.approx(expected, rel=1e-6)


def test_plugin_whose_hooks_would_be_passed_over_is_refused(tmp_path):
    class Scaling(Precision):
        def pre_backward(self, tensor, module):
            return super().pre_backward(tensor, module) * 1024

    with pytest.raises(MisconfigurationException, match=r"and so not .*Scaling.pre_backward: override backward\(\)"):
        fit(tmp_path, double(), plugins=[Scaling()])


@pytest.mark.parametrize("limits", [{"limit_train_batches": 2}, {"overfit_batches": 2}, {"limit_train_batches": 0.5}])
def test_take_over_with_limits_is_refused(limits, tmp_path):
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    with pytest.raises(MisconfigurationException, match="overfit_batches or limit_train_batches ask for some of them"):
        trainer(tmp_path, [FullBatch(take_over=True)], max_epochs=1, **limits).fit(double(), loader)
    fitter = trainer(tmp_path, [FullBatch(take_over=True)], fast_dev_run=True)
    fitter.fit(double(), loader)
    assert fitter.global_step == 1


@pytest.mark.parametrize("name", ["loss_step", "loss_epoch", "late"])
def test_log_as_that_hides_another_name_is_an_error(name, tmp_path):
    class Late(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                self.log("late", 1.0)
            return super().training_step(batch, batch_idx)

    module = double(kind=Late, on_step=True, on_epoch=True)
    with pytest.raises(MisconfigurationException, match="by a name that the module logs too"):
        fit(tmp_path, module, full_batch=FullBatch(log_as=name))


def test_hooks_of_a_base_class_of_the_same_name_run(tmp_path):
    class LightningModule(Regression):
        calls = 0

        def on_after_backward(self):
            LightningModule.calls += 1

    class Derived(LightningModule):
        pass

    fit(tmp_path, double(kind=Derived))
    assert LightningModule.calls == 4


@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_buffer_that_cannot_be_written_to_does_not_stop_the_undo(kind, tmp_path):
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise ArithmeticError("the user's own")
            return super().training_step(batch, batch_idx)

    module = double(kind=Module)
    with torch.inference_mode(kind == "inference"):
        module.register_buffer("fixed", torch.ones(1).expand(3) if kind == "expanded" else torch.ones(3))
    full_batch = FullBatch()
    with pytest.raises(ArithmeticError, match="the user's own"):
        fit(tmp_path, module, full_batch=full_batch)
    assert full_batch._fit is None


def test_state_beside_parameters_is_undone(tmp_path):
    class Counting(Rprop):
        def step(self, closure=None):
            result = super().step(closure)
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
            self.state["calls"] = self.state.get("calls", 0) + 1
            return result

    class Behind(Regression):
        def __init__(self, make):
            super().__init__(make)
            self.target = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

        def on_train_start(self):
            self.later = torch.nn.BatchNorm1d(5).double()

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
                raise ArithmeticError("behind the move")

    module = double(Counting, Behind)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module, None)
    optimizer = module.optimizers().optimizer
    assert (optimizer.param_groups[0]["k"], optimizer.state["calls"]) == (2, 2)
    assert (module.target.item(), module.later.num_batches_tracked.item()) == (2, 2)


def test_step_that_was_called_off_is_not_undone_later(tmp_path):
    class CallsOff(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 else None

        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.net[0].bias.fill_(3)
                raise ArithmeticError("at the end")

    module = double(kind=CallsOff)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module)
    assert (module.net[0].bias == 3).all()


def test_first_counted_micro_batch_calls_the_hook(tmp_path):
    losses = []

    class Seeing(Regression):
        def on_before_backward(self, loss):
            losses.append(loss.item())

    y = torch.where(torch.arange(20).unsqueeze(1) < 7, torch.nan, Y)
    full_batch = FullBatch(weight=lambda batch: batch[1].isfinite().sum())
    fit(tmp_path, double(kind=Seeing), 7, (X, y), full_batch=full_batch, epochs=1)
    assert len(losses) == 1


def test_order_of_keys_does_not_change_the_fingerprint():
    first, second = OrderedDict(x=X, y=Y), OrderedDict(y=Y, x=X)
    assert FullBatchLoader(first)._fingerprint() == FullBatchLoader(second)._fingerprint()
    assert FullBatchLoader({"x": X, "y": Y})._fingerprint() == FullBatchLoader({"y": Y, "x": X})._fingerprint()
    assert not all_equal([X], [Y[:, :1].expand_as(X)])
