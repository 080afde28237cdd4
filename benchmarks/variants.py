"""Gradient evaluations to a target loss for each variant, on problems that use the whole data set at each step.

Every variant runs each problem from the same starts, with Rprop's usual parameters (lr 0.01, 0.1 for the Gaussian
process; etas 0.5 and 1.2; step sizes from 1e-6 to 50). The table shows the median over the starts, where an unsolved
one counts as infinite, and how many starts were solved within the cap.

    python -m benchmarks.variants
    python -m benchmarks.variants --starts 3 --only digits,gp
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time

import torch

from benchmarks.problems import Problem, add_only
from lightning_rprop import Rprop

VARIANTS = ("rprop+", "rprop-", "irprop+", "irprop-")


def evaluations(problem: Problem, variant: str, seed: int) -> tuple[float, float]:
    """Return the number of evaluations to the target (inf if the cap was reached), and the best loss."""
    torch.manual_seed(seed)
    params, loss_function = problem.start()
    optimizer = Rprop(params, lr=problem.lr, variant=variant)
    best = math.inf
    for count in range(1, problem.cap + 1):
        optimizer.zero_grad()
        loss = loss_function()
        best = min(best, loss.item())
        if best <= problem.target:
            return count, best
        loss.backward()
        optimizer.step(loss=loss)
    return math.inf, best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=11, help="number of starts of each problem (default: 11)")
    add_only(parser)
    parser.add_argument("--best", action="store_true", help="also print the median of the best losses")
    arguments = parser.parse_args()

    begin = time.perf_counter()
    print(f"| problem | target | {' | '.join(VARIANTS)} |\n|---|---|{'---|' * len(VARIANTS)}")
    for problem in arguments.only.values():
        cells = []
        for variant in VARIANTS:
            results = [evaluations(problem, variant, seed) for seed in range(arguments.starts)]
            middle = statistics.median(count for count, _ in results)
            solved = sum(math.isfinite(count) for count, _ in results)
            cell = f"{middle:.0f}" if math.isfinite(middle) else f">{problem.cap}"
            cell += f" ({solved}/{arguments.starts})"
            if arguments.best:
                cell += f" {statistics.median(best for _, best in results):.4g}"
            cells.append(cell)
        print(f"| {problem.about} | {problem.target:g} | {' | '.join(cells)} |", flush=True)
    threads, seconds = torch.get_num_threads(), time.perf_counter() - begin
    print(f"\nPython {platform.python_version()}, torch {torch.__version__}, {threads} threads, {seconds:.0f} s")


if __name__ == "__main__":
    main()
