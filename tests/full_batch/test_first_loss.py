"""A loss that is not finite at the first evaluation is an error that names the reason."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from domain import ONES, Domain, is_solved
from fitting import Reiterable, Stream, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from whole_set import Regression, make_data, network

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

START = "at the first evaluation, before any move that could be undone; "
X, Y = make_data(20)
MAKES = {
    "Rprop": Rprop,
    "True": lambda params: Rprop(params, retreat=True),
    "torch": torch.optim.Rprop,
    "Adam": torch.optim.Adam,
    "LBFGS": torch.optim.LBFGS,
}


class Sample:
    """A batch object that moves as a whole."""

    def __init__(self, x, y):
        self.x, self.y, self.num_graphs = x, y, len(x)

    def to(self, *args, **kwargs):
        return self


class Objects(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


class Named(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["{y}"]), batch_idx)


def spoiled(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def message(loss, reason):
    return re.escape(f"The loss is {loss} {START}{reason}.")


@pytest.mark.parametrize("make", MAKES)
def test_error_names_the_parameter(make, tmp_path):
    def module():
        return Regression(MAKES[make], net=network(nn.BatchNorm1d(8)))

    bad = module()
    bad.net[1].weight.data[3:] = torch.inf
    bad.net[3].bias.data[0] = torch.nan
    reason = "parameter 'net.1.weight' has 5 of 8 entries that are NaN or infinite, the first at (3,). "
    start = [param.detach().clone() for param in bad.parameters()]
    with pytest.raises(RuntimeError, match=message("nan", f"{reason}Give it finite values")):
        fit(tmp_path, bad, None, (X, Y))
    for param, before in zip(bad.parameters(), start, strict=True):
        assert torch.equal(param.nan_to_num(), before.nan_to_num())
    fit(tmp_path, module(), None, (X, Y))


# the module, the data made from inputs and targets, the micro-batch size, and the words for sample 12
INPUTS = {
    "tuple": (Regression, lambda x, y: (x, y), 7, "batch[1] of micro-batch 1 has 1 of 7", 6),
    "dict": (Named, lambda x, y: {"x": x, "{y}": y}, 7, "batch['{y}'] of micro-batch 1 has 1 of 7", 6),
    "objects": (
        Objects,
        lambda x, y: Reiterable(*map(Sample, x.split(5), y.split(5))),
        None,
        "batch.y of micro-batch 2 has 1 of 5",
        2,
    ),
    "stream": (Regression, Stream, 7, "batch[1] of micro-batch 1 has 1 of 7", 5),
    "DataLoader": (
        Regression,
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
        None,
        "batch[1] of micro-batch 1 has 1 of 7",
        5,
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_error_names_the_input(kind, tmp_path):
    module, data, size, words, i = INPUTS[kind]
    with pytest.raises(RuntimeError, match=message("inf", words)[:-2]) as error:
        fit(tmp_path, module(), size, data(X, spoiled(Y, 12, -torch.inf)))
    remedy = f"entries that are NaN or infinite, the first at ({i}, 0). Correct these samples, or remove them."
    assert str(error.value).endswith(remedy)
    keep = torch.arange(20) != 12
    fit(tmp_path, module(), size, data(X[keep][:15], Y[keep][:15]))


def test_error_names_the_scale_of_inputs(tmp_path):
    reason = (
        "no parameter or input is NaN or infinite. Start from other parameters, or scale inputs and targets, so that "
        "the loss is finite there"
    )
    with pytest.raises(RuntimeError, match=message("inf", reason)):
        fit(tmp_path, Regression(), None, (X, 1e30 * Y))
    fit(tmp_path, Regression(), None, (X, Y))
    module = Domain()
    module.w.data[1] = -1
    with pytest.raises(RuntimeError, match=message("nan", reason)):
        fit(tmp_path, module, None, ONES)


def test_masks_are_not_named(tmp_path):
    class Module(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((3,), -math.inf))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scale", torch.tensor([1.0, torch.nan]))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.scale.sum()

    with pytest.raises(
        RuntimeError, match=message("nan", "buffer 'scale' has 1 of 2 entries that are NaN or infinite, ")[:-2]
    ):
        fit(tmp_path, Module(), 7, (X, Y))


def test_data_that_end_are_no_other_error(tmp_path):
    class Once:
        def __init__(self):
            self.batches = iter([(X, spoiled(Y, 3, torch.nan))])

        def __iter__(self):
            return self.batches

    with pytest.raises(RuntimeError, match=r"The loss is nan at the first evaluation.*no parameter or input"):
        fit(tmp_path, Regression(), None, Once())


def test_ignored_micro_batch_is_not_named(tmp_path):
    x, y = X, torch.where(torch.arange(20).unsqueeze(1) < 10, torch.nan, Y)
    full_batch = FullBatch(weight=lambda batch: batch[1].isfinite().all() * len(batch[1]))
    fit(tmp_path, Regression(), 5, (x, y), full_batch=full_batch)
    reason = r"nan at the first.*batch\[0\] of micro-batch 3 has 1 of 25 entries"
    with pytest.raises(RuntimeError, match=reason):
        fit(tmp_path, Regression(), 5, (spoiled(x, (17, 2), torch.nan), y), full_batch=full_batch)


def test_retreat_false_is_not_checked(tmp_path):
    module = Regression(lambda params: Rprop(params, retreat=False))
    fit(tmp_path, module, 7, (X, spoiled(Y, 3, torch.nan)))

    def make(params):
        first, *others = params
        return Rprop([{"params": [first], "retreat": True}, {"params": others}], retreat=False)

    mixed = Regression(make)
    with pytest.raises(RuntimeError, match="at the first evaluation"):
        fit(tmp_path, mixed, 7, (X, spoiled(Y, 3, torch.nan)))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("retreat", [None, False])
def test_resumed_run_retreats_at_once(retreat, tmp_path):
    """Its optimizer has a move to take back."""

    def make(params):
        return Rprop(params, lr=2.0, retreat=retreat)

    def retreats():
        return pytest.warns(UserWarning, match="nan at step 1, so Rprop took back")

    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Domain(make)
    with retreats() if retreat is None else nullcontext():
        fit(tmp_path, whole, None, ONES, 50, [save], enable_checkpointing=True)
    resumed = Domain(make)
    with retreats() if retreat is None else nullcontext():
        fit(tmp_path, resumed, None, ONES, 50, ckpt_path=tmp_path / "step=1.ckpt")
    assert torch.equal(resumed.w.nan_to_num(), whole.w.nan_to_num())
    assert is_solved(resumed) == (retreat is None)


def test_loader_is_free_after_the_error(tmp_path):
    loader = FullBatchLoader((X, spoiled(Y, 3, torch.nan)), 7)
    fitter, module = trainer(tmp_path, [FullBatch()], max_epochs=3), Regression()
    with pytest.raises(RuntimeError, match="at the first evaluation"):
        fitter.fit(module, loader)
    fitter.fit(module, FullBatchLoader((X, Y), 7))
    assert fitter.global_step == 3
