"""Held points may be changed between two steps, but not during one."""

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from lit import all_equal, trainer
from torch import nn
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

X, Y = make_data(20)
WRITTEN = r"written to in place during a step.*x = x.clone\(\)"


def points(k):
    """Return the k-th random set of points."""
    return torch.rand(20, 1, generator=torch.Generator().manual_seed(k))


class Pinn(pl.LightningModule):
    """Fits a slope, which needs the gradient of the inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch, batch_idx):
        x = batch.requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return (slope - x.detach().cos()).square().mean()

    def configure_optimizers(self):
        return Rprop(self.parameters(), max_iter=2)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_may_move_between_steps(hook, size, dtype, tmp_path):
    data = points(0).to(dtype)  # float32 points are copied to the precision of the module

    class Move(pl.Callback):
        pass

    def move(self, trainer, *args):
        data.copy_(points(trainer.global_step))

    setattr(Move, hook, move)
    module = Pinn()
    fitter = trainer(tmp_path, [FullBatch(), Move()], max_epochs=5, precision="64-true")
    fitter.fit(module, FullBatchLoader(data, size))
    expected = Pinn()
    optimizer = expected.configure_optimizers()
    for step in range(5):
        x = points(step).to(dtype).double()

        def closure(x=x):
            optimizer.zero_grad()
            loss = expected.training_step(x.clone(), 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert all_equal(module.parameters(), expected.parameters())


@pytest.mark.parametrize("size", [None, 20, 7])
@pytest.mark.parametrize("at", ["first", "last"])
def test_points_written_in_a_step_are_refused(size, at, tmp_path):
    class Moving(Regression):
        def training_step(self, batch, batch_idx):
            if at == "first" or len(self.targets) == (2 if size == 7 else 0):
                batch[0].mul_(1)
            return super().training_step(batch, batch_idx)

    module = Moving()
    start = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match=WRITTEN):
        fit(tmp_path, module, size, (X.clone(), Y))
    assert all_equal(module.parameters(), start)


class OfThree(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def test_inference_tensors_may_be_held(tmp_path):
    with torch.inference_mode():
        x = X * 1
    assert fit(tmp_path, OfThree(), None, (X, Y, x), steps=5).global_step == 5


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_writing_transfer_hook_is_refused(hook, size, tmp_path):
    class Halving(Regression):
        pass

    def halve(self, batch, dataloader_idx):
        batch[0].mul_(0.5)
        return batch

    setattr(Halving, hook, halve)
    with pytest.raises(RuntimeError, match=WRITTEN):
        fit(tmp_path, Halving(), size, (X.clone(), Y))


@pytest.mark.parametrize("how", ["copy_", "data", "set_"])
def test_reassigned_points_are_seen(how, tmp_path):
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

    fit(tmp_path, See(), 20, (points, Y), steps=4, callbacks=[Move()], per_epoch=1)
    assert seen == [X[0, 0].item()] * 2 + [other[0, 0].item()] * 2


def test_moved_points_pass_the_transfer_hook(tmp_path):
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

    fit(tmp_path, Transferring(), 7, (points, Y), steps=2, callbacks=[Move()])
    assert seen == [0, 0, 0, 1, 1, 1]


def test_inputs_may_be_differentiated(tmp_path):
    for size in (None, 7):
        x = torch.linspace(0, 1, 20).unsqueeze(1).double()
        fit(tmp_path, Pinn(), size, data=x)
        assert not x.requires_grad
        assert x.grad is None
