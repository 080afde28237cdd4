"""The performance profiles count evaluations correctly and compare every solver."""

import json
import math
import re
from pathlib import Path

import torch
from pictures import is_png
from programs import run

from benchmarks.problems import PROBLEMS
from benchmarks.profile import COUNTS, TARGETS, TIMES, costs, instance, problem_row, profile, table
from benchmarks.solvers import NOT_FINITE, RUNS, SOLVERS
from benchmarks.solvers import run as minimize
from benchmarks.suite import CASES
from benchmarks.suite.case import Case
from lightning_rprop import Rprop

ROOT = Path(__file__).parents[2]
INF = math.inf


def runs(name, *counts):
    return [{"run": name, COUNTS: [count], TIMES: [count and 2 * count]} for count in counts]


def test_profile_matches_hand_computed_shares():
    rows = [[10, 20, INF], [30, 30, 90], [INF, 8, 4], [INF, INF, INF]]
    expected = {
        1: [2 / 4, 1 / 4, 1 / 4],
        1.99: [2 / 4, 1 / 4, 1 / 4],
        2: [2 / 4, 3 / 4, 1 / 4],
        3: [2 / 4, 3 / 4, 2 / 4],
    }
    for factor, shares in expected.items():
        assert profile(rows, factor) == shares, factor


def test_tuned_rate_solves_most_starts(monkeypatch):
    found = {"runs": runs("a", 5, None, 5) + runs("b", 90, 80, 70) + runs("c", 60, 70, 90) + runs("d", None, None, 3)}
    assert costs(found, ["a", "b", "c", "d"], 0, COUNTS) == [60, 70, 90]
    assert costs(found, ["a", "d"], 0, TIMES) == [10, INF, 10]
    monkeypatch.setattr("benchmarks.profile.SOLVERS", {"tuned": ["a", "b"], "one": ["d"], "other": ["a"]})
    assert table({"problem": found}, 0, COUNTS) == [[90, INF, 5], [80, INF, INF], [70, 3, 5]]
    assert problem_row("problem", found, 0) == ["problem", "80", "-", "**5** (2/3)"]


def test_run_counts_evaluations_and_failures():
    budget = 30
    for name in RUNS:
        torch.manual_seed(0)
        record = minimize(name, PROBLEMS["ellipsoid"].start(), budget)
        assert (record.error, record.not_finite) == (None, 0), name
        assert 10 < record.evaluations <= budget, name
        counts, seconds, losses = zip(*record.improvements, strict=True)
        assert record.reach(losses[-1]) == (counts[-1], seconds[-1]), name
        assert record.reach(losses[-1] / 2) == (None, None), name
        assert list(seconds) == sorted(seconds), name
        assert 0 < seconds[-1] < record.seconds, name

        w = torch.ones(3, requires_grad=True)
        assert minimize(name, ([w], lambda w=w: w.sum() * math.nan), budget).not_finite == NOT_FINITE, name
        assert minimize(name, ([w], lambda w=w: w.reshape(7).sum()), budget).error == "RuntimeError", name


def test_run_follows_plain_loop():
    torch.manual_seed(0)
    (w,), loss_function = PROBLEMS["rotated"].start()
    optimizer, losses = Rprop([w]), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_function()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(loss=loss)
    torch.manual_seed(0)
    record = minimize("irprop-", PROBLEMS["rotated"].start(), 30)
    assert all(losses[count - 1] == loss for count, _, loss in record.improvements)
    assert record.best == min(losses)


def test_lbfgs_stops_when_it_no_longer_moves():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    record = minimize("LBFGS", ([w], lambda: w.square().sum()), 1000)
    assert record.best < 1e-12
    assert record.evaluations < 10


def test_known_loss_lowers_the_target():
    case = Case("", "", PROBLEMS["ellipsoid"].start)
    start, runs = instance(case, 0, 20)
    assert start["by"] in RUNS
    assert sum(each[COUNTS][0] is not None for each in runs) > 0
    start, runs = instance(case._replace(known=-1.0), 0, 20)
    assert (start["best"], start["by"]) == (-1, "nobody")
    assert all(each[unit] == (None, None) for each in runs for unit in (COUNTS, TIMES))


def test_profile_benchmark_compares_every_solver(tmp_path):
    file, picture = tmp_path / "profile.json", tmp_path / "profile.png"
    options = ("--only", "iris,registration", "--seeds", "1", "--evaluations", "40")
    output = run(ROOT, "-m", "benchmarks.profile", *options, "--json", file)
    results = json.loads(file.read_text())
    assert list(results["problems"]) == ["iris", "registration"]
    for found in results["problems"].values():
        assert [each["run"] for each in found["runs"]] == list(RUNS)
        (start,) = found["starts"]
        assert start["best"] == min(each["best"] for each in found["runs"]) < start["start"]
        for target, value in enumerate(TARGETS.values()):
            for each in found["runs"]:
                reached = each["best"] <= start["best"] + value * (start["start"] - start["best"])
                assert (each[COUNTS][target] is not None) == reached
    for row in table(results["problems"], 0, TIMES):
        assert any(profile([row], 1))  # the best solver has ratio 1
    names = re.findall(r"^\| ([^|]+) \| \d+ \| \d+ \| \d+ \| \d+ \| [\d.]+ \|$", output, flags=re.MULTILINE)
    assert names == list(SOLVERS)

    assert run(ROOT, "-m", "benchmarks.profile", "--read", file, "--picture", picture) == output
    assert is_png(picture)
    assert "--read: there is no file" in run(ROOT, "-m", "benchmarks.profile", "--read", tmp_path / "no", fails=True)
    assert "no problem foo; there are digits" in run(ROOT, "-m", "benchmarks.profile", "--only", "foo", fails=True)


def test_problems_depend_on_seed_only():
    assert len(CASES) >= 24
    for name, case in CASES.items():
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            params, loss_function = case.start()
            loss = loss_function()
            loss.backward()
            losses.append(loss.item())
            assert all(p.grad.isfinite().all() for p in params), name
            assert len({p.dtype for p in params}) == 1, name
        assert math.isfinite(losses[0]), name
        assert losses[0] == losses[1] != losses[2], name
