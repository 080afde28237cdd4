"""BestWeights: state that continues exactly, and bad input that changes nothing."""

import math

import pytest
import torch
from best_walks import BEST, LOSSES, copies, move, network, walk
from cases import through_file
from lit import all_equal
from torch import nn

from lightning_rprop import BestWeights


@pytest.mark.parametrize("cut", range(len(LOSSES) + 1))
def test_state_continues_exactly(cut, place):
    net, other = network(), network()
    whole, first, second = BestWeights(net), BestWeights(net), BestWeights(other)
    tensors, others = [*net.parameters(), *net.buffers()], [*other.parameters(), *other.buffers()]
    for loss in LOSSES[:cut]:
        whole.update(torch.tensor(loss))
        first.update(torch.tensor(loss))
        move(tensors)
    second.load_state_dict(through_file(first.state_dict()))
    other.load_state_dict(net.state_dict())
    for loss in LOSSES[cut:]:
        whole.update(torch.tensor(loss))
        second.update(torch.tensor(loss))
        move(tensors + others)
    whole.restore()
    second.restore()
    assert (second.loss, second.step) == (whole.loss, whole.step) == (-1.0, BEST)
    assert all_equal(tensors, others)


def test_state_dict_is_a_copy():
    params = [torch.zeros(2)]
    best = BestWeights(params)
    best.update(1.0)
    state = best.state_dict()
    move(params)
    best.update(0.0)
    assert state["tensors"][0].tolist() == [0.0, 0.0]
    other = BestWeights([torch.zeros(2)])
    other.load_state_dict(state)
    state["tensors"][0].fill_(9)
    assert other.state_dict()["tensors"][0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (torch.zeros(2), TypeError, "an iterable of tensors or parameter groups, got Tensor"),
        (3, TypeError, "an iterable of tensors or parameter groups, got int. Pass the model"),
        ({torch.zeros(1)}, TypeError, "parameter groups, got set"),
        (dict(nn.Linear(1, 1).named_parameters()), TypeError, "parameter groups, got dict"),
        ([1.0], TypeError, r"or parameter groups, got 1.0 \(float\)"),
        ([{"lr": 1}], TypeError, r"got {'lr': 1} \(dict\)"),
        ([{"params": [None]}], TypeError, r"got None \(NoneType\). Pass list\(model.parameters\(\)\)"),
        ([], ValueError, r"no parameters in \[\]. Pass a module"),
        (nn.Tanh(), ValueError, r"no parameters in Tanh\(\)"),
    ],
)
def test_bad_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        BestWeights(params)


@pytest.mark.parametrize("loss", [torch.zeros(2, 1), torch.zeros(0), [1.0], "1", None, 1j, torch.tensor(1j)])
def test_bad_losses_are_refused(loss):
    params = [torch.zeros(2)]
    best = BestWeights(params)
    best.update(1.0)
    state = str(best.state_dict())
    move(params)
    with pytest.raises(ValueError, match="loss must be a number, a tensor of one element, or"):
        best.update(loss)
    assert str(best.state_dict()) == state


@pytest.mark.parametrize("losses", [[], [math.nan, math.inf]])
def test_restore_needs_a_finite_loss(losses, place):
    params = [torch.zeros(2)]
    best = BestWeights(params)
    walk(best, params, losses)
    before = copies(params)
    assert (best.loss, best.step) == (math.inf, None)
    with pytest.raises(RuntimeError, match=r"no update had a finite loss. Call update\(loss\) in the training loop"):
        best.restore()
    assert all_equal(params, before)


def test_loading_checks_before_it_changes():
    best = BestWeights([torch.zeros(2), torch.zeros(1)])
    best.update(1.0)
    before = str(best.state_dict())
    for others, message in (
        ([torch.ones(2)], "the state has 1 tensors, but the model has 2"),
        ([torch.ones(2), torch.ones(2)], r"tensor 1 is torch.float32 of shape \(2,\) in the state, but .* \(1,\)"),
        ([torch.ones(2), torch.ones(1).double()], r"tensor 1 is torch.float64 of shape \(1,\) in the state"),
    ):
        other = BestWeights(others)
        other.update(0.5)
        with pytest.raises(ValueError, match=message):
            best.load_state_dict(other.state_dict())
        assert str(best.state_dict()) == before
