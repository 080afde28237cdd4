"""``python -m benchmarks.gpu``, as far as it runs without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from lightning_rprop.optim._foreach import update_foreach

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_benchmark_needs_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr
    assert not [*tmp_path.iterdir()]


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.parametrize("x", [3, 4])
def test_skipped(x): pytest.skip("not here")
@pytest.fixture
def broken(): raise OSError("no device today")
def test_broken(broken): pass
"""


def test_gpu_test_results_are_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unimportable.py").write_text("import nothing_of_this_name")
    results = gpu.run_tests(str(tmp_path), f"--rootdir={tmp_path}", "-p", "no:cacheprovider")
    failures = results.pop("failures")
    assert results == {"exit_code": 1, "passed": 1, "failed": 3, "skipped": 2}
    assert [*failures] == ["::test_unimportable", "test_some::test_bad", "test_some::test_broken"]
    assert "assert 1 == 2" in failures["test_some::test_bad"]


def test_unusable_pytest_is_reported():
    assert gpu.run_tests("--no-such-option") == {
        "exit_code": 4, "passed": 0, "failed": 0, "skipped": 0, "failures": {},
    }  # fmt: skip


def test_each_dtype_is_checked_and_timed():
    def failing(*_):
        raise OSError("no device today")

    good, bad = [], []
    for result in gpu.run_checks({"foreach": update_foreach, "failing": failing}, torch.device("cpu")):
        (bad if result["error"] else good).append(result)
    assert [result["dtype"] for result in good] == [result["dtype"] for result in bad]
    assert [result["dtype"] for result in good] == ["float64", "float32", "float16", "bfloat16"]
    assert all(len(result["seconds"]) == 2 for result in good)
    assert all(result["error"] == "OSError('no device today')" for result in bad)


@pytest.mark.parametrize("failing", [None, "run_tests", "run_checks", "run_steps"])
def test_gpu_report_is_complete_despite_failures(failing, tmp_path, monkeypatch):
    def results(name):
        return [{"error": "wrong" if failing == name else ""}]

    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(file)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu, "run_tests", lambda *_: {"exit_code": int(failing == "run_tests")})
    for name in ("run_checks", "run_steps"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name: results(name))
    assert gpu.main() == (1 if failing else 0)
    assert [*tmp_path.iterdir()] == [file]
    assert json.loads(file.read_text()) == {
        "machine": {"gpu": "none"},
        "tests": {"exit_code": int(failing == "run_tests")},
        "checks": results("run_checks"),
        "steps": results("run_steps"),
    }
