"""The programs beside the app: they run, and their numbers are right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from twin import twin

ROOT = Path(__file__).parent.parent


def run(folder, *command, fails=False):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import encoder

    return encoder


def test_encoder_prints_its_table_and_leaves_its_picture(tmp_path):
    output = run(tmp_path, str(ROOT / "examples" / "encoder.py"), "--starts", "30", "--only", "10-5-10")
    rows = re.findall(r"^10-5-10 +([\d.]+) +50  (\S+) +(\d+) +(\d+)/30 ", output, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [
        (lr, variant) for lr in ("0.1", "1") for variant in ("rprop+", "rprop-", "irprop+", "irprop-")
    ]
    # 99 % intervals of the median of 20 starts, measured by an independent program before this package existed
    assert all(21 <= int(median) <= 28 if lr == "0.1" else 14 <= int(median) <= 23 for lr, _, median, _ in rows)
    assert (tmp_path / "encoder.png").read_bytes().startswith(b"\x89PNG")
    assert "at least 1, got 0" in run(tmp_path, str(ROOT / "examples" / "encoder.py"), "--starts", "0", fails=True)


@pytest.mark.parametrize("variant", ["rprop+", "rprop-", "irprop+", "irprop-"])
def test_encoder_starts_do_not_disturb_each_other(variant, encoder):
    """One weight of one of several starts follows the scalar twin, fed with its gradients and its start's losses."""
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


def test_encoder_network_by_hand(encoder):
    torch.manual_seed(0)
    n, hidden = 4, 2
    w = torch.randn(3, 2 * n * hidden + hidden + n, dtype=torch.float64)
    first, second = w[:, :8].reshape(3, 4, 2), w[:, 8:16].reshape(3, 2, 4)
    bias, out_bias = w[:, 16:18], w[:, 18:22]
    inner = torch.sigmoid(torch.einsum("pi,sih->sph", torch.eye(4, dtype=torch.float64), first) + bias[:, None])
    expected = torch.sigmoid(torch.einsum("sph,sho->spo", inner, second) + out_bias[:, None])
    assert torch.allclose(encoder.outputs(w, n, hidden), expected, rtol=1e-14)  # another order of summation


def test_variants_benchmark_runs():
    output = run(ROOT, "-m", "benchmarks.variants", "--starts", "2", "--only", "ellipsoid,rotated")
    rows = [line.split("|")[3:7] for line in output.splitlines() if "axes" in line]
    medians = [[float(re.search(r"\d+", cell)[0]) for cell in row] for row in rows]
    assert len(medians) == 2
    assert min(medians[0]) == medians[0][1]  # parallel axes: rprop- is the fastest
    assert max(medians[1][2:]) < min(medians[1][:2])  # turned: both improved rules are
    assert "no problem foo; there are digits" in run(ROOT, "-m", "benchmarks.variants", "--only", "foo", fails=True)


def test_budget_benchmark_runs():
    output = run(ROOT, "-m", "benchmarks.budget", "--seconds", "0.1", "--starts", "1", "--only", "ellipsoid")
    _, *cells = re.search(r"^\| (ellipsoid.*) \|$", output, flags=re.MULTILINE)[1].split(" | ")
    assert len(cells) == 4
    assert all(float(cell.split()[0]) < 1 for cell in cells)
    assert "at least 1, got 0" in run(ROOT, "-m", "benchmarks.budget", "--starts", "0", fails=True)


def test_step_benchmark_prints_and_writes_its_table(tmp_path):
    file = tmp_path / "step.json"
    output = run(ROOT, "-m", "benchmarks.step", "--seconds", "0.1", "--only", "small,memory", "--json", str(file))
    figures = json.loads(file.read_text())
    rows = figures["rows"]
    assert [row["peer"] for row in rows[:3]] == ["torch Rprop for-loop", "torch Rprop foreach", "torch SGD fused"]
    assert len(rows) == 3 + 2
    for row in rows:
        assert f"| {row['case']} | {row['peer']} | {row['ours']:.4g} {row['unit']} | {row['theirs']:.4g} " in output
    assert rows[3]["ours"] < 0.1 < rows[4]["theirs"]  # bytes per parameter
    assert figures["machine"]["torch"] == torch.__version__
    assert "no case foo; there are resnet50" in run(ROOT, "-m", "benchmarks.step", "--only", "foo", fails=True)


def test_step_benchmark_counts_the_right_bytes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.step import CASES, bytes_moved

    assert bytes_moved(CASES["resnet50"]) == 7 * 4 * 25_557_032
    assert bytes_moved(CASES["gpt2"]) == 7 * 4 * 124_439_808
    assert bytes_moved(CASES["small"]) == 7 * 4 * 1_377
    assert bytes_moved(CASES["bfloat16"]) == 7 * 2 * 25_557_032


def test_pinn_learns_the_solution_and_leaves_its_picture(tmp_path):
    program = str(ROOT / "examples" / "pinn.py")
    output = run(
        tmp_path, program, "--seconds", "1.5", "--points", "12", "--micro-batch-size", "72", "--output", "p.png"
    )
    errors = dict(re.findall(r"^(Rprop|LBFGS|Adam, lr 1e-[23])\D.* ([\d.e+-]+)$", output, flags=re.MULTILINE))
    assert set(errors) == {"Rprop", "LBFGS", "Adam, lr 1e-2", "Adam, lr 1e-3"}
    assert float(errors["Rprop"]) < 0.5  # of the solution's norm; after some milliseconds already, where it has a core
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "--seconds must be > 0" in run(tmp_path, program, "--seconds", "0", fails=True)
