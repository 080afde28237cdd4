"""The monitor's statistics against plain Python, for one process and merged from several."""

import itertools
import math

import pytest
import torch
from monitor_truth import numbers, of_gradients, of_step_sizes, quantile, sign
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rprop import Rprop
from lightning_rprop.monitor import _statistics as statistics
from lightning_rprop.monitor._names import STATISTICS, quantile_level
from lightning_rprop.monitor._record import Plan, measure, summarize_gradients
from lightning_rprop.monitor._rows import find_rprop, list_rows
from lightning_rprop.monitor._statistics import Gradients

BOUNDS = (2.0**-20, 32.0)  # exact in every dtype
NAMES = ("mean", "min", "max", "std_log10", "lower_bound", "upper_bound", "at_lower_bound", "at_upper_bound")
LEVELS = (0.0, 0.025, 0.1, 0.5, 0.75, 1.0)

inf, nan = math.inf, math.nan
TINY = 1e-42  # subnormal in float32
GRADS = [*itertools.product((0.0, -0.0, TINY, -TINY, 1.0, -2.0, inf, -inf, nan), (0.0, -0.0, TINY, -TINY, 3.0, -3.0))]


@pytest.fixture(params=["numpy", "torch"])
def path(request, monkeypatch):
    """Select order statistics with NumPy, as on the CPU, or with torch, as on accelerators."""
    if request.param == "torch":
        monkeypatch.setattr(statistics, "is_on_host", lambda tensor: False)


def made(*shape, seed=0, dtype=torch.float32):
    """Step sizes over the whole range, some at the bounds, some equal."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (3 * torch.randn(shape, generator=generator, dtype=torch.float64) - 2)
    return values.clamp(*BOUNDS).to(dtype)


def read(tensors, **options):
    """The statistics of all tensors together, and of each."""
    table = statistics.step_size_table(tensors, [BOUNDS] * len(tensors), **options)
    table = torch.cat([table, torch.zeros(5, len(tensors), dtype=table.dtype)])
    return statistics.read(statistics.merge(table.numpy())), [statistics.read(column) for column in table.T.numpy()]


@pytest.mark.parametrize(
    "tensors",
    [
        [made(5, 3), made(7, seed=1), torch.tensor(0.25), torch.empty(0), made(3, 2, seed=2)],
        [torch.full((4,), 0.01), torch.full((2, 2), 0.01)],
        [made(2, 3, 4, 5).to(memory_format=torch.channels_last)],
        [made(6, 4).T, made(8, seed=3)[::2]],
        [made(9, dtype=torch.float64), made(9, seed=1)],
        [made(9, dtype=torch.bfloat16)],
        [made(9, dtype=torch.float16)],
    ],
    ids=["plain", "equal", "channels_last", "views", "float64", "bfloat16", "float16"],
)
def test_step_sizes_match_plain_python(tensors, path):
    total, each = read(tensors, logs=True)
    # the tables add float64 in another order and round logarithms to float32
    close = {"rel": 1e-6, "abs": 1e-12}
    everything = [x for tensor in tensors for x in numbers(tensor)]
    right = of_step_sizes(everything, BOUNDS, NAMES)
    assert {name: total[name] for name in NAMES} == pytest.approx(right, **close)
    assert total["mean"] == pytest.approx(right["mean"], rel=1e-14)
    for name in set(NAMES) - {"mean", "std_log10"}:
        assert total[name] == right[name]
    for tensor, values in zip(tensors, each, strict=True):
        if tensor.numel():
            assert {n: values[n] for n in NAMES} == pytest.approx(
                of_step_sizes(numbers(tensor), BOUNDS, NAMES), **close
            )
        else:
            assert values == {}
    for level, found in zip(LEVELS, statistics.quantiles(tensors, LEVELS).tolist(), strict=True):
        assert found == pytest.approx(quantile(everything, level), rel=1e-15)


def test_empty_tensor_adds_no_bounds():
    table = statistics.step_size_table([torch.ones(2), torch.empty(0)], [(0.5, 2.0), (0.1, 9.0)])
    values = statistics.read(statistics.merge(torch.cat([table, torch.zeros(5, 2, dtype=table.dtype)]).numpy()))
    assert (values["lower_bound"], values["upper_bound"]) == (0.5, 2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_mean_stays_within_min_and_max(dtype):
    """Rounding must not take it out of the range."""
    tensor = torch.full((1001,), 0.1, dtype=dtype)
    values, _ = read([tensor], logs=True)
    assert values["mean"] == values["min"] == values["max"] == tensor[0].item()
    assert values["std_log10"] == 0


@pytest.mark.parametrize("invalid", [[-1.0, 2.0, -3.0], [1.0, nan, 2.0], [0.0, inf, 1.0]], ids=str)
def test_invalid_step_sizes_are_reported(invalid, path):
    """torch.optim.Rprop does not check its bounds, so any number may occur."""
    values, _ = read([torch.tensor(invalid)])
    for name, function in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)):
        assert values[name] == pytest.approx(function(torch.tensor(invalid)).item(), nan_ok=True)
    if nan not in invalid:
        assert statistics.quantiles([torch.tensor(invalid)], [0.0, 0.5]).tolist() == sorted(invalid)[:2]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_match_plain_python(weight_decay, maximize):
    """All pairs of special numbers, with parameters whose decay turns some signs; more signs are kept than changed."""
    grads, prevs, params = [], [], []
    for i, (grad, prev) in enumerate([*GRADS, *GRADS, *[(2.0, 1.0)] * 3]):
        grads.append(grad)
        prevs.append(prev)
        params.append(0.0 if i < len(GRADS) else 5.0)
    signed = [(-g if maximize else g) + weight_decay * w for g, w in zip(grads, params, strict=True)]
    tensors = [torch.tensor(values) for values in (grads, prevs, params)]
    row = statistics.gradient_table(Gradients(*([t] for t in tensors), [weight_decay], [maximize]))[:, 0].tolist()
    names = ("sign_changed", "zero_gradient", "nonfinite_gradient")
    right = of_gradients(grads, signed, prevs, names)
    compared = sum(sign(a) * sign(b) != 0 for a, b in zip(signed, prevs, strict=True))
    n = len(grads)
    changed, zero = round(n * right["sign_changed"]), round(n * right["zero_gradient"])
    assert row == [n, changed, compared, zero, right["nonfinite_gradient"]]
    assert 0 < row[1] < row[2] < n


def test_first_step_compares_no_signs():
    gradients = Gradients([torch.tensor([1.0, -1.0, 0.0, nan])], [None], [torch.zeros(4)], [0.0], [False])
    assert statistics.gradient_table(gradients).flatten().tolist() == [4, 0, 0, 1, 1]


def test_each_gradient_has_its_column():
    grads = [torch.tensor([1.0, 1.0]), torch.empty(0), torch.tensor([[-1.0, 2.0, 0.0], [4.0, -5.0, 6.0]])]
    prevs = [torch.tensor([-1.0, 1.0]), torch.empty(0), torch.ones(2, 3)]
    gradients = Gradients(grads, prevs, [*map(torch.zeros_like, grads)], [0.0] * 3, [False] * 3)
    assert statistics.gradient_table(gradients).T.tolist() == [[2, 1, 2, 0, 0], [0] * 5, [6, 2, 5, 1, 0]]


@pytest.mark.parametrize("n", [1, 2, 3, 1000, (1 << 15) + 1, 3_000_001])
def test_quantiles_of_many_are_exact(n, path):
    """Also with ties, which are common in a network."""
    tensor = made(n)
    tensor[: n // 3] = 0.01
    ordered = tensor.double().sort().values.tolist()
    found = statistics.quantiles([tensor[: n // 2], tensor[n // 2 :]], LEVELS).tolist()
    assert found == [pytest.approx(quantile(ordered, level), rel=1e-15) for level in LEVELS]


@pytest.mark.parametrize("sizes", [[3, 5, 1], [0, 4], [4096, 10], [1]])
def test_small_sketches_are_exact(sizes):
    parts = [made(n, seed=i) for i, n in enumerate(sizes)]
    sketches = torch.stack([statistics.sketch([part] if len(part) else [], 4096) for part in parts])
    everything = [x for part in parts for x in numbers(part)]
    right = [quantile(everything, level) for level in LEVELS]
    assert statistics.merged_quantiles(sketches, LEVELS).tolist() == pytest.approx(right, rel=1e-15)
    assert statistics.merged_quantiles(sketches[:0], LEVELS).isnan().all()


def test_large_sketches_are_within_tolerance():
    parts = [made(n, seed=n) for n in (50_000, 4_097, 20_000, 3)]
    sketches = torch.stack([statistics.sketch([part], statistics.SKETCH) for part in parts])
    ordered = torch.cat(parts).double().sort().values
    for level, found in zip(LEVELS, statistics.merged_quantiles(sketches, LEVELS).tolist(), strict=True):
        low, high = (torch.quantile(ordered, min(max(level + d, 0), 1)).item() for d in (-2e-4, 2e-4))
        assert low <= found <= high


@pytest.mark.parametrize("name", ["median", "q50", "q0", "q100", "q2.5"])
def test_quantile_name_gives_its_level(name):
    assert quantile_level(name) == {"q0": 0.0, "q100": 1.0, "q2.5": 0.025}.get(name, 0.5)


@pytest.mark.parametrize("name", ["q", "q101", "q-1", "q1e1", "q5 ", "Q5", "mean", "q.5"])
def test_other_name_gives_no_level(name):
    assert quantile_level(name) is None


def test_histogram_counts_every_step_size():
    tensors = [made(1000), torch.tensor([1e-9, 1e9])]
    counts = statistics.histogram(tensors, -4.0, 1.0, 10)
    logarithms = torch.cat(tensors).log10().clamp(-4, 1)
    right = [((logarithms >= -4 + i / 2) & (logarithms < -3.5 + i / 2)).sum().item() for i in range(10)]
    right[-1] += (logarithms == 1).sum().item()
    assert counts.tolist() == right
    assert sum(right) == 1002


def net(dtype=torch.float32, **options):
    """An optimizer that has made some steps, and its rows."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 3), (2,), (5,))]
    optimizer = Rprop(params, **options)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, list_rows([optimizer], {id(p): f"p{i}" for i, p in enumerate(params)}, 0)


def test_complex_weight_counts_as_two():
    optimizer, rows = net(torch.complex64)
    plan = Plan(("mean", "max", "median", "sign_changed"), False, frozenset({"p1"}), False)
    state = {p: dict(s) for p, s in optimizer.state.items()}
    for p in state:
        p.grad = torch.randn_like(p)
    measured = measure(rows, [summarize_gradients(rows)], plan)
    for scope, members in ((("total", ""), list(state)), (("parameter", "p1"), list(state)[1:2])):
        sizes = [x for p in members for x in numbers(state[p]["step_size"])]
        grads, prevs = (
            [x for p in members for x in numbers(t(p))] for t in (lambda p: p.grad, lambda p: state[p]["prev"])
        )
        right = of_step_sizes(sizes, (1e-6, 50), plan.statistics) | of_gradients(grads, grads, prevs, plan.statistics)
        assert measured.statistics[scope] == pytest.approx(right, rel=1e-12)


class Watch(TorchDispatchMode):
    """Records operations that bring a number to the host, for which an accelerator would drain its queue."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.waits = []
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        if any(function.name().split("::")[1].startswith(name) for name in self.WAITS):
            self.waits.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gathers", [False, True])
def test_record_needs_one_transfer(gathers, monkeypatch):
    """All statistics of all parameters, computed as on an accelerator."""
    monkeypatch.setattr(statistics, "is_on_host", lambda tensor: False)
    _, rows = net(weight_decay=0.1)
    names = (*STATISTICS, "q10", "q90")
    plan = Plan(names, True, frozenset(row.name for row in rows), True)
    brought = []
    original = torch.Tensor.cpu

    def cpu(tensor):
        brought.append((tensor.numel(), [*watch.waits], watch.operations))
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with Watch() as watch:
        gradients = [summarize_gradients(rows)]
        gather = (lambda packed: packed.unsqueeze(0)) if gathers else None
        measured = measure(rows, gradients, plan, torch.tensor(3.0), torch.tensor(2), gather)
    assert len(brought) == 1
    assert brought[0][1] == []
    assert brought[0][2] > 100  # the mode saw it
    assert set(watch.waits) <= {"aten::_local_scalar_dense", "aten::nonzero"}  # afterwards, on the host
    assert measured.losses == [3]
    assert measured.statistics["total", ""]["retreats"] == 2
    assert set(measured.statistics["total", ""]) == set(names)


def test_rprop_is_found_in_wrappers():
    param = torch.nn.Parameter(torch.zeros(2))
    sgd, mine, torchs = torch.optim.SGD([param]), Rprop([param]), torch.optim.Rprop([param])

    class Wrapper:
        def __init__(self, **inside):
            vars(self).update(inside)

    class Sub(Rprop):
        pass

    assert find_rprop(sgd) is None
    assert find_rprop(mine) is mine
    assert find_rprop(torchs) is torchs
    sub = Sub([param])
    assert find_rprop(sub) is sub
    assert find_rprop(Wrapper(optimizer=Wrapper(optim=sgd))) is None
    for inside in (mine, torchs):
        for link in ("_optimizer", "optimizer", "optim"):
            assert find_rprop(Wrapper(**{link: inside})) is inside
