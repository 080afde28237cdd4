"""What Convergence accepts as parameters, gradients, step sizes and loss, and its errors."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_rprop import Convergence, Rprop


def small(values, tolerance=0.5, **options):
    """Return whether a gradient counts as small."""
    weight = torch.nn.Parameter(torch.zeros_like(values))
    weight.grad = values
    return Convergence(None, tolerance, patience=1).update(1.0, [weight])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_criterion_in_each_dtype(dtype, place):
    for sign in (1, -1):
        assert small(sign * torch.tensor([0.25, 0.5, 0.0], dtype=dtype))
        above = torch.tensor(0.5, dtype=dtype).nextafter(torch.ones((), dtype=dtype))
        assert not small(sign * torch.stack([above.new_zeros(()), above]))
    assert small(torch.full((2,), 6e-8, dtype=dtype), tolerance=1e-7)
    assert not small(torch.full((2,), 1.2e-7, dtype=dtype), tolerance=1e-7)  # equal in float16


def test_complex_gradient_counts_both_parts(place):
    assert small(torch.tensor([0.5 - 0.5j, 0.1j]))
    assert not small(torch.tensor([0.1 - 0.6j]))
    assert not small(torch.tensor([0.6 + 0.1j]).conj())


def test_sparse_gradient_counts_its_sums(place):
    for weights, is_small in (([0.2, 0.3, -0.5], True), ([0.3, 0.3, 0.1], False)):
        embedding = torch.nn.Embedding(9, 1, sparse=True)
        (embedding(torch.tensor([1, 1, 3])).flatten() * torch.tensor(weights)).sum().backward()
        assert embedding.weight.grad.is_sparse
        assert Convergence(None, 0.5, patience=1).update(1.0, embedding.parameters()) == is_small


def test_every_parameter_counts(place):
    """Of all groups, in any order; empty ones and those without a gradient do not."""
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (), (0,), (4,))]
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    for large in (None, 0, 1, 3):
        for i, weight in enumerate(weights):
            weight.grad = torch.zeros_like(weight)
            if i == large:
                weight.grad.view(-1)[-1] = -1
        optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": [*weights[1:], frozen]}], lr=0.1)
        forms = (optimizer, optimizer.param_groups, [{"params": iter(weights)}], [*weights, frozen], iter(weights))
        for params in forms:
            assert Convergence(None, 0.5, patience=1).update(1.0, params) == (large is None)


@pytest.mark.parametrize("make", [Rprop, torch.optim.Rprop], ids=["ours", "torch"])
def test_step_criterion_reads_all_step_sizes(make, place):
    first, second, third = (
        torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.half, torch.cfloat, torch.half)
    )
    optimizer = make([{"params": [first, third]}, {"params": [second], "lr": 0.25}], lr=0.125)
    convergence = Convergence(None, None, tolerance_step=0.25, patience=2)
    assert not convergence.update(1.0, optimizer)  # no step sizes before the first step
    assert not convergence.update(1.0, optimizer)
    first.grad, second.grad = torch.ones(2, dtype=torch.half), torch.full((2,), 1 + 1j)
    optimizer.step()
    assert not convergence.update(1.0, optimizer)
    assert convergence.update(1.0, optimizer)
    for part in (0, 1):
        optimizer.step()  # equal signs: the step sizes grow
        assert torch.view_as_real(optimizer.state[second]["step_size"]).max() == torch.tensor(0.3)
        assert not Convergence(None, None, 0.25, 1).update(1.0, optimizer)
        torch.view_as_real(optimizer.state[second]["step_size"])[..., part] = 0.125
        assert not Convergence(None, None, 0.25, 1).update(1.0, optimizer)
        optimizer.state[second]["step_size"].fill_(0.25 + 0.25j)
        assert Convergence(None, None, 0.25, 1).update(1.0, optimizer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"tolerance_change": -1e-9},
            ValueError,
            "tolerance_change must be a finite number >= 0, got -1e-09. None dis",
        ),
        ({"tolerance_grad": -1}, ValueError, "tolerance_grad must be a finite number >= 0, got -1"),
        ({"tolerance_step": float("nan")}, ValueError, "tolerance_step must be a finite number >= 0, got nan"),
        ({"tolerance_grad": float("inf")}, ValueError, "tolerance_grad must be a finite number >= 0, got inf"),
        (
            {"tolerance_change": "1e-9"},
            TypeError,
            "tolerance_change must be .* got '1e-9' .*YAML reads .* write 1.0e-9",
        ),
        ({"tolerance_change": True}, TypeError, "tolerance_change must be a number >= 0 or None, got True"),
        ({"tolerance_step": [1]}, TypeError, r"tolerance_step must be a number >= 0 or None, got \[1\]"),
        ({"tolerance_change": None, "tolerance_grad": None}, ValueError, "are all None, so no run .* Set at least one"),
        ({"patience": 0}, ValueError, "patience must be an integer >= 1, got 0"),
        ({"patience": 2.0}, TypeError, r"patience must be an integer >= 1, got 2.0 \(float\)"),
        ({"patience": True}, TypeError, "patience must be an integer >= 1, got True"),
    ],
)
def test_invalid_options_raise_clear_errors(options, error, message):
    with pytest.raises(error, match=message):
        Convergence(**options)


def test_numbers_of_any_type_are_accepted():
    convergence = Convergence(np.float32(0.5), Fraction(1, 4), 0, np.int64(3))
    assert [type(value) for value in vars(convergence).values()][:4] == [float, float, float, int]


@pytest.mark.parametrize(
    ("loss", "params", "error", "message"),
    [
        (torch.ones(1, 2), [torch.ones(1)], ValueError, r"loss must be .* got tensor\(\[\[1., 1.\]\]\). Reduce it"),
        (torch.ones(1) * 1j, [torch.ones(1)], ValueError, "loss must be a number, a tensor of one element, or"),
        (None, [torch.ones(1)], ValueError, "loss must be a number, .* for parameters of shape .* got None"),
        (1.0, [], ValueError, "params contains no parameters. Pass the optimizer, or a new iterator"),
        (1.0, torch.ones(1), TypeError, "params must be an optimizer, its param_groups, or an iterable of parameters"),
        (1.0, torch.nn.Linear(1, 1), TypeError, r"got Linear\(.*Pass for example model.parameters\(\)"),
        (1.0, [("weight", torch.ones(1))], TypeError, "params must be an optimizer"),
    ],
)
def test_invalid_update_changes_nothing(loss, params, error, message):
    convergence = Convergence()
    convergence.update(2.0, [torch.ones(1)])
    before = convergence.state_dict()
    with pytest.raises(error, match=message):
        convergence.update(loss, params)
    assert convergence.state_dict() == before


def test_step_criterion_demands_an_rprop():
    weight = torch.nn.Parameter(torch.ones(1))
    for params in (torch.optim.Adam([weight]), [weight], Rprop([weight]).param_groups):
        with pytest.raises(
            ValueError, match=r"tolerance_step=0.1 needs the step sizes of Rprop, .* Pass the optimizer"
        ):
            Convergence(tolerance_step=0.1).update(1.0, params)
