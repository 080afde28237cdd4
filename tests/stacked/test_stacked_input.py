"""Stacked names what it cannot run, and what to do, before anything changes."""

import random

import pytest
import torch
from torch import nn

from lightning_rprop import Stacked

X = torch.randn(7, 3)


class Layer(nn.Module):
    """A linear layer with a buffer, followed by a function of itself and the output."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.function = function

    def forward(self, x):
        return self.function(self, self.linear(x))


def in_place(layer, y):
    layer.mean.mul_(0.5).add_(y.detach().mean(0))
    return y


def assigned(layer, y):
    layer.mean = y.detach().mean(0)
    return y


def added_to_zeros(layer, y):
    z = torch.zeros(7, 5)
    z += y
    return z


REFUSED = {
    in_place: (r"'0' \(Layer\): its forward changes the buffer 'mean'.*Return the new value from forward",),
    assigned: (r"'0' \(Layer\): its forward changes the buffer 'mean'.*Return the new value from forward",),
    added_to_zeros: (r"'0' \(Layer\).*Replace the operation by one that torch.vmap supports",),
    lambda layer, y: y if y.sum() > 0 else -y: (r"'0' \(Layer\).*Use torch.where in place of if",),
    lambda layer, y: y * y.sum().item(): (r"'0' \(Layer\).*Keep the value a tensor",),
    lambda layer, y: y[y > 0]: (r"'0' \(Layer\).*Replace the operation",),
    lambda layer, y: (y, 3): (r"module Sequential.*Return a tensor, or a tuple, list or dict of tensors",),
    lambda layer, y: y.detach().requires_grad_(): (r"'0' \(Layer\).*torch.func.grad",),
}


@pytest.mark.parametrize("function", REFUSED)
def test_refused_module_is_named(function):
    stacked = Stacked(lambda: nn.Sequential(Layer(function)), 3)
    with pytest.raises(RuntimeError, match=REFUSED[function][0]):
        stacked(X)
    with pytest.raises(RuntimeError, match=REFUSED[function][0]):
        stacked.forward_each(X.expand(3, -1, -1))
    assert (stacked.get_buffer("0.mean") == 0).all()


@pytest.mark.parametrize("options", [{}, {"momentum": None}])
def test_batch_norm_in_training_is_refused(options):
    stacked = Stacked(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, **options)), 3)
    with pytest.raises(RuntimeError, match=r"'1' \(BatchNorm1d\).*Use GroupNorm.*track_running_stats=False, or eval"):
        stacked(X)
    assert all((buffer == buffer.flatten()[0]).all() for buffer in stacked.buffers())
    assert stacked.eval()(X).shape == (3, 7, 5)


def test_dropout_needs_randomness():
    with pytest.raises(RuntimeError, match=r"'1' \(Dropout\).*randomness='different'"):
        Stacked(lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout()), 3)(X)


def test_errors_of_the_inputs_stay_as_they_are():
    stacked = Stacked(lambda: nn.Linear(3, 5), 4)
    for inputs, error in ((torch.ones(7, 2), "mat1 and mat2"), (torch.ones(7, 3, dtype=torch.float64), "dtype")):
        with pytest.raises(RuntimeError, match=error) as caught:
            stacked(inputs)
        assert "Stacked" not in str(caught.value)
    with pytest.raises(ValueError, match=r"shape \(7, 3\), but its first dimension must be the number of members, 4"):
        stacked.forward_each(X)
    with pytest.raises(ValueError, match=r"got a tensor of shape \(\)"):
        stacked.forward_each(torch.tensor(1.0))


def test_missing_memory_is_not_blamed_on_the_module():
    def once(layer, y, calls=[]):  # noqa: B006 - counts the calls
        calls.append(y)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return y

    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory$"):
        Stacked(lambda: Layer(once), 2)(X)


def test_missing_members_are_an_index_error():
    stacked = Stacked(lambda: nn.Linear(3, 5), 4)
    for i in (4, -5):
        with pytest.raises(IndexError, match=f"member {i} does not exist: there are 4 members, 0 to 3"):
            stacked.member(i)
    with pytest.raises(TypeError):
        stacked.member(1.5)


def different(**attributes):
    """Return a function whose modules differ in an attribute."""
    values = {name: iter(values) for name, values in attributes.items()}

    def make():
        module = nn.Linear(3, 1)
        for name, each in values.items():
            setattr(module, name, next(each))
        return module

    return make


def from_list(*modules):
    return iter(modules).__next__


def frozen(module):
    return module.requires_grad_(False)


LAYER = nn.Linear(3, 1)
DIFFERENT = [
    (from_list(nn.Linear(3, 1), nn.Linear(4, 1)), r"weight is \(\(1, 4\),.* in member 1, but \(\(1, 3\),"),
    (from_list(nn.Linear(3, 1), nn.Linear(3, 1, bias=False)), "bias is None in member 1"),
    (from_list(nn.Linear(3, 1), nn.Linear(3, 1).double()), "weight is .*float64"),
    (from_list(nn.Linear(3, 1), frozen(nn.Linear(3, 1))), "weight is .*False"),
    (from_list(*(nn.Sequential(nn.Linear(3, 1), f()) for f in (nn.Tanh, nn.ReLU))), "module '1' is 'ReLU' in member 1"),
    (from_list(*(nn.Sequential(nn.Dropout(p), nn.Linear(3, 1)) for p in (0.5, 0.1))), "0.p is 0.1 in member 1"),
    (different(omega=[1.0, 2.0]), "omega is 2.0 in member 1, but 1.0 in member 0"),
    (different(omega=[torch.zeros(2), torch.ones(2)]), r"omega is a tensor of shape \(2,\)"),
    (different(omega=[[torch.zeros(2)], [torch.ones(2)]]), "omega"),
    (different(omega=[torch.zeros(2), torch.zeros(2, dtype=torch.int64)]), "omega"),
    (different(omega=[torch.zeros(2), torch.zeros(1)]), "omega"),
    (different(omega=[[1], [1, 2]]), r"omega is \[1, 2\] in member 1"),
    (different(omega=[{"a": 1}, {"a": 1, "b": 2}]), "omega"),
    (different(omega=[{"a": 1}, {"a": 2}]), "omega is {'a': 2} in member 1"),
    (different(omega=[torch.zeros(2).numpy(), torch.ones(2).numpy()]), "omega"),
    (from_list(LAYER, LAYER), "a module of member 0 again for member 1"),
    (from_list(nn.Sequential(LAYER), nn.Sequential(LAYER)), "a module of member 0 again for member 1"),
]


@pytest.mark.parametrize(("make", "error"), DIFFERENT)
def test_different_members_are_refused(make, error):
    with pytest.raises(ValueError, match=error):
        Stacked(make, 2)


def test_equal_attributes_are_allowed():
    values = [float("nan"), torch.zeros(2), [1, "a", None], (torch.float32,), random.random, {"a": torch.ones(1)}]
    values.append(torch.ones(2, device="meta"))
    for value in values:
        assert len(Stacked(different(omega=[value, value]), 2)) == 2


def with_list():
    module = nn.Linear(3, 1)
    module.tensors = {"all": [module.weight]}
    return module


def test_bad_arguments_are_named():
    def make():
        return nn.Linear(3, 1)

    for arguments, error, text in [
        ((make, 0), ValueError, "n must be an integer >= 1, got 0"),
        ((make, -2), ValueError, "n must be an integer >= 1, got -2"),
        ((make, 2.0), TypeError, r"n must be an integer >= 1, got 2.0 \(float\)"),
        ((make, True), TypeError, "n must be an integer >= 1, got True"),
        ((make, 2, "both"), ValueError, "randomness must be one of 'error', 'different', 'same', got 'both'"),
        ((make, 2, "same", 0), ValueError, "chunk_size must be an integer >= 1, got 0"),
        ((nn.Linear(3, 1), 2), TypeError, "make must be a function without arguments .*, got Linear"),
        ((3, 2), TypeError, "make must be a function without arguments .*, got int"),
        ((lambda: 3, 2), TypeError, "make must return a torch.nn.Module, got int"),
        ((nn.Tanh, 2), ValueError, "make returned a Tanh without parameters"),
        ((with_list, 2), ValueError, "attribute 'tensors' holds parameters or buffers"),
        ((lambda: nn.Sequential(nn.GRU(3, 1)), 2), ValueError, "'0._flat_weights' holds.*recurrent layers"),
        ((lambda: nn.LazyLinear(1), 2), ValueError, "'weight' is not initialized yet"),
    ]:
        with pytest.raises(error, match=text):
            Stacked(*arguments)
