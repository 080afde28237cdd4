"""The example app, run from the command line."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
import torch
from pictures import is_png
from programs import run

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "train.py"
HYDRA_1_3 = hydra.__version__.startswith("1.3.")  # Hydra 1.4 checks the length of a list itself


def train(folder, *overrides, **how):
    return run(folder, PROGRAM, *overrides, **how)


def table(output):
    """Return the rows of the result table at the end of the output."""
    lines = output[output.index("data set ") :].splitlines()
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def test_default_job_trains_logs_and_plots(tmp_path):
    output = train(tmp_path)
    assert "digits: train 1167, val 270, test 360 samples; 40 epochs of 10 full-batch steps" in output
    lines = re.findall(r"epoch +(\d+)/40  train loss [\d.]+ accuracy [\d.]+  val loss [\d.]+ accuracy [\d.]+", output)
    assert lines == [str(epoch) for epoch in range(4, 41, 4)]
    result = table(output)
    assert float(result["test accuracy"]) >= 0.95
    assert result["optimizer steps"] == "400"
    assert is_png(Path(result["picture"]))
    state = torch.load(result["checkpoint"], weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["etas"] == (0.5, 1.2)
    with (Path(result["logs"]) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["step_size/net.0.weight/median"]) for row in rows) == 40
    assert sum(bool(row["step_size/sign_changed"]) for row in rows) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.parametrize(("data", "score", "minimum"), [("breast_cancer", "accuracy", 0.9), ("diabetes", "R^2", 0.2)])
def test_other_real_data_reach_their_score(data, score, minimum, tmp_path):
    result = table(train(tmp_path, f"data={data}", "trainer.max_epochs=10"))
    assert result["data set"] == data
    assert float(result[f"test {score}"]) >= minimum


def test_generated_data_reach_their_score(tmp_path):
    result = table(train(tmp_path, "data=spirals", "seed=3"))
    assert float(result["test accuracy"]) >= 0.95


def test_split_is_seeded_and_stratified():
    code = """
import sys, torch
sys.path.insert(0, "examples")
from tabular.data import TabularData
a, b, c = (TabularData("breast_cancer", 0.15, 0.2, seed, 1).splits for seed in (0, 0, 1))
assert all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name]))
assert not torch.equal(a["train"][0], c["train"][0])
shares = [y.float().mean().item() for _, y in a.values()]
assert max(shares) - min(shares) < 0.01, shares
x = a["train"][0].double()
assert x.mean(0).abs().max() < 1e-6 and (x.var(0, correction=0) - 1).abs().max() < 1e-5
assert a["test"][0].mean(0).abs().max() > 1e-3  # standardized by the mean of the training samples
rows = torch.cat([x for x, _ in a.values()])
assert len(rows) == 569 == len(torch.unique(rows, dim=0))  # each sample is in exactly one split
target = TabularData("diabetes", 0.15, 0.2, 0, 1).splits["train"][1]
assert target.shape == (287, 1) or target.shape == (286, 1)
assert target.mean().abs() < 1e-6
"""
    run(ROOT, "-c", code)


def test_two_processes_match_one_process(tmp_path):
    checkpoints = []
    for trainer in ("cpu", "ddp_cpu"):
        (tmp_path / trainer).mkdir()
        train(tmp_path / trainer, f"trainer={trainer}", "data=diabetes", "optimizer.lr=0.05", "trainer.max_epochs=5")
        runs = list((tmp_path / trainer).glob("outputs/*/*"))
        assert len(runs) == 1
        checkpoints.append(torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    one, two = checkpoints
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_many_starts_test_the_best(tmp_path, monkeypatch):
    result = table(train(tmp_path, "starts=5", "data=diabetes", "trainer.max_epochs=8", "optimizer.lr=0.1"))
    weights = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
    monkeypatch.syspath_prepend(ROOT / "examples")
    from tabular.data import TabularData

    def score(split, i):
        x, y = TabularData("diabetes", 0.15, 0.2, 0, 1).splits[split]
        w, b, v, c = (weights[f"net.{name}"][i] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
        return float(1 - ((x @ w.T + b).tanh() @ v.T + c - y).square().mean() / y.var(correction=0))

    best = max(range(5), key=lambda i: score("val", i))
    assert result["best start"] == f"{best} of 5"
    assert float(result["validation R^2"]) == pytest.approx(score("val", best), abs=1e-4)  # printed with 4 decimals
    assert float(result["test R^2"]) == pytest.approx(score("test", best), abs=1e-4)
    assert best == weights["best"] != 0


def test_sweep_creates_one_folder_per_job(tmp_path):
    output = train(tmp_path, "-m", "optimizer.lr=0.01,0.1", "trainer.max_epochs=1")
    assert output.count("test accuracy") == 2
    assert len(list(tmp_path.glob("multirun/*/*/*/checkpoints/best.ckpt"))) == 2


def test_callbacks_and_logger_are_optional(tmp_path):
    result = table(train(tmp_path, "~callbacks", "~logger", "trainer.max_epochs=1"))
    assert result["picture"] == "none (no step sizes)"
    assert result["logs"] == "none"


@pytest.mark.parametrize("override", ["+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=0"])
def test_fewer_validations_are_allowed(override, tmp_path):
    result = table(train(tmp_path, "trainer.max_epochs=3", override))
    assert result["optimizer steps"] == ("0" if "max_epochs" in override else "30")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data=foo",
            "Could not find 'data/foo'\n\n"
            "Available options in 'data':\n\tbreast_cancer\n\tdefault\n\tdiabetes\n\tdigits\n",
        ),
        (
            "optimizer=foo",
            "Could not find 'optimizer/foo'\n\nAvailable options in 'optimizer':\n\tirprop_minus\n\tirprop_plus\n",
        ),
        ("optimizer.lr=-1", "ValueError: Invalid learning rate: -1.0. lr is the initial step size"),
        ("optimizer.etas=[1.2,0.5]", "ValueError: Invalid eta values: 1.2, 0.5. etas must be"),
        ("optimizer.step_sizes=[50,1e-6]", "ValueError: Invalid step sizes: 50.0, 1e-06. step_sizes must be"),
        ("optimizer.etas=[0.5]", "Invalid eta values: 0.5. etas must be" if HYDRA_1_3 else "full_key: optimizer.etas"),
        ("optimizer.lr=abc", "Value 'abc' of type 'str' could not be converted to Float"),
    ],
)
def test_bad_input_fails_before_training(override, message, tmp_path):
    assert message in train(tmp_path, override, fails=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_missing_scikit_learn_error_is_one_line(tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'sklearn' else find(name, *a)\n"
    )
    error = train(tmp_path, fails=True, environment={"PYTHONPATH": str(tmp_path / "hide")})
    assert error == "train.py needs sklearn: pip install 'lightning-rprop[examples]'\n"


def has_ended(group, seconds=20):
    """Return whether all processes of the group end within this time."""
    for _ in range(seconds * 10):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_ctrl_c_leaves_only_whole_checkpoints(trainer, tmp_path):
    command = [sys.executable, PROGRAM, f"trainer={trainer}", "trainer.max_epochs=1000000"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("outputs/*/*/checkpoints/last.ckpt")):
                assert time.monotonic() < deadline, "no checkpoint was written"
                time.sleep(0.2)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the job
            assert process.wait(timeout=20) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert has_ended(process.pid), "a process of the job still runs"
    checkpoints = list(tmp_path.glob("outputs/*/*/checkpoints/*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert torch.load(checkpoint, weights_only=True)["global_step"] > 0
