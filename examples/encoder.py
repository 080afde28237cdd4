"""The encoder problems of Riedmiller and Braun (1993) with all four variants of Rprop, from many starts at once.

An n-h-n encoder reproduces each of n one-hot patterns through h hidden logistic units. It is solved when every output
is below 0.4 for a 0 and above 0.6 for a 1. The result is the number of epochs until then; an epoch is one step over
all patterns. All starts are members of one Stacked, which train as in separate runs.

    python examples/encoder.py
    python examples/encoder.py --starts 30 --epochs 500
"""

import argparse
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_rprop import Rprop, Stacked


class Setting(NamedTuple):
    """A problem, the arguments of Rprop, and the paper's mean number of epochs.

    The paper's numbers for its standard parameters (30, 367) and its best ones (19, 322) are quoted from memory and
    unchecked. They are means of a few starts, and the range of their initial weights is unknown.
    """

    n: int
    hidden: int
    lr: float
    largest: float
    paper: int

    def __str__(self) -> str:
        return f"{self.n}-{self.hidden}-{self.n}, lr {self.lr:g}, largest step {self.largest:g}"


SETTINGS = (
    Setting(10, 5, 0.1, 50, 30),
    Setting(10, 5, 1.0, 50, 19),
    Setting(12, 2, 0.1, 50, 367),
    Setting(12, 2, 0.1, 1, 367),
    Setting(12, 2, 1.0, 1, 322),
)
VARIANTS = ("rprop+", "rprop-", "irprop+", "irprop-")


def encoder(n: int, hidden: int) -> nn.Module:
    """Build a network with weights from U(-1, 1)."""
    net = nn.Sequential(nn.Linear(n, hidden), nn.Sigmoid(), nn.Linear(hidden, n), nn.Sigmoid()).double()
    for param in net.parameters():
        nn.init.uniform_(param, -1, 1)
    return net


def train(setting: Setting, variant: str, starts: int, epochs: int) -> Tensor:
    """Train all starts and return the epoch at which each was solved ``(starts,)``, infinite if it was not."""
    torch.manual_seed(0)
    model = Stacked(lambda: encoder(setting.n, setting.hidden), starts)
    optimizer = Rprop(model.parameters(), lr=setting.lr, step_sizes=(1e-6, setting.largest), variant=variant)
    patterns = torch.eye(setting.n, dtype=torch.float64)
    solved_at = torch.full((starts,), torch.inf)
    for epoch in range(epochs + 1):
        optimizer.zero_grad()
        errors = model(patterns) - patterns  # (starts, n, n)
        solved = (errors.abs() < 0.4).all(dim=2).all(dim=1)
        solved_at[solved & solved_at.isinf()] = epoch
        if solved_at.isfinite().all():
            break
        losses = 0.5 * errors.square().sum(dim=(1, 2))
        losses.sum().backward()  # each member gets the gradient of its own loss
        optimizer.step(loss=losses)  # irprop+ compares each member's loss with its last one
    return solved_at


def plot(results: dict[Setting, dict[str, Tensor]], path: str) -> None:
    """Plot the share of solved starts over the epochs, with a panel for each setting."""
    fig = Figure(figsize=(11, 2.8), layout="constrained")
    for (setting, row), axes in zip(results.items(), fig.subplots(1, len(results), sharey=True), strict=True):
        for variant, solved_at in row.items():
            axes.ecdf(solved_at.clamp(max=1e9), label=variant)
        axes.axvline(setting.paper, color="0.5", linestyle=":", label="mean in the paper")
        axes.set(xscale="log", xlim=(5, 2000), xlabel="epochs")
        axes.set_title(str(setting), fontsize=9)
    fig.axes[0].set_ylabel("share of starts solved")
    fig.axes[2].legend(loc="upper left", fontsize="small")
    fig.savefig(path, dpi=100)


def main() -> None:
    """Print a table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=100, help="number of starts (default: 100)")
    parser.add_argument("--epochs", type=int, default=2000, help="maximum of a run (default: 2000)")
    arguments = parser.parse_args()
    if arguments.starts < 1 or arguments.epochs < 1:
        parser.error(f"--starts and --epochs must be at least 1, got {arguments.starts} and {arguments.epochs}")

    torch.set_num_threads(1)  # more do not speed up such small networks
    results: dict[Setting, dict[str, Tensor]] = {}
    print(f"{'problem':<34}{'variant':<9}{'median epochs':>14}{'solved':>10}{'paper':>7}  within 20 %")
    for setting in SETTINGS:
        results[setting] = {}
        for variant in VARIANTS:
            solved_at = results[setting][variant] = train(setting, variant, arguments.starts, arguments.epochs)
            median, solved = solved_at.median().item(), f"{int(solved_at.isfinite().sum())}/{arguments.starts}"
            again = "yes" if abs(median / setting.paper - 1) <= 0.2 else "no"
            print(f"{setting!s:<34}{variant:<9}{median:>14.0f}{solved:>10}{setting.paper:>7}  {again}", flush=True)
    plot(results, "encoder.png")
    print("plot saved to encoder.png")


if __name__ == "__main__":
    main()
