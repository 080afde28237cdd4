"""FullBatch warns once if the result depends on the micro-batches or on chance."""

import re

import pytest
import torch
from fitting import DATA, fit
from torch import nn
from whole_set import Regression, network


class Noisy(Regression):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0 * torch.randn_like(x), y), batch_idx)


class Shuffling:
    """An iterable of one batch, in another order at each pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([[t.roll(self.passes, 0) for t in DATA]])


@pytest.mark.parametrize(
    ("make", "data", "size", "message"),
    [
        (lambda: Regression(net=network(nn.BatchNorm1d(8))), DATA, 10, "net.1 normalizes by the statistics of a mi"),
        (lambda: Regression(net=network(nn.BatchNorm1d(8))), DATA, None, None),
        (lambda: Regression(net=network(nn.BatchNorm1d(8).eval())), DATA, 10, None),
        (lambda: Regression(net=network(nn.Dropout(0.1))), DATA, None, "net.1 drops at random.*Set p=0"),
        (lambda: Regression(net=network(nn.Dropout(0.0))), DATA, None, None),
        (Noisy, DATA, 10, "training_step draws random numbers.*Draw them once"),
        (Regression, Shuffling(), None, "not the same at the second step.*fixed order"),
        (Regression, DATA, 10, None),
    ],
)
def test_warning_comes_once_with_a_remedy(make, data, size, message, tmp_path, recwarn):
    module = make()
    modes = [m.training for m in module.modules()]
    fit(tmp_path, module, size, steps=5, data=data)
    assert [m.training for m in module.modules()] == modes
    found = [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    found = [text for text in found if "Found 1 module" not in text]  # Lightning, about modules in eval mode
    if message is None:
        assert not found
    else:
        (warning,) = found
        assert re.search(message, warning)


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_warns_with_micro_batches(make, tmp_path):
    with pytest.warns(UserWarning, match="estimate of the spectral norm at each micro-batch.*eval mode"):
        fit(tmp_path, Regression(net=network(make(nn.Linear(8, 8)))), 7)
    fit(tmp_path, Regression(net=network(make(nn.Linear(8, 8)))), None)
    fit(tmp_path, Regression(net=network(make(nn.Linear(8, 8)).eval())), 7)


def clamp(param):
    param.grad.clamp_(-0.1, 0.1)


@pytest.mark.parametrize(
    "register",
    [
        lambda param: param.register_hook(lambda grad: grad.clamp(-0.1, 0.1)),
        lambda param: param.register_post_accumulate_grad_hook(clamp),
    ],
)
def test_param_hook_warns_with_micro_batches(register, tmp_path):
    def make():
        module = Regression()
        register(module.net[0].weight)
        return module

    with pytest.warns(UserWarning, match=r"net.0.weight has a hook on its gradient.*Do that in on_after_backward"):
        fit(tmp_path, make(), 7)
    fit(tmp_path, make(), None)
