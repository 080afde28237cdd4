"""State, checkpoints and pickles: ours and torch's continue each other to the last bit."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from cases import assert_same, parameters, proceed, run

from lightning_rprop import Rprop

CLASSES = pytest.mark.parametrize(
    ("first", "second"),
    [(Rprop, Rprop), (torch.optim.Rprop, Rprop), (Rprop, torch.optim.Rprop)],
    ids=["ours-ours", "torch-ours", "ours-torch"],
)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@CLASSES
@pytest.mark.filterwarnings("ignore:The loaded state replaced options")  # test_loading.py
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("saved_at", [0, 1, 7])
def test_checkpoint_continues_bit_for_bit(first, second, dtype, saved_at):
    begun = run(first, parameters(dtype), saved_at, lr=0.1, maximize=True)
    state = through_file(begun.optimizer.state_dict())
    params = [p.detach().clone().requires_grad_() for p in begun.params]
    resumed = SimpleNamespace(params=params, optimizer=second(params))
    resumed.optimizer.load_state_dict(state)
    assert_same(proceed(resumed, 20, seed=2), proceed(begun, 20, seed=2))
    assert resumed.optimizer.param_groups[0]["lr"] == 0.1
    assert resumed.optimizer.param_groups[0]["maximize"] is True


def test_state_is_torchs():
    ours, theirs = (run(c, parameters(torch.float32), 3) for c in (Rprop, torch.optim.Rprop))
    a, b = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert a["state"].keys() == b["state"].keys()
    assert list(a["state"][0]) == list(b["state"][0]) == ["step", "prev", "step_size"]
    assert a["state"][0]["step"].dtype == b["state"][0]["step"].dtype
    assert {k: v for k, v in a["param_groups"][0].items() if k in b["param_groups"][0]} == b["param_groups"][0]


def test_state_follows_the_parameters_memory_format():
    p = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizer = Rprop([p])
    p.grad = torch.randn(2, 3, 4, 5)
    optimizer.step()
    assert optimizer.state[p]["prev"].stride() == optimizer.state[p]["step_size"].stride() == p.stride()


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_counter_has_the_default_dtype_as_in_torch(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for cls in (Rprop, torch.optim.Rprop):
            one = run(cls, parameters(torch.float16)[:1], 1)
            assert one.optimizer.state[one.params[0]]["step"].dtype == default
    finally:
        torch.set_default_dtype(before)


def test_torch_checkpoint_keeps_what_it_does_not_say():
    state = run(torch.optim.Rprop, parameters(torch.float32), 1).optimizer.state_dict()
    optimizer = Rprop(parameters(torch.float32), weight_decay=0.25)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert optimizer.param_groups[0]["variant"] == "irprop-"


def test_loaded_state_is_a_copy():
    begun = run(Rprop, parameters(torch.float32), 3)
    state = begun.optimizer.state_dict()
    before = copy.deepcopy(state)
    params = parameters(torch.float32)
    resumed = SimpleNamespace(params=params, optimizer=Rprop(params))
    resumed.optimizer.load_state_dict(state)
    proceed(resumed, 3, seed=2)
    for index, values in before["state"].items():
        assert all(torch.equal(values[key], state["state"][index][key]) for key in values)


def test_entries_that_are_no_parameters_survive():
    optimizer = run(Rprop, parameters(torch.float32), 1).optimizer
    optimizer.state["test"] = 1
    state = through_file(optimizer.state_dict())
    assert state["state"]["test"] == 1
    fresh = Rprop(parameters(torch.float32))
    fresh.load_state_dict(state)
    assert fresh.state["test"] == 1
    assert copy.deepcopy(fresh).state["test"] == 1


def untouched(optimizer):
    return pickle.dumps((optimizer.param_groups, [optimizer.state.get(p) for p in optimizer.param_groups[0]["params"]]))


@pytest.mark.parametrize("named", [False, True], ids=["index", "name"])
@pytest.mark.parametrize(
    "shapes", [((5, 3), (3, 5)), ((3,), (1,)), ((1,), ()), ((1, 3), (3,)), ((2, 1), (2, 2)), ((0,), (1,))], ids=str
)
def test_wrong_shape_is_refused_at_load_time(shapes, named):
    saved_shape, shape = shapes
    saved = run(Rprop, [torch.randn(2, requires_grad=True), torch.randn(saved_shape, requires_grad=True)], 2)
    params = [torch.randn(2, requires_grad=True), torch.randn(shape, requires_grad=True)]
    resumed = run(Rprop, params, 0)
    if named:
        resumed.optimizer = Rprop(list(zip(("a", "net.0.weight"), params, strict=True)))
    proceed(resumed, 1, seed=3)
    before = untouched(resumed.optimizer)
    name = "'net.0.weight'" if named else "parameter 1"
    with pytest.raises(ValueError, match=f"The state of {name} does not fit: its prev is .* saved from the same model"):
        resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert untouched(resumed.optimizer) == before


def test_real_state_for_a_complex_parameter_is_refused():
    saved = run(Rprop, [torch.randn(3, requires_grad=True)], 2).optimizer.state_dict()
    with pytest.raises(ValueError, match="The state of parameter 0 does not fit"):
        Rprop([torch.randn(3, dtype=torch.complex64, requires_grad=True)]).load_state_dict(saved)


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD], ids=lambda c: c.__name__)
def test_another_optimizers_checkpoint_is_refused(other):
    saved = run(other, parameters(torch.float32), 2).optimizer.state_dict()
    optimizer = run(Rprop, parameters(torch.float32), 1).optimizer
    before = untouched(optimizer)
    with pytest.raises(ValueError, match=r"group 0 of the state has no etas, step_sizes\. Load a state saved by Rprop"):
        optimizer.load_state_dict(saved)
    assert untouched(optimizer) == before


def test_incomplete_state_is_refused():
    saved = run(Rprop, parameters(torch.float32), 2).optimizer.state_dict()
    del saved["state"][3]["prev"]
    with pytest.raises(ValueError, match="The state of parameter 3 has no prev, only step, step_size"):
        Rprop(parameters(torch.float32)).load_state_dict(saved)


def test_bad_options_in_a_checkpoint_are_refused():
    saved = run(Rprop, parameters(torch.float32), 2).optimizer.state_dict()
    saved["param_groups"][0]["etas"] = (1.2, 0.5)
    with pytest.raises(ValueError, match=r"Invalid eta values: 1\.2, 0\.5"):
        Rprop(parameters(torch.float32)).load_state_dict(saved)


def test_old_checkpoint_with_a_plain_number_as_step():
    saved = run(torch.optim.Rprop, parameters(torch.float32), 3).optimizer.state_dict()
    for values in saved["state"].values():
        values["step"] = 3
    for option in ("foreach", "maximize", "differentiable", "capturable"):
        del saved["param_groups"][0][option]
    params = parameters(torch.float32)
    optimizer = Rprop(params)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["step"], torch.tensor(3.0))
    assert optimizer.param_groups[0]["foreach"] is None


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_duplicate_continues_bit_for_bit(duplicate):
    begun = run(Rprop, parameters(torch.float32), 5, lr=0.3)
    twin = duplicate(begun)
    assert twin.optimizer.param_groups[0]["params"][0] is twin.params[0]
    assert_same(proceed(begun, 10, seed=2), proceed(twin, 10, seed=2))


def test_old_pickle_without_the_later_options():
    begun = run(Rprop, parameters(torch.float32), 5)
    state = begun.optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for option in set(options) - {"params", "lr", "etas", "step_sizes"}:
            del options[option]
    for p in begun.params:
        state["state"][p]["step"] = 5.0
    old = Rprop.__new__(Rprop)
    old.__setstate__(state)
    fresh = run(Rprop, parameters(torch.float32), 5)
    begun.optimizer = old
    assert_same(proceed(begun, 5, seed=2), proceed(fresh, 5, seed=2))


def test_dtype_change_under_live_state_equals_torch():
    runs = []
    for cls in (Rprop, torch.optim.Rprop):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 3)
        one = run(cls, list(net.parameters()), 3)
        net.bfloat16()
        proceed(one, 3, seed=2)
        net.double()
        runs.append(proceed(one, 3, seed=3))
    assert_same(*runs)
    p = runs[0].params[0]
    assert runs[0].optimizer.state[p]["prev"].dtype == torch.float32


def test_dtype_change_under_live_state_takes_foreach_too():
    runs = []
    for foreach in (False, True):
        net = torch.nn.Linear(4, 3)
        torch.nn.init.ones_(net.weight)
        torch.nn.init.ones_(net.bias)
        one = run(Rprop, list(net.parameters()), 3, foreach=foreach)
        net.bfloat16()
        runs.append(proceed(one, 5, seed=2))
    assert_same(*runs)
