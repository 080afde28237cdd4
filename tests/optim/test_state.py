"""State, checkpoints and pickles: a resumed run continues bit for bit, with torch.optim.Rprop too."""

import copy
import pickle
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from cases import VARIANTS, assert_same, parameters, through_file, train, train_more
from lit import Batches, Net, all_equal, fit_in_two_parts
from tapes import OPTIONS, descend, twin_rows
from twin import ROUND

from lightning_rprop import Rprop

CLASSES = pytest.mark.parametrize(
    ("first", "second"),
    [(Rprop, Rprop), (torch.optim.Rprop, Rprop), (Rprop, torch.optim.Rprop)],
    ids=["ours-ours", "torch-ours", "ours-torch"],
)


@CLASSES
@pytest.mark.filterwarnings("ignore:The loaded state replaced options")  # test_loading.py
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("saved_at", [0, 1, 7])
def test_checkpoint_resumes_bit_for_bit(first, second, dtype, saved_at):
    begun = train(first, parameters(dtype), saved_at, lr=0.1, maximize=True)
    state = through_file(begun.optimizer.state_dict())
    params = [p.detach().clone().requires_grad_() for p in begun.params]
    resumed = SimpleNamespace(params=params, optimizer=second(params))
    resumed.optimizer.load_state_dict(state)
    assert_same(train_more(resumed, 20, seed=2), train_more(begun, 20, seed=2))
    assert resumed.optimizer.param_groups[0]["lr"] == 0.1
    assert resumed.optimizer.param_groups[0]["maximize"] is True


@pytest.mark.filterwarnings("ignore:The loaded state replaced options")  # test_loading.py
@pytest.mark.parametrize("saved_at", range(8))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_variant_resumes_from_any_step(variant, dtype, saved_at):
    """The losses differ by less than a bfloat16 ulp, so they must not be cast to the dtype of the parameter."""
    tape = [(1, 5.0), (1, 4.002), (-1, 4.001), (-1, 4.003), (1, 4.004), (1, 4.0), (-1, 3.9), (1, 4.9)]
    params = [torch.zeros((), dtype=dtype, requires_grad=True) for _ in range(2)]
    optimizer = Rprop(params, variant=variant, **OPTIONS)
    for i, (g, loss) in enumerate(tape):
        if i == saved_at:
            state = through_file(optimizer.state_dict())
            params = [p.detach().clone().requires_grad_() for p in params]
            optimizer = Rprop(params)
            optimizer.load_state_dict(state)
        for p in params:
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
    rounded = ROUND[str(dtype).removeprefix("torch.")]
    assert [p.item() for p in params] == [twin_rows(variant, tape, rounded)[-1][0]] * 2


def test_torch_loads_irprop_plus_checkpoint():
    _, ours, _, _ = descend("irprop+", 5)
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Rprop([p])
    theirs.load_state_dict(ours.state_dict())
    p.grad = torch.ones(6, dtype=torch.float64)
    theirs.step()
    assert theirs.state[p]["step"] == 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_checkpoint_resumes_exactly(variant, tmp_path):
    def make(module):
        return Rprop(module.parameters(), lr=0.1, variant=variant)

    whole, _, resumed = fit_in_two_parts(tmp_path, make, make, make, batches=5)
    assert all_equal(whole, resumed)
    raw = Net(make)
    optimizer, batch, losses = make(raw), next(iter(Batches(1))), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = raw.net(batch).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(loss=loss)
    assert any(b > a for a, b in pairwise(losses))
    assert all_equal(whole, raw.parameters())


def test_state_dict_matches_torch():
    ours, theirs = (train(c, parameters(torch.float32), 3) for c in (Rprop, torch.optim.Rprop))
    a, b = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert a["state"].keys() == b["state"].keys()
    assert list(a["state"][0]) == list(b["state"][0]) == ["step", "prev", "step_size"]
    assert a["state"][0]["step"].dtype == b["state"][0]["step"].dtype
    assert {k: v for k, v in a["param_groups"][0].items() if k in b["param_groups"][0]} == b["param_groups"][0]


def test_state_has_parameter_memory_format():
    p = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizer = Rprop([p])
    p.grad = torch.randn(2, 3, 4, 5)
    optimizer.step()
    assert optimizer.state[p]["prev"].stride() == optimizer.state[p]["step_size"].stride() == p.stride()


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_step_count_has_the_default_dtype(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for cls in (Rprop, torch.optim.Rprop):
            one = train(cls, parameters(torch.float16)[:1], 1)
            assert one.optimizer.state[one.params[0]]["step"].dtype == default
    finally:
        torch.set_default_dtype(before)


def test_torch_checkpoint_keeps_other_options():
    state = train(torch.optim.Rprop, parameters(torch.float32), 1).optimizer.state_dict()
    optimizer = Rprop(parameters(torch.float32), weight_decay=0.25)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert optimizer.param_groups[0]["variant"] == "irprop-"


def test_loaded_state_is_a_copy():
    begun = train(Rprop, parameters(torch.float32), 3)
    state = begun.optimizer.state_dict()
    before = copy.deepcopy(state)
    params = parameters(torch.float32)
    resumed = SimpleNamespace(params=params, optimizer=Rprop(params))
    resumed.optimizer.load_state_dict(state)
    train_more(resumed, 3, seed=2)
    for index, values in before["state"].items():
        assert all(torch.equal(values[key], state["state"][index][key]) for key in values)


def test_state_keeps_non_parameter_entries():
    optimizer = train(Rprop, parameters(torch.float32), 1).optimizer
    optimizer.state["test"] = 1
    state = through_file(optimizer.state_dict())
    assert state["state"]["test"] == 1
    fresh = Rprop(parameters(torch.float32))
    fresh.load_state_dict(state)
    assert fresh.state["test"] == 1
    assert copy.deepcopy(fresh).state["test"] == 1


def snapshot(optimizer):
    return pickle.dumps((optimizer.param_groups, [optimizer.state.get(p) for p in optimizer.param_groups[0]["params"]]))


@pytest.mark.parametrize("named", [False, True], ids=["index", "name"])
@pytest.mark.parametrize(
    "shapes", [((5, 3), (3, 5)), ((3,), (1,)), ((1,), ()), ((1, 3), (3,)), ((2, 1), (2, 2)), ((0,), (1,))], ids=str
)
def test_wrong_shape_is_refused_when_loaded(shapes, named):
    saved_shape, shape = shapes
    saved = train(Rprop, [torch.randn(2, requires_grad=True), torch.randn(saved_shape, requires_grad=True)], 2)
    params = [torch.randn(2, requires_grad=True), torch.randn(shape, requires_grad=True)]
    resumed = train(Rprop, params, 0)
    if named:
        resumed.optimizer = Rprop(list(zip(("a", "net.0.weight"), params, strict=True)))
    train_more(resumed, 1, seed=3)
    before = snapshot(resumed.optimizer)
    name = "'net.0.weight'" if named else "parameter 1"
    with pytest.raises(ValueError, match=f"The state of {name} does not fit: its prev is .* saved from the same model"):
        resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert snapshot(resumed.optimizer) == before


def test_real_state_of_complex_is_refused():
    saved = train(Rprop, [torch.randn(3, requires_grad=True)], 2).optimizer.state_dict()
    with pytest.raises(ValueError, match="The state of parameter 0 does not fit"):
        Rprop([torch.randn(3, dtype=torch.complex64, requires_grad=True)]).load_state_dict(saved)


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD], ids=lambda c: c.__name__)
def test_state_of_other_optimizer_is_refused(other):
    saved = train(other, parameters(torch.float32), 2).optimizer.state_dict()
    optimizer = train(Rprop, parameters(torch.float32), 1).optimizer
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"group 0 of the state has no etas, step_sizes\. Load a state saved by Rprop"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_incomplete_state_is_refused():
    saved = train(Rprop, parameters(torch.float32), 2).optimizer.state_dict()
    del saved["state"][3]["prev"]
    with pytest.raises(ValueError, match="The state of parameter 3 has no prev, only step, step_size"):
        Rprop(parameters(torch.float32)).load_state_dict(saved)


def test_invalid_saved_options_are_refused():
    saved = train(Rprop, parameters(torch.float32), 2).optimizer.state_dict()
    saved["param_groups"][0]["etas"] = (1.2, 0.5)
    with pytest.raises(ValueError, match=r"Invalid eta values: 1\.2, 0\.5"):
        Rprop(parameters(torch.float32)).load_state_dict(saved)


def test_checkpoint_with_plain_step_loads():
    saved = train(torch.optim.Rprop, parameters(torch.float32), 3).optimizer.state_dict()
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
    begun = train(Rprop, parameters(torch.float32), 5, lr=0.3)
    copied = duplicate(begun)
    assert copied.optimizer.param_groups[0]["params"][0] is copied.params[0]
    assert_same(train_more(begun, 10, seed=2), train_more(copied, 10, seed=2))


def test_old_pickle_gets_later_options():
    begun = train(Rprop, parameters(torch.float32), 5)
    state = begun.optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for option in set(options) - {"params", "lr", "etas", "step_sizes"}:
            del options[option]
    for p in begun.params:
        state["state"][p]["step"] = 5.0
    old = Rprop.__new__(Rprop)
    old.__setstate__(state)
    fresh = train(Rprop, parameters(torch.float32), 5)
    begun.optimizer = old
    assert_same(train_more(begun, 5, seed=2), train_more(fresh, 5, seed=2))


def test_live_dtype_change_matches_torch():
    runs = []
    for cls in (Rprop, torch.optim.Rprop):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 3)
        one = train(cls, list(net.parameters()), 3)
        net.bfloat16()
        train_more(one, 3, seed=2)
        net.double()
        runs.append(train_more(one, 3, seed=3))
    assert_same(*runs)
    p = runs[0].params[0]
    assert runs[0].optimizer.state[p]["prev"].dtype == torch.float32


def test_live_dtype_change_works_with_foreach():
    runs = []
    for foreach in (False, True):
        net = torch.nn.Linear(4, 3)
        torch.nn.init.ones_(net.weight)
        torch.nn.init.ones_(net.bias)
        one = train(Rprop, list(net.parameters()), 3, foreach=foreach)
        net.bfloat16()
        runs.append(train_more(one, 5, seed=2))
    assert_same(*runs)
