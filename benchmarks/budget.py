"""The best loss after a fixed time of training, on problems that use the whole data set at each step.

Every optimizer runs each problem from the same starts, and the optimizers take turns. Rprop has its usual parameters,
Adam the best of three learning rates for each problem, and LBFGS the strong Wolfe line search. The table shows the
median over the starts, and in brackets the number of evaluations of loss and gradient.

    python -m benchmarks.budget
    python -m benchmarks.budget --seconds 5 --starts 11 --only digits,gp
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.problems import Problem, add_only
from lightning_rprop import Rprop

ADAM_RATES = (1e-3, 1e-2, 1e-1)
OPTIMIZERS: dict[str, Callable[[list[Tensor], Problem], torch.optim.Optimizer]] = {
    "lightning_rprop": lambda params, problem: Rprop(params, lr=problem.lr),
    "torch Rprop": lambda params, problem: torch.optim.Rprop(params, lr=problem.lr),
    **{
        f"torch Adam, lr {rate:g}": lambda params, problem, rate=rate: torch.optim.Adam(params, lr=rate)
        for rate in ADAM_RATES
    },
    "torch LBFGS": lambda params, problem: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"),
}


def train(problem: Problem, name: str, seed: int, seconds: float) -> tuple[float, int]:
    """Train for some time, and return the best loss and the number of evaluations."""
    torch.manual_seed(seed)
    params, loss_function = problem.start()
    optimizer = OPTIMIZERS[name](params, problem)
    losses = [math.inf]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_function()
        loss.backward()
        losses.append(loss.item())
        return loss

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        optimizer.step(closure)
        if not math.isfinite(losses[-1]):
            break  # it cannot recover
    return min(loss for loss in losses if not math.isnan(loss)), len(losses) - 1


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1, help="duration of each training run (default: 1)")
    parser.add_argument("--starts", type=int, default=3, help="number of starts of each problem (default: 3)")
    add_only(parser)
    arguments = parser.parse_args()
    if arguments.starts < 1:
        parser.error(f"--starts: must be at least 1, got {arguments.starts}")

    shown = [name for name in OPTIMIZERS if "Adam" not in name]
    shown.insert(2, "torch Adam, best rate")
    print(f"| problem | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}")
    for problem in arguments.only.values():
        results: dict[str, list[tuple[float, int]]] = {name: [] for name in OPTIMIZERS}
        for name in OPTIMIZERS:
            train(problem, name, 0, 0.05)  # loads or compiles the kernels
        for seed in range(arguments.starts):
            for name, found in results.items():
                found.append(train(problem, name, seed, arguments.seconds))
        medians = {
            name: (statistics.median(loss for loss, _ in found), statistics.median(count for _, count in found))
            for name, found in results.items()
        }
        medians[shown[2]] = min(median for name, median in medians.items() if "Adam" in name)
        cells = [f"{medians[name][0]:.3g} ({medians[name][1]:.0f})" for name in shown]
        print(f"| {problem.about} | {' | '.join(cells)} |", flush=True)
    about = f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"\n{arguments.seconds:g} s for each training run; {about}")


if __name__ == "__main__":
    main()
