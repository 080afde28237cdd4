"""Two damped oscillations in noise from 64 starts: stacked into one model, and with LBFGS one after another.

The loss has a local optimum for nearly every wrong frequency, so a single start rarely finds the right ones. All starts
are members of one Stacked and train together, each judged by its own loss, until all have converged. LBFGS then fits
the same starts. The table shows the runs that it completes in the time of the stacked fit, and all of them. "Median" is
what a single start ends with.

    python examples/multistart.py
    python examples/multistart.py --starts 16 --seed 1
"""

import argparse
import time
from itertools import accumulate

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_rprop import BestWeights, Convergence, Rprop, Stacked


class Oscillations(nn.Module):
    """A sum of two damped oscillations with random frequencies, for measurements ``(n,)`` at times ``(n,)``."""

    def __init__(self, t: Tensor, y: Tensor) -> None:
        super().__init__()
        self.t, self.y = t.unsqueeze(1), y
        self.amplitude = nn.Parameter(torch.ones(2))
        self.log_damping = nn.Parameter(torch.full((2,), 0.1).log())
        self.frequency = nn.Parameter(60 * torch.rand(2))
        self.phase = nn.Parameter(torch.zeros(2))

    def forward(self) -> Tensor:
        """Return the mean squared error."""
        envelope = self.amplitude * torch.exp(-self.log_damping.exp() * self.t)
        return ((envelope * torch.cos(self.frequency * self.t + self.phase)).sum(dim=1) - self.y).square().mean()


def fit(model: nn.Module, optimizer: Optimizer, patience: int, steps: int) -> tuple[Tensor, Tensor, float]:
    """Fit and restore the best weights; return the lowest loss (of each member), all losses, and the seconds."""
    best, convergence = BestWeights(model), Convergence(tolerance_change=1e-6, patience=patience)
    history = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = model()  # one for each member of a Stacked
        loss.sum().backward()  # each member gets the gradient of its own loss
        best.update(loss)
        history.append(loss.detach())
        return loss

    start = time.process_time()  # other programs do not count
    for _ in range(steps):
        loss = optimizer.step(evaluate)
        if convergence.update(loss, optimizer):
            break
    best.restore()
    return torch.as_tensor(best.loss), torch.stack(history), time.process_time() - start


def report(name: str, lowest: Tensor, seconds: float) -> None:
    """Print a line of the table for runs that ended with these losses ``(n,)``."""
    best, middle = torch.cat([lowest, torch.tensor([torch.nan])]).nanquantile(torch.tensor([0, 0.5]))
    print(f"{name:<25}{len(lowest):>6}{seconds:>9.2f}{best:>9.4f}{middle:>9.4f}", flush=True)


def main() -> None:
    """Fit all starts both ways, print a table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=64, help="number of starts (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the starts (default: 0)")
    arguments = parser.parse_args()
    if arguments.starts < 2:
        parser.error(f"--starts must be at least 2, got {arguments.starts}")

    torch.set_num_threads(1)  # more do not speed up such a small problem
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(arguments.seed)
    t = torch.linspace(0, 20, 400)
    y = torch.exp(-0.1 * t) * torch.cos(20 * t + 0.8) + torch.exp(-0.15 * t) * torch.cos(27 * t + 1.8)
    y += 0.3 * torch.randn(400)
    model = Stacked(lambda: Oscillations(t, y), arguments.starts)
    separate = [model.member(i) for i in range(arguments.starts)]

    print(f"{'':<25}{'runs':>6}{'seconds':>9}{'best':>9}{'median':>9}")
    stacked, history, seconds = fit(model, Rprop(model.parameters(), lr=0.1), patience=10, steps=500)
    report("Rprop, stacked", stacked, seconds)
    solvers = [LBFGS(each.parameters(), line_search_fn="strong_wolfe") for each in separate]
    # a step of LBFGS has up to 20 iterations
    runs = [fit(*pair, patience=1, steps=25) for pair in zip(separate, solvers, strict=True)]
    lowest, ends = torch.stack([run[0] for run in runs]), torch.tensor([*accumulate(run[2] for run in runs)])
    report("LBFGS, in the same time", lowest[ends <= seconds], seconds)
    report("LBFGS, all starts", lowest, ends[-1])
    winner = stacked.argmin()
    frequencies = model.member(winner).frequency.abs().sort().values.tolist()
    print("frequencies of the best member: {:.2f}, {:.2f}".format(*frequencies))

    fig = Figure(figsize=(10, 4), layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=[1.6, 1])
    clock = torch.linspace(0, seconds, len(history) + 1)[1:]
    left.plot(clock, history, color="C0", linewidth=0.5, alpha=0.3)
    left.plot(clock, history[:, winner], color="C0", linewidth=2, label="Rprop, stacked: the best member")
    left.plot(ends, lowest, "x", color="C1", label="LBFGS: end of a run")
    left.set(xscale="log", xlabel="seconds", ylabel="loss", ylim=(0.05, 0.4))
    left.legend()
    for name, losses in (("Rprop", stacked), ("LBFGS", lowest)):
        right.plot(range(1, len(losses) + 1), losses.sort().values, ".", label=name)
    right.set(xlabel="starts, sorted", title="lowest loss of each start")
    right.legend()
    fig.savefig("multistart.png", dpi=100)
    print("plot saved to multistart.png")


if __name__ == "__main__":
    main()
