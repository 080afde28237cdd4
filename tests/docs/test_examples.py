"""Examples and benchmarks run and print the right numbers."""

import json
import re
from pathlib import Path

import fabric_ranks
import lightning
import pytest
import torch
from lit import all_equal, trainer
from packaging.version import Version
from pictures import is_png
from programs import run
from whole_set import Regression, exact, relative_error, whole_numbers

from lightning_rprop import FullBatch, FullBatchLoader, Rprop

ROOT = Path(__file__).parents[2]
ENCODER = ROOT / "examples" / "encoder.py"
VARIANTS = ("rprop+", "rprop-", "irprop+", "irprop-")


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import encoder

    return encoder


def test_encoder_prints_table_and_saves_plot(tmp_path):
    output = run(tmp_path, ENCODER, "--starts", "30", "--epochs", "60")
    rows = re.findall(r"^10-5-10, lr ([\d.]+), .* 50 +(\S+) +(\d+) +(\d+)/30 ", output, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [(lr, variant) for lr in ("0.1", "1") for variant in VARIANTS]
    # 99 % intervals of the median of 20 starts, measured by an independent program
    assert all(21 <= int(median) <= 28 if lr == "0.1" else 14 <= int(median) <= 23 for lr, _, median, _ in rows)
    assert len(re.findall(r"^12-2-12, .* inf +0/30 +\d+  no$", output, flags=re.MULTILINE)) == 3 * len(VARIANTS)
    assert is_png(tmp_path / "encoder.png")
    assert "at least 1, got 0" in run(tmp_path, ENCODER, "--starts", "0", fails=True)


def solve(net, variant, epochs):
    """Train one start of the 10-5-10 encoder and return the epoch at which it is solved."""
    target = torch.eye(10, dtype=torch.float64)
    first, bias, second, out_bias = params = list(net.parameters())
    optimizer = Rprop(params, lr=1, variant=variant)
    for epoch in range(epochs + 1):
        out = ((first.T + bias).sigmoid() @ second.T + out_bias).sigmoid()
        if torch.where(target > 0, out > 0.6, out < 0.4).all():
            return epoch
        optimizer.zero_grad()
        loss = 0.5 * (out - target).square().sum()
        loss.backward()
        optimizer.step(loss=loss)
    return torch.inf


def test_encoder_starts_equal_separate_runs(encoder):
    for variant in VARIANTS:
        torch.manual_seed(0)
        alone = [solve(net, variant, 60) for net in [encoder.encoder(10, 5) for _ in range(20)]]
        assert len(set(alone)) > 1
        assert encoder.train(encoder.SETTINGS[1], variant, 20, 60).tolist() == alone, variant


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


def stops(number):
    """Return the broadcasts of whether to stop, which Lightning makes with each batch from 2.6 on."""
    return {"broadcast": number} if Version(lightning.__version__) >= Version("2.6") else {}


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
        assert ours["calls"] == {"allreduce": buckets, "allgather": 1} | stops(1)
        assert ours["bytes"] == {"allreduce": size, "allgather": 2 * 16} | stops(8)
        assert peer["calls"] == {"allreduce": buckets} | stops(8)
        assert peer["bytes"] == {"allreduce": size} | stops(64)
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
    output = run(tmp_path, program, "--seconds", "2", "--micro-batch-size", "600")
    errors = dict(re.findall(r"^(Rprop|LBFGS|Adam) +2\.\d s .* error ([\d.e+-]+)$", output, flags=re.MULTILINE))
    assert set(errors) == {"Rprop", "LBFGS", "Adam"}
    assert float(errors["Rprop"]) < 0.1, output  # relative to the solution's norm; about 2e-3
    assert is_png(tmp_path / "pinn.png")
    assert "--seconds must be > 0, got 0" in run(tmp_path, program, "--seconds", "0", fails=True)


def test_gp_recovers_from_nan_and_converges(tmp_path):
    program = ROOT / "examples" / "gaussian_process.py"
    output = run(tmp_path, program, "--starts", "2")
    rows = re.findall(r"^(\S.*?) {2,}([\d.]+.*)$", output, flags=re.MULTILINE)
    fits = {name: [float(number) for number in numbers.split()] for name, numbers in rows}
    assert len(fits) == 5
    for name in ("Rprop", "Rprop, logarithms"):
        _, worst, evaluations, _, converged, nans = fits[name]
        assert worst < 0.3235, output  # the optimum is 0.3232
        assert (evaluations < 200, converged, nans) == (True, 2, 0), output
    assert fits["Rprop"][3] > 0  # retreats
    for name in ("Rprop, retreat=False", "LBFGS"):
        _, worst, _, retreats, _, nans = fits[name]
        assert 0.4 < worst < 1.2, output  # that of the best weights, not NaN
        assert nans > 0 == retreats, output
    assert is_png(tmp_path / "gaussian_process.png")
    assert "--starts must be at least 1, got 0" in run(tmp_path, program, "--starts", "0", fails=True)


def test_multistart_finds_frequencies(tmp_path):
    program = ROOT / "examples" / "multistart.py"
    output = run(tmp_path, program)
    rows = re.findall(r"^(Rprop|LBFGS, all).* 64 +[\d.]+ +([\d.]+) +([\d.]+)$", output, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["Rprop", "LBFGS, all"], output
    (best, median), (_, median_of_lbfgs) = ([float(number) for number in row[1:]] for row in rows)
    assert best < 0.09 < 0.6 * median, output  # the noise has variance 0.09
    assert median < 1.1 * median_of_lbfgs, output
    frequencies = re.search(r"^frequencies.*: (\S+), (\S+)$", output, flags=re.MULTILINE).groups()
    assert all(abs(float(f) - true) < 0.05 for f, true in zip(frequencies, (20, 27), strict=True)), output
    in_time = re.search(r"^LBFGS, in the same time +(\d+) ", output, flags=re.MULTILINE)
    assert int(in_time[1]) < 64, output
    assert is_png(tmp_path / "multistart.png")
    assert "--starts must be at least 2, got 1" in run(tmp_path, program, "--starts", "1", fails=True)


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


def test_fabric_example_learns_and_saves_plot(tmp_path):
    output = run(tmp_path, ROOT / "examples" / "fabric.py")
    losses = [float(loss) for loss in re.findall(r"^step \d+, loss (\S+)$", output, flags=re.MULTILINE)]
    assert len(losses) == 7
    assert losses[-1] < 1e-3 < 0.1 < losses[0]  # it reaches 1e-4
    assert is_png(tmp_path / "fabric.png")


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
