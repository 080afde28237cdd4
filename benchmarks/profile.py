"""Performance profiles (Dolan and Moré 2002) of Rprop and other optimizers over full-batch problems.

Every solver minimizes every problem from the same starts and with the same number of evaluations of loss and gradient,
one solver after the other for each start, on one thread. A start is solved at the first evaluation with

    f <= f_best + target * (f_start - f_best),

where f_best is the lowest loss that any run reached from this start, or a lower one that is known to be reachable
(enzyme-raw: from the noise of the data). A profile is the share of starts that a solver solves within a factor of the
cost of the best solver, by evaluations and by wall-clock.

"Adam tuned" and "SGD tuned" have the best of five rates for each problem and target (most starts solved, then fewest
evaluations); the cost of this search is not counted. Adam and SGD use torch's fused kernels. All variants of Rprop have
default arguments. LBFGS has the strong Wolfe line search; "Rprop, LBFGS" spends the first tenth on iRprop-.

    python -m benchmarks.profile
    python -m benchmarks.profile --json profile.json --picture profile.png
    python -m benchmarks.profile --read profile.json --target 1e-6 --picture profile.png
    python -m benchmarks.profile --only digits,gp --seeds 1 --evaluations 200
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.problems import add_only
from benchmarks.report import machine, print_table, write_json
from benchmarks.solvers import RUNS, SOLVERS, Record, run
from benchmarks.suite import CASES
from benchmarks.suite.case import Case

TARGETS = {"1e-3": 1e-3, "1e-6": 1e-6}
FACTORS = (1, 2, 5, 10, 100)
COUNTS, TIMES = "evaluations to target", "seconds to target"
Results = dict[str, Any]  # the contents of the file of --json

# Colors of Okabe and Ito, which color-blind readers can tell apart
RPROP, LBFGS, ADAM, SGD = "#d55e00", "#0072b2", "#009e73", "#000000"
LINES = {
    "irprop-": {"color": RPROP, "linewidth": 2.6, "zorder": 3},
    "irprop+": {"color": RPROP, "linestyle": "--"},
    "rprop-": {"color": RPROP, "linestyle": ":"},
    "rprop+": {"color": RPROP, "linestyle": "-."},
    "Adam tuned": {"color": ADAM, "linewidth": 2},
    "Adam": {"color": ADAM, "linestyle": "--", "linewidth": 1.6},
    "NAdam": {"color": ADAM, "linestyle": ":"},
    "SGD tuned": {"color": SGD, "linewidth": 2},
    "LBFGS": {"color": LBFGS, "linewidth": 2},
    "LBFGS 50": {"color": LBFGS, "linestyle": "--"},
    "Rprop, LBFGS": {"color": "#cc79a7", "linewidth": 1.6},
}


def instance(case: Case, seed: int, budget: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run every solver from one start, and return the start and the runs."""
    records: dict[str, Record] = {}
    for name in RUNS:
        torch.manual_seed(seed)
        records[name] = run(name, case.start(), budget)
    by = min(records, key=lambda each: records[each].best)
    first, best = records[by].first, records[by].best
    if case.known < best:
        by, best = "nobody", case.known
    runs = []
    for name, record in records.items():
        counts, times = zip(*(record.reach(best + target * (first - best)) for target in TARGETS.values()), strict=True)
        kept = {key: getattr(record, key) for key in ("best", "evaluations", "seconds", "not_finite", "error")}
        runs.append({"seed": seed, "run": name, **kept, COUNTS: counts, TIMES: times})
    return {"seed": seed, "start": first, "best": best, "by": by}, runs


def measure(cases: dict[str, Case], seeds: int, budget: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of each problem."""
    for name, case in cases.items():
        params, _ = case.start()
        about = {"kind": case.kind, "about": case.about, "dtype": str(params[0].dtype).removeprefix("torch.")}
        found = {**about, "parameters": sum(p.numel() for p in params), "starts": [], "runs": []}
        for each in RUNS:
            run(each, case.start(), 15)  # loads or compiles the kernels
        for seed in range(seeds):
            start, runs = instance(case, seed, budget)
            found["starts"].append(start)
            found["runs"] += runs
            losses = f"loss {start['start']:.4g} -> {start['best']:.4g} by {start['by']}"
            seconds = sum(each["seconds"] for each in runs)
            print(f"{name} {seed}: {losses}, {seconds:.0f} s", file=sys.stderr, flush=True)
        yield name, found


def best_runs(found: dict[str, Any], names: list[str], target: int) -> list[dict[str, Any]]:
    """Return the runs from each start with the best of several rates: most starts solved, then fewest evaluations."""

    def rank(runs: list[dict[str, Any]]) -> tuple[int, int]:
        counts = [each[COUNTS][target] for each in runs if each[COUNTS][target]]
        return -len(counts), sum(counts)

    return min(([each for each in found["runs"] if each["run"] == name] for name in names), key=rank)


def costs(found: dict[str, Any], names: list[str], target: int, unit: str) -> list[float]:
    """Return the cost of each start of a problem, infinite where it is not solved."""
    return [each[unit][target] or math.inf for each in best_runs(found, names, target)]


def table(problems: dict[str, Any], target: int, unit: str) -> list[list[float]]:
    """Return the costs of all starts, one row for each start and one column for each solver."""
    return [
        list(row)
        for found in problems.values()
        for row in zip(*(costs(found, names, target, unit) for names in SOLVERS.values()), strict=True)
    ]


def profile(rows: list[list[float]], factor: float) -> list[float]:
    """Return the share of rows in which each column is finite and at most ``factor`` times the least of its row."""
    within = [[math.isfinite(cost) and cost <= factor * min(row) for cost in row] for row in rows]
    return [statistics.mean(column) for column in zip(*within, strict=True)]


def report(results: Results) -> None:
    """Print the machine and the tables."""
    problems = results["problems"]
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    print(f"{results['seeds']} starts of each problem, {results['budget']} evaluations")
    about = ("kind", "about", "dtype", "parameters")
    print_table(["problem", *about], [[name, *(str(found[key]) for key in about)] for name, found in problems.items()])
    for target, label in enumerate(TARGETS):
        print(f"\nMedian evaluations to {label} (solved starts, if not all)")
        print_table(["problem", *SOLVERS], [problem_row(name, found, target) for name, found in problems.items()])
    for target, label in enumerate(TARGETS):
        tables = [table(problems, target, unit) for unit in (COUNTS, TIMES)]
        shares = [profile(rows, factor) for rows in tables for factor in FACTORS]
        print(f"\nStarts in % solved to {label} within a factor of the best solver")
        head = ["solver", *(f"{unit} {factor}x" for unit in ("evaluations", "seconds") for factor in FACTORS)]
        rows = zip(*shares, strict=True)
        print_table(head, [[n, *(f"{100 * x:.0f}" for x in row)] for n, row in zip(SOLVERS, rows, strict=True)])
    print("\nFailures, of the best rate for the first target")
    head = ["solver", *(f"solved to {label}" for label in TARGETS), "runs with NaN or inf", "exceptions", "ms"]
    print_table(head, [failure_row(name, problems) for name in SOLVERS])
    print("\nms: median time of an evaluation, with the optimizer's own work")


def problem_row(name: str, found: dict[str, Any], target: int) -> list[str]:
    """Return the median evaluations of each solver, in bold where they are the fewest."""
    columns = [costs(found, names, target, COUNTS) for names in SOLVERS.values()]
    medians = [statistics.median(column) for column in columns]
    cells = []
    for column, median in zip(columns, medians, strict=True):
        solved = sum(map(math.isfinite, column))
        cell = f"**{median:.0f}**" if median == min(medians) else f"{median:.0f}"
        cell += f" ({solved}/{len(column)})" if solved < len(column) else ""
        cells.append(cell if math.isfinite(median) else "-")
    return [name, *cells]


def failure_row(solver: str, problems: dict[str, Any]) -> list[str]:
    """Return the number of starts solved, the numbers of failures, and the time of an evaluation."""
    solved = [
        sum(sum(map(math.isfinite, costs(found, SOLVERS[solver], target, COUNTS))) for found in problems.values())
        for target in range(len(TARGETS))
    ]
    runs = [each for found in problems.values() for each in best_runs(found, SOLVERS[solver], 0)]
    failures = [sum(bool(each[key]) for each in runs) for key in ("not_finite", "error")]
    milliseconds = statistics.median(1e3 * each["seconds"] / each["evaluations"] for each in runs)
    return [solver, *map(str, solved + failures), f"{milliseconds:.2f}"]


def plot(problems: dict[str, Any], label: str, path: Path) -> None:
    """Plot the profiles for one target, by evaluations and by seconds."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.3, 4.5), layout="constrained")
    panels = fig.subplots(1, 2, sharey=True)
    factors = [10 ** (i / 100) for i in range(201)]
    starts = sum(len(found["starts"]) for found in problems.values())
    for axes, unit, about in zip(panels, (COUNTS, TIMES), ("evaluations", "wall-clock"), strict=True):
        rows = table(problems, [*TARGETS].index(label), unit)
        curves = zip(*(profile(rows, factor) for factor in factors), strict=True)
        for name, curve in zip(SOLVERS, curves, strict=True):
            axes.plot(factors, curve, label=name, drawstyle="steps-post", **{"linewidth": 1, **LINES[name]})
        axes.set(xscale="log", xlim=(1, 100), ylim=(0, 1), title=f"solved to {label}, by {about}")
        axes.set_xlabel("cost at most this factor times the best solver's")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"share of {starts} starts")
    handles = dict(zip(SOLVERS, panels[0].get_lines(), strict=True))
    fig.legend(handles=[handles[name] for name in LINES], loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(path, dpi=200)


def main() -> None:
    """Run the solvers, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="starts of each problem (default: 5)")
    parser.add_argument("--evaluations", type=int, default=2000, help="evaluations of a run (default: 2000)")
    add_only(parser, CASES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file after each problem")
    parser.add_argument("--read", type=Path, metavar="FILE", help="read the results from a file of --json; run nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the profiles for one target")
    parser.add_argument("--target", choices=TARGETS, default="1e-3", help="target of the picture (default: 1e-3)")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.evaluations < 1:
        parser.error("--seeds and --evaluations must be >= 1")
    if arguments.read and not arguments.read.is_file():
        parser.error(f"--read: there is no file {arguments.read}")
    if arguments.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install 'lightning-rprop[plot]'")

    if arguments.read:
        results = json.loads(arguments.read.read_text())
    else:
        torch.set_num_threads(1)
        options = {"seeds": arguments.seeds, "budget": arguments.evaluations, "targets": TARGETS}
        results = {"machine": machine([]), **options, "problems": {}}
        try:
            for name, found in measure(arguments.only, arguments.seeds, arguments.evaluations):
                results["problems"][name] = found
                if arguments.json:
                    write_json(arguments.json, results)
        except KeyboardInterrupt:
            print("interrupted: the results are those of the finished problems", file=sys.stderr)
    if not results["problems"]:
        sys.exit("no problem is finished")
    report(results)
    if arguments.picture:
        plot(results["problems"], arguments.target, arguments.picture)


if __name__ == "__main__":
    main()
