"""Invalid arguments and parameters raise an error before anything changes."""

import pickle

import pytest
import torch
from cases import BAD, BAD_IN_DTYPE, FROM_CONFIG, GOOD_IN_DTYPE

from lightning_rprop import Rprop


def leaf(dtype=torch.float32):
    return torch.ones(2).to(dtype).requires_grad_()


@pytest.mark.parametrize(("kwargs", "exception", "message"), BAD.values(), ids=BAD)
def test_invalid_argument_is_refused(kwargs, exception, message):
    with pytest.raises(exception, match=message):
        Rprop([leaf()], **kwargs)


def test_unhashable_variant_is_refused():
    with pytest.raises(ValueError, match=r"Invalid variant: \[\]"):
        Rprop([leaf()], variant=[])


@pytest.mark.parametrize(("kwargs", "exception", "message"), BAD.values(), ids=BAD)
def test_arguments_are_checked_before_params(kwargs, exception, message):
    with pytest.raises(exception, match=message):
        Rprop(None, **kwargs)


@pytest.mark.parametrize(("kwargs", "exception", "message"), BAD.values(), ids=BAD)
def test_invalid_option_of_group_is_refused(kwargs, exception, message):
    with pytest.raises(exception, match=message):
        Rprop([{"params": [leaf()]}, {"params": [leaf()], **kwargs}])


@pytest.mark.parametrize(("kwargs", "exception", "message"), BAD.values(), ids=BAD)
def test_invalid_group_is_not_added(kwargs, exception, message):
    optimizer = Rprop([leaf()])
    before = pickle.dumps(optimizer.param_groups)
    with pytest.raises(exception, match=message):
        optimizer.add_param_group({"params": [leaf()], **kwargs})
    assert pickle.dumps(optimizer.param_groups) == before


@pytest.mark.parametrize(("kwargs", "dtype", "message"), BAD_IN_DTYPE.values(), ids=BAD_IN_DTYPE)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_unrepresentable_argument_is_refused(kwargs, dtype, message):
    with pytest.raises(ValueError, match=message):
        Rprop([leaf(torch.float64), leaf(dtype)], **kwargs)
    optimizer = Rprop([leaf(torch.float64)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [leaf(dtype)], **kwargs})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="the dtype of 'weight'" if "dtype of" in message else message):
        Rprop([("weight", leaf(dtype))], **kwargs)


@pytest.mark.parametrize(("kwargs", "dtype"), GOOD_IN_DTYPE.values(), ids=GOOD_IN_DTYPE)
def test_argument_at_dtype_limit_works(kwargs, dtype):
    p = leaf(dtype)
    optimizer = Rprop([p], **kwargs)
    sizes = []
    for sign in (1, 1, -1):
        p.grad = torch.full((2,), sign, dtype=dtype)
        optimizer.step()
        sizes.append(optimizer.state[p]["step_size"][0].item())
    assert sizes[0] < sizes[1] > sizes[2]


@pytest.mark.parametrize(("kwargs", "held"), FROM_CONFIG.values(), ids=FROM_CONFIG)
def test_groups_hold_plain_python_values(kwargs, held, tmp_path):
    for optimizer in (Rprop([leaf()], **kwargs), Rprop([{"params": [leaf()], **kwargs}])):
        group = optimizer.param_groups[0]
        for name, value in held.items():
            assert group[name] == value
            assert type(group[name]) is type(value)
            assert not isinstance(value, tuple) or all(type(v) is float for v in group[name])
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]["etas"] == group["etas"]


def test_etas_accept_a_generator():
    assert Rprop([leaf()], etas=(x for x in (0.4, 1.3))).param_groups[0]["etas"] == (0.4, 1.3)


def test_unknown_group_keys_are_kept():
    optimizer = Rprop([{"params": [leaf()], "name": "head", "momentum": 0.9}])
    assert optimizer.param_groups[0]["name"] == "head"
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("params", "exception", "message"),
    [
        (torch.ones(2, requires_grad=True), TypeError, "iterable of Tensors or dicts"),
        ([], ValueError, "optimizer got an empty parameter list"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        ([{"params": {torch.ones(1)}}], TypeError, "optimizer parameters need to be organized in ordered collections"),
        ([torch.ones(2, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([("a", torch.ones(1)), torch.ones(1)], ValueError, "all optimizer params should be with/without names"),
    ],
)
def test_invalid_params_raise_torch_errors(params, exception, message):
    with pytest.raises(exception, match=message):
        Rprop(params)


def test_shared_parameter_is_refused():
    p = leaf()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        Rprop([{"params": p}, {"params": [p]}])


UNUSABLE = {
    "float8": (
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        TypeError,
        "its dtype is torch.float8_e4m3fn. Convert it",
    ),
    "expanded": (lambda: torch.ones(1, 1).expand(1, 3), ValueError, r"elements share memory, .* strides are \(1, 0\)"),
}


@pytest.mark.parametrize(("make", "exception", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_parameter_is_refused_when_given(make, exception, message):
    with pytest.raises(exception, match=f"Rprop cannot update 'b': .*{message}"):
        Rprop([("a", leaf()), ("b", make().requires_grad_())])
    optimizer = Rprop([leaf()])
    with pytest.raises(exception, match=f"Rprop cannot update parameter 0: .*{message}"):
        optimizer.add_param_group({"params": make().requires_grad_()})
    assert len(optimizer.param_groups) == 1
    frozen = Rprop([leaf(), make()])  # allowed, as in torch, because it has no gradient
    frozen.step()


# An integer tensor cannot require a gradient, but it can have one.
WITH_GRADIENT = UNUSABLE | {
    "int": (lambda: torch.ones(2, dtype=torch.int64), TypeError, "its dtype is torch.int64. Convert it to float64, ")
}


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize(("make", "exception", "message"), WITH_GRADIENT.values(), ids=WITH_GRADIENT)
def test_step_with_unusable_moves_nothing(make, exception, message, foreach):
    first, unusable = leaf(), make()
    optimizer = Rprop([{"params": first}, {"params": [leaf(), unusable]}], foreach=foreach)
    first.grad, unusable.grad = torch.ones(2), torch.zeros_like(unusable)
    with pytest.raises(exception, match=f"Rprop cannot update parameter 1: .*{message}"):
        optimizer.step()
    assert first.tolist() == [1.0, 1.0]


def test_remedy_for_expanded_parameter_works():
    param = torch.ones(1, 1).expand(1, 3)
    copied = torch.nn.Parameter(param.detach().contiguous())
    copied.grad = torch.ones(1, 3)
    Rprop([copied]).step()
    assert torch.equal(copied.detach(), torch.ones(1, 3) - 0.01)


@pytest.mark.parametrize("foreach", [None, False])
def test_unusable_new_dtype_moves_nothing(foreach):
    first, other = leaf(), leaf()
    optimizer = Rprop([{"params": first}, {"params": other}], foreach=foreach)
    first.grad, other.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    before = first.detach().clone()
    other.data = other.data.to(torch.float8_e4m3fn)
    other.grad = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"Rprop cannot update parameter 0: its dtype is torch.float8_e4m3fn"):
        optimizer.step()
    assert torch.equal(first, before)
