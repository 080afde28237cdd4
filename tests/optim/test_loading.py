"""Loading a state: errors that change nothing, warnings about replaced options, and pickles."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import parameters, train

from lightning_rprop import Rprop

# A damaged entry of the state, and a pattern of the error.
DAMAGE = {
    "prev_loss-number": ("prev_loss", 0.5, "its prev_loss is 0.5, not a tensor with one real number"),
    "prev_loss-text": ("prev_loss", "low", "its prev_loss is 'low', not a tensor with one real number"),
    "prev_loss-none": ("prev_loss", None, "its prev_loss is None, not a tensor"),
    "prev_loss-size": (
        "prev_loss",
        torch.ones(3),
        r"its prev_loss is torch.float32 \(3,\), not a tensor with one real number, or 2 of them, one for each member",
    ),
    "prev_loss-list": ("prev_loss", [0.5] * 3, r"its prev_loss is \[0.5, 0.5, 0.5\], not a tensor with one"),
    "prev_loss-texts": ("prev_loss", ["low"] * 2, r"its prev_loss is \['low', 'low'\], not a tensor with one"),
    "prev_loss-complex": (
        "prev_loss",
        torch.tensor(1j),
        r"its prev_loss is torch.complex64 \(\), not a tensor with one",
    ),
    "step-text": ("step", "3", "its step is '3', not a tensor with one real number"),
    "step-none": ("step", None, "its step is None, not a tensor"),
    "step-size": ("step", torch.ones(2), r"its step is torch.float32 \(2,\), not a tensor with one"),
    "prev-list": ("prev", [1.0, 2.0], r"its prev is \[1.0, 2.0\], but the parameter is torch.float32 \(2,\). Check"),
    "prev-complex": (
        "prev",
        torch.ones(2) * 1j,
        r"its prev is torch.complex64 \(2,\), but the parameter is torch.float32",
    ),
    "prev-int": ("prev", torch.ones(2, dtype=torch.int64), r"its prev is torch.int64 \(2,\), but the parameter is"),
    "step_size-bool": ("step_size", torch.ones(2) > 0, r"its step_size is torch.bool \(2,\), but the parameter is"),
    "step_size-number": ("step_size", 0.01, "its step_size is 0.01, but the parameter is"),
    "step_size-negative": ("step_size", torch.tensor([0.1, -0.1]), "its step_size has NaN or negative elements"),
    "step_size-nan": ("step_size", torch.tensor([0.1, torch.nan]), "its step_size has NaN or negative elements"),
}


def saved(**options):
    return train(Rprop, [torch.randn(2, requires_grad=True) for _ in range(2)], 2, **options).optimizer.state_dict()


@pytest.mark.parametrize(("key", "value", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("steps", [0, 1])
def test_damaged_state_changes_nothing(key, value, message, steps):
    state = saved()
    state["state"][1][key] = value
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = train(Rprop, params, steps).optimizer
    before = pickle.dumps((optimizer.param_groups, dict(optimizer.state)))
    with pytest.raises(ValueError, match=f"The state of parameter 1 does not fit: {message}"):
        optimizer.load_state_dict(state)
    assert pickle.dumps((optimizer.param_groups, dict(optimizer.state))) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", torch.tensor(True)),
        ("prev", torch.ones(1, 2).to_sparse()),
        ("step_size", torch.ones(1, 2).to(torch.float8_e4m3fn)),
    ],
)
def test_state_of_unusable_type_is_refused(key, value):
    net = torch.nn.Linear(2, 1)
    optimizer = Rprop(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0][key] = value
    with pytest.raises(ValueError, match=f"does not fit: its {key} is"):
        Rprop(torch.nn.Linear(2, 1).parameters()).load_state_dict(state)


def test_state_that_is_no_dict_is_refused():
    state = saved()
    state["state"][1] = [1.0]
    with pytest.raises(ValueError, match=r"The state of parameter 1 is \[1.0\], not a dict"):
        Rprop([torch.ones(2, requires_grad=True) for _ in range(2)]).load_state_dict(state)


def test_state_is_checked_after_load_hooks():
    state = saved()
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = Rprop(params)
    state["state"][0]["prev"] = torch.ones(5)
    optimizer.register_load_state_dict_pre_hook(lambda _, given: given["state"][0].update(prev=torch.ones(2)))
    optimizer.load_state_dict(state)
    assert optimizer.state[params[0]]["prev"].tolist() == [1.0, 1.0]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


# --------------------------------------------------------------------------------------- replaced options

# The value in the checkpoint, the value of the optimizer that loads it, and the text of the warning.
OTHER = {
    "variant": ("irprop-", "rprop+", "variant is 'irprop-', not 'rprop+'"),
    "lr": (0.1, 0.5, "lr is 0.1, not 0.5"),
    "etas": ((0.5, 1.2), (0.3, 1.5), "etas is (0.5, 1.2), not (0.3, 1.5)"),
    "step_sizes": ((1e-6, 50), (1e-3, 1), "step_sizes is (1e-06, 50.0), not (0.001, 1.0)"),
    "weight_decay": (0.0, 0.1, "weight_decay is 0.0, not 0.1"),
    "max_iter": (1, 5, "max_iter is 1, not 5"),
    "maximize": (True, False, "maximize is True, not False"),
}


def fresh(**options):
    return Rprop([torch.ones(2, requires_grad=True) for _ in range(2)], **options)


@pytest.mark.parametrize("name", OTHER)
def test_replaced_option_is_warned_about(name):
    in_state, own, text = OTHER[name]
    state, optimizer = saved(**{name: in_state}), fresh(**{name: own})
    asked = optimizer.param_groups[0][name]
    words = f"replaced options of this optimizer: {re.escape(text)}. To keep "
    with pytest.warns(UserWarning, match=words) as caught:
        optimizer.load_state_dict(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert optimizer.param_groups[0][name] == state["param_groups"][0][name]
    optimizer.param_groups[0][name] = asked
    assert optimizer.state_dict()["param_groups"][0][name] == asked


def test_warning_names_the_parameter_group():
    groups = [{"params": torch.ones(2, requires_grad=True), "lr": lr} for lr in (0.1, 0.2, 0.3)]
    state = Rprop(groups, variant="rprop-").state_dict()
    groups = [{"params": torch.ones(2, requires_grad=True), "lr": lr} for lr in (0.1, 0.5, 0.3)]
    with pytest.warns(UserWarning, match="optimizer: in parameter group 1 lr is 0.2, not 0.5. To") as caught:
        Rprop(groups, variant="rprop-").load_state_dict(state)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("in_state", "own"),
    [
        ({}, {}),
        ({"lr": 0.1}, {"lr": torch.tensor(0.1)}),
        ({"lr": torch.tensor(0.1)}, {"lr": 0.1}),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, {"lr": torch.tensor(0.1)}),
        ({"etas": [0.4, 1.3]}, {"etas": (0.4, 1.3)}),
        ({"foreach": True}, {"fused": False}),
        ({"lr": 1}, {"lr": 1.0}),
    ],
    ids=str,
)
def test_same_options_give_no_warning(in_state, own):
    fresh(**own).load_state_dict(saved(**in_state))


def test_torch_checkpoint_gives_no_warning():
    state = train(torch.optim.Rprop, parameters(torch.float32), 1).optimizer.state_dict()
    Rprop(parameters(torch.float32), variant="rprop+", weight_decay=0.25, max_iter=3).load_state_dict(state)


def test_scheduled_lr_gives_no_warning():
    optimizers = [fresh(lr=0.1), fresh(lr=0.1)]
    for optimizer in optimizers:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + step)
    optimizers[0].param_groups[0]["lr"] = 0.01
    optimizers[1].load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_warns(rank, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh(variant="rprop+").load_state_dict(saved())
    assert len(caught) == (rank == 0)


# ------------------------------------------------------------------------------------------------------ pickles


def test_pickle_has_public_and_loads_old_path():
    optimizer = train(Rprop, parameters(torch.float32), 2).optimizer
    assert (Rprop.__module__, Rprop.__qualname__) == ("lightning_rprop", "Rprop")
    text = pickle.dumps(optimizer, protocol=0)
    assert b"clightning_rprop\nRprop" in text
    old = pickle.loads(text.replace(b"clightning_rprop\nRprop", b"clightning_rprop.optim.rprop\nRprop"))
    assert type(old) is Rprop


def test_shared_loss_survives_only_in_copies():
    optimizer = fresh()
    assert optimizer.shared_loss is False
    optimizer.shared_loss = True
    assert copy.deepcopy(optimizer).shared_loss is pickle.loads(pickle.dumps(optimizer)).shared_loss is True
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert "shared_loss" not in state["param_groups"][0]
    other = fresh()
    other.load_state_dict(state)
    assert other.shared_loss is False
    older = Rprop.__new__(Rprop)
    older.__setstate__({key: value for key, value in optimizer.__getstate__().items() if key != "shared_loss"})
    assert older.shared_loss is False
