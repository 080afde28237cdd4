"""The examples, except the app, and the benchmarks run and print the right numbers."""

import json
import re
from pathlib import Path

import fabric_ranks
import pytest
import torch
from lit import all_equal, trainer
from programs import run
from twin import twin
from whole_set import Regression, exact, relative_error, whole_numbers

from lightning_rprop import FullBatch, FullBatchLoader

ROOT = Path(__file__).parents[2]
ENCODER = ROOT / "examples" / "encoder.py"


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import encoder

    return encoder


def test_encoder_prints_table_and_saves_plot(tmp_path):
    output = run(tmp_path, ENCODER, "--starts", "30", "--only", "10-5-10")
    rows = re.findall(r"^10-5-10 +([\d.]+) +50  (\S+) +(\d+) +(\d+)/30 ", output, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [
        (lr, variant) for lr in ("0.1", "1") for variant in ("rprop+", "rprop-", "irprop+", "irprop-")
    ]
    # 99 % intervals of the median of 20 starts, measured by an independent program
    assert all(21 <= int(median) <= 28 if lr == "0.1" else 14 <= int(median) <= 23 for lr, _, median, _ in rows)
    assert (tmp_path / "encoder.png").read_bytes().startswith(b"\x89PNG")
    assert "at least 1, got 0" in run(tmp_path, ENCODER, "--starts", "0", fails=True)


@pytest.mark.parametrize("variant", ["rprop+", "rprop-", "irprop+", "irprop-"])
def test_encoder_starts_are_independent(variant, encoder):
    """One parameter element of one start equals the scalar reference, given its gradients and that start's losses."""
    row = encoder.ROWS[0]._replace(cap=60)
    seen = []

    def spy(params, grads, prevs, step_sizes, *args, **kwargs):
        seen.append((params[0][2, 7].item(), grads[0][2, 7].item()))
        original(params, grads, prevs, step_sizes, *args, **kwargs)

    original, encoder.rprop = encoder.rprop, spy
    try:
        result = encoder.train(row, variant, starts=5, seed=3)
    finally:
        encoder.rprop = original
    weights, gradients = zip(*seen, strict=True)
    losses = result.losses[:, 2].tolist()
    tape = iter(zip(gradients, losses, strict=False))
    path = twin(variant, lambda _: next(tape), len(seen), weights[0], 0.1, (0.5, 1.2), (1e-6, 50))
    assert [weights[0], *(w for w, _, _ in path)][:-1] == list(weights)
    assert len(seen) == 60


def test_encoder_network_matches_einsum(encoder):
    torch.manual_seed(0)
    n, hidden = 4, 2
    w = torch.randn(3, 2 * n * hidden + hidden + n, dtype=torch.float64)
    first, second = w[:, :8].reshape(3, 4, 2), w[:, 8:16].reshape(3, 2, 4)
    bias, out_bias = w[:, 16:18], w[:, 18:22]
    inner = torch.sigmoid(torch.einsum("pi,sih->sph", torch.eye(4, dtype=torch.float64), first) + bias[:, None])
    expected = torch.sigmoid(torch.einsum("sph,sho->spo", inner, second) + out_bias[:, None])
    assert torch.allclose(encoder.outputs(w, n, hidden), expected, rtol=1e-14)  # einsum sums in another order


def test_variants_benchmark_ranks_the_rules():
    output = run(ROOT, "-m", "benchmarks.variants", "--starts", "2", "--only", "ellipsoid,rotated")
    rows = [line.split("|")[3:7] for line in output.splitlines() if "axes" in line]
    medians = [[float(re.search(r"\d+", cell)[0]) for cell in row] for row in rows]
    assert len(medians) == 2
    assert min(medians[0]) == medians[0][1]  # axes parallel to the parameters: rprop- is fastest
    assert max(medians[1][2:]) < min(medians[1][:2])  # rotated axes: both improved rules are faster
    assert "no problem foo; there are digits" in run(ROOT, "-m", "benchmarks.variants", "--only", "foo", fails=True)


def test_step_benchmark_prints_and_saves_table(tmp_path):
    file = tmp_path / "step.json"
    before = ["--before", "HEAD"] if (ROOT / ".git").exists() else []
    options = ("--seconds", "0.1", "--only", "small,memory", "--json", str(file), *before)
    output = run(ROOT, "-m", "benchmarks.step", *options)
    figures = json.loads(file.read_text())
    rows = figures["rows"]
    peers = ["torch Rprop for-loop", "torch Rprop foreach", "torch SGD fused"]
    assert [row["peer"] for row in rows[:-2]] == peers + ["lightning_rprop before"] * bool(before)
    for row in rows:
        assert f"| {row['case']} | {row['peer']} | {row['ours']:.4g} {row['unit']} | {row['theirs']:.4g} " in output
    assert rows[-1]["ours"] < 0.1 < rows[-1]["theirs"]  # bytes per parameter
    assert figures["machine"]["torch"] == torch.__version__
    assert "no package at revision foo" in run(ROOT, "-m", "benchmarks.step", "--before", "foo", fails=True)
    assert "no case foo; there are resnet50" in run(ROOT, "-m", "benchmarks.step", "--only", "foo", fails=True)


def test_step_benchmark_counts_the_right_bytes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.step import CASES, bytes_moved

    assert bytes_moved(CASES["resnet50"]) == 7 * 4 * 25_557_032
    assert bytes_moved(CASES["gpt2"]) == 7 * 4 * 124_439_808
    assert bytes_moved(CASES["small"]) == 7 * 4 * 1_377
    assert bytes_moved(CASES["bfloat16"]) == 7 * 2 * 25_557_032


def test_precision_benchmark_shows_cost_of_bf16(tmp_path):
    file = tmp_path / "precision.json"
    command = ("-m", "benchmarks.precision", "--starts", "1", "--only", "digits,moves", "--json", str(file))
    output = run(ROOT, *command)
    figures = json.loads(file.read_text())
    (losses,), moves = figures["losses"], figures["moves"]
    assert losses.pop("problem") == "digits"
    assert f"| {' | '.join(f'{loss:.2g}' for loss in losses.values())} |" in output
    in_bfloat16 = {"bf16-true", "master weights only"}
    assert all((loss > 1e-5) == (way in in_bfloat16) for way, loss in losses.items()), losses  # 1e-4 against 1e-9
    assert [(row["lr"], row["in_turn"]) for row in moves[:2]] == [(1e-2, 0), (1e-3, 8)]
    assert all(abs(row["in_turn"] - row["predicted"]) <= 1 for row in moves)  # the step sizes are rounded too
    assert moves[0]["first"] == 0 < moves[-1]["first"]
    assert "at least 1, got 0" in run(ROOT, "-m", "benchmarks.precision", "--starts", "0", fails=True)


def test_precision_remedies_add_as_expected(monkeypatch):
    """With updates below half a bfloat16 ulp of the parameter that are exact in float32."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.precision import KAHAN, MASTER, STEP_SIZES

    moves = torch.randint(-3, 5, (2000, 7), generator=torch.Generator().manual_seed(0)).float() * 2**-12
    exact = 1 + moves.double().cumsum(0)
    weights, memories = {}, {}
    for remedy in (KAHAN, MASTER, STEP_SIZES):
        weight = torch.ones(7, dtype=torch.bfloat16)
        memory = remedy.remember(weight)
        for move in moves:
            remedy.add(weight, move, memory)
        weights[remedy], memories[remedy] = weight, memory
    assert (exact[-1] > 1.1).all()
    assert torch.equal(weights[KAHAN].double() + memories[KAHAN].double(), exact[-1])
    assert torch.equal(memories[MASTER].double(), exact[-1])
    assert torch.equal(weights[MASTER], exact[-1].bfloat16())
    assert torch.equal(weights[STEP_SIZES], torch.ones_like(weights[STEP_SIZES]))  # every update rounds away


def test_traffic_benchmark_matches_predictions(tmp_path):
    file = tmp_path / "traffic.json"
    options = ("--worlds", "2", "--steps", "4", "--fits", "1", "--json", str(file))
    output = run(ROOT, "-m", "benchmarks.traffic", *options)
    figures = json.loads(file.read_text())
    rows = {(row["net"], row["program"]): row for row in figures["rows"]}
    for net, size, buckets in (("small", 4 * 5_569, 1), ("large", 4 * 982_921, 2)):
        ours, peer, sharded = (
            rows[net, program] for program in ("FullBatch", "accumulate_grad_batches", "FullBatch, FSDP2")
        )
        assert ours["calls"] == {"allreduce": buckets, "allgather": 1, "broadcast": 1}
        assert ours["bytes"] == {"allreduce": size, "allgather": 2 * 16, "broadcast": 8}
        assert peer["calls"] == {"allreduce": buckets, "broadcast": 8}
        assert peer["bytes"] == {"allreduce": size, "broadcast": 64}
        # FSDP2 pads the last layer, which has one row, to one row per rank
        padded = size + 4 * (65 if net == "small" else 961)
        assert sharded["bytes"]["allgather_base"] == 8 * 2 * padded
        assert sharded["bytes"]["reduce_scatter_base"] == 8 * padded
        # each of the two ranks sends the gradients once; other programs can only add to this counter
        assert ours["loopback"] is None or ours["loopback"] > 0.8 * 2 * size
    resnet50 = figures["loads"][1]
    assert resnet50["size"] == 4 * 25_557_032
    assert re.search(r"^\| ResNet-50's.* \| 4 \| 153\.3 \| 1840 \| 123 \|", output, flags=re.MULTILINE)


def test_pinn_learns_solution_and_saves_plot(tmp_path):
    program = ROOT / "examples" / "pinn.py"
    output = run(tmp_path, program, "--seconds", "3", "--points", "12", "--micro-batch-size", "72", "--output", "p.png")
    errors = dict(re.findall(r"^(Rprop|LBFGS|Adam, lr 1e-[23])\D.* ([\d.e+-]+)$", output, flags=re.MULTILINE))
    assert set(errors) == {"Rprop", "LBFGS", "Adam, lr 1e-2", "Adam, lr 1e-3"}
    assert float(errors["Rprop"]) < 0.5  # relative to the solution's norm; an idle core gets there in milliseconds
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "--seconds must be > 0" in run(tmp_path, program, "--seconds", "0", fails=True)


def test_gp_recovers_from_nan_and_converges(tmp_path):
    program = ROOT / "examples" / "gaussian_process.py"
    output = run(tmp_path, program, "--starts", "2", "--output", "gp.png")
    fits = {}
    for line in output.splitlines():
        if row := re.match(r"(plain|log) +(\S.*?) {2,}(.*\d)  (.*)$", line):
            kind, name, numbers, stop = row.groups()
            _, worst, _, _, rmse, _, retreats = map(float, numbers.split())
            fits[kind, name] = (worst, rmse, retreats, stop)
    assert len(fits) == 2 * 5
    for kind in ("plain", "log"):
        worst, rmse, _, stop = fits[kind, "Rprop"]
        assert (worst < 0.3235, rmse < 0.26, stop) == (True, True, "2 converged"), output  # the optimum is 0.3232
    worst, rmse, _, stop = fits["plain", "Rprop, retreat=False"]
    assert worst > 0.4, output
    assert rmse < 0.5, output  # the best weights, not those at NaN
    assert "NaN" in stop, output
    assert fits["plain", "Rprop"][2] > 0
    assert (tmp_path / "gp.png").read_bytes().startswith(b"\x89PNG")
    assert "--evaluations must be >= 1" in run(tmp_path, program, "--evaluations", "0", fails=True)


def test_multistart_finds_frequencies(tmp_path):
    program = ROOT / "examples" / "multistart.py"
    output = run(tmp_path, program, "--starts", "16", "--steps", "100", "--output", "m.png")
    rows = re.findall(r"^(Rprop|LBFGS, all).* 16 +[\d.]+ +([\d.]+) +([\d.]+) ", output, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["Rprop", "LBFGS, all"] * 2, output
    best, medians = ([float(row[column]) for row in rows] for column in (1, 2))
    assert all(low < 0.9 * middle for low, middle in zip(best, medians, strict=True)), output
    assert all(rprop < 1.1 * lbfgs for rprop, lbfgs in (medians[:2], medians[2:])), output  # equal, or up to 25 % lower
    found = [
        [*map(float, line.split(", "))] for line in re.findall("^frequencies.*: (.*)$", output, flags=re.MULTILINE)
    ]
    for frequency, near in ((1, found[0]), (2.3, found[0]), (20, found[1])):  # of the data
        assert min(abs(value - frequency) for value in near) < 0.05, output
    assert len(re.findall("LBFGS, in the same time", output)) == 2
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "--starts must be >= 2" in run(tmp_path, program, "--starts", "1", fails=True)


def test_stacked_benchmark_prints_and_saves_table(tmp_path):
    file = tmp_path / "stacked.json"
    options = ("--seconds", "0.1", "--widths", "1-20-1,8-20-20-1", "--members", "1,3", "--json", str(file))
    output = run(ROOT, "-m", "benchmarks.stacked", *options)
    figures = json.loads(file.read_text())
    rows = figures["rows"]
    assert [(row["dtype"], row["weights"], row["members"]) for row in rows] == [
        (dtype, weights, n) for dtype in ("float32", "float64") for weights in (61, 621) for n in (1, 3)
    ]
    for row in rows:
        assert f"| {row['members']} | {row['stacked']:.4g} | {row['separate']:.4g} | {row['shared']:.4g} |" in output
    assert (figures["machine"]["threads"], figures["machine"]["samples"]) == ("1", 200)
    assert "must be at least 1, got 0" in run(ROOT, "-m", "benchmarks.stacked", "--members", "0", fails=True)


def test_stacked_benchmark_compares_equal_steps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.stacked import Case, programs

    steps, models = programs(Case((2, 5, 1), 3, torch.float64))
    for step in steps.values():
        for _ in range(5):
            step()
    model, *others = models
    for nets in others:
        assert all(all_equal(model.member(i).parameters(), net.parameters()) for i, net in enumerate(nets))


def test_fabric_example_equals_trainer(tmp_path):
    """On 1 and 2 ranks and across a checkpoint; bit for bit, because no operation rounds."""
    module = Regression(fabric_ranks.optimizer, net=fabric_ranks.network())
    loader = FullBatchLoader(whole_numbers(fabric_ranks.SAMPLES), fabric_ranks.SIZE, steps_per_epoch=fabric_ranks.STEPS)
    trainer(tmp_path, [FullBatch()], max_epochs=1).fit(module, loader)
    _, gradient = exact(fabric_ranks.network(), fabric_ranks.ragged())
    run(tmp_path, fabric_ranks.__file__)
    for world in fabric_ranks.WORLDS:
        for rank in range(world):
            seen = torch.load(tmp_path / f"{world}-{rank}.pt")
            assert all_equal(seen["whole"], module.net.parameters()), (world, rank)
            assert all_equal(seen["resumed"], seen["whole"]), (world, rank)
            assert not all_equal(seen["half"], seen["whole"]), (world, rank)
            # on data that round: with whole numbers, signs could hide wrong micro-batch weights
            assert relative_error(seen["gradient"], gradient) < 1e-14, (world, rank)
