"""The hyperparameters of an exact Gaussian process from several starts: Rprop in a plain loop, compared with LBFGS.

They are the relevance (inverse length scale) of each input, the signal variance and the noise variance. The loss is the
negative log marginal likelihood per sample. The data are scikit-learn's Friedman #1, where 5 of the 10 inputs matter.

A step can make the noise variance negative, and the loss NaN. Rprop takes that step back and converges. Without retreat
it mostly ends at NaN, and so does LBFGS. On logarithms no step can leave the domain, and LBFGS needs half of Rprop's
evaluations, but ends at a worse optimum from half the starts.

    python examples/gaussian_process.py
"""

import argparse
import math
from statistics import median

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import LBFGS, Optimizer

from lightning_rprop import BestWeights, Convergence, Rprop


class GaussianProcess(nn.Module):
    """A GP with a squared exponential kernel on inputs ``(n, d)`` and targets ``(n,)``."""

    def __init__(self, x: Tensor, y: Tensor, start: Tensor, log: bool) -> None:
        super().__init__()
        self.squares, self.eye = (x.unsqueeze(1) - x).square(), torch.eye(len(x), dtype=x.dtype)
        self.y, self.log = y.unsqueeze(1), log
        self.raw = nn.Parameter(start.log() if log else start.clone())

    def forward(self) -> Tensor:
        """Return the negative log marginal likelihood per sample, or NaN outside the domain."""
        values = self.raw.exp() if self.log else self.raw
        relevance, signal, noise = values[:-2], values[-2], values[-1]
        kernel = signal * torch.exp(-0.5 * (self.squares @ relevance.square()))
        factor, info = torch.linalg.cholesky_ex(kernel + noise * self.eye)
        factor = factor * torch.where((info == 0) & (noise > 0), 1.0, torch.nan)
        white = torch.linalg.solve_triangular(factor, self.y, upper=False)
        return 0.5 * white.square().mean() + factor.diagonal().log().mean() + 0.5 * math.log(2 * math.pi)


def fit(model: nn.Module, optimizer: Optimizer, patience: int) -> tuple[list[float], bool, int]:
    """Fit and restore the best weights; return all losses, whether the fit converged, and the number of retreats."""
    best, convergence = BestWeights(model), Convergence(tolerance_change=1e-6, patience=patience)
    losses: list[float] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        best.update(loss)
        losses.append(loss.item())
        return loss

    converged = False
    while not converged and len(losses) < 200:
        loss = optimizer.step(evaluate)  # Rprop takes its last step back if the loss is not finite
        converged = convergence.update(loss, optimizer)
    best.restore()
    return losses, converged, int(getattr(optimizer, "retreats", 0))


# Whether on logarithms, the optimizer, and the patience: a step of LBFGS has up to 20 iterations.
SOLVERS = {
    "Rprop": (False, lambda params: Rprop(params, lr=0.1), 10),
    "Rprop, retreat=False": (False, lambda params: Rprop(params, lr=0.1, retreat=False), 10),
    "LBFGS": (False, lambda params: LBFGS(params, line_search_fn="strong_wolfe"), 1),
    "Rprop, logarithms": (True, lambda params: Rprop(params, lr=0.1), 10),
    "LBFGS, logarithms": (True, lambda params: LBFGS(params, line_search_fn="strong_wolfe"), 1),
}


def main() -> None:
    """Fit with each solver from each start, print a table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10, help="number of starts (default: 10)")
    count = parser.parse_args().starts
    if count < 1:
        parser.error(f"--starts must be at least 1, got {count}")

    torch.set_num_threads(1)  # more do not speed up such small matrices
    data = map(torch.from_numpy, make_friedman1(500, noise=1.0, random_state=0))
    x, y = ((values[:100] - values.mean(dim=0)) / values.std(dim=0) for values in data)
    torch.manual_seed(0)
    typical = torch.tensor([0.2] * 10 + [1, 0.1], dtype=torch.float64)  # two samples are about sqrt(20) apart
    starts = [typical * (0.5 * torch.randn(12, dtype=torch.float64)).exp() for _ in range(count)]

    fig = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1.6, 1])
    print(f"{'':<22}{'median loss':>11}{'worst':>8}{'evaluations':>13}{'retreats':>10}{'converged':>11}{'NaN':>5}")
    curves = {}
    for name, (log, make, patience) in SOLVERS.items():
        gps = [GaussianProcess(x, y, start, log) for start in starts]
        fits = [fit(gp, make(gp.parameters()), patience) for gp in gps]
        losses, converged, retreats = zip(*fits, strict=True)
        lowest, evaluations = [gp().item() for gp in gps], median(map(len, losses))
        ends = f"{sum(retreats):>10}{sum(converged):>11}{sum(math.isnan(each[-1]) for each in losses):>5}"
        print(f"{name:<22}{median(lowest):>11.4f}{max(lowest):>8.4f}{evaluations:>13.0f}{ends}", flush=True)
        finite = pad_sequence([torch.tensor(each).nan_to_num(torch.inf) for each in losses], padding_value=torch.inf)
        curves[name] = finite.cummin(dim=0).values.quantile(0.5, dim=1)
        if name == "Rprop":
            right.plot(range(1, 11), torch.stack([gp.raw[:10].detach().abs() for gp in gps]).T, "o", color="C0")
    for name, curve in curves.items():
        left.plot((curve - min(map(min, curves.values()))).clamp(min=1e-6), label=name)
    left.set(xlabel="evaluations", yscale="log", title="lowest loss so far minus the lowest of all (medians)")
    left.legend()
    right.axvspan(0.5, 5.5, color="0.92", zorder=0)  # the inputs that matter
    right.set(xlabel="input", xticks=range(1, 11), title="relevances (gray: inputs that matter)")
    fig.savefig("gaussian_process.png", dpi=110)
    print("plot saved to gaussian_process.png")


if __name__ == "__main__":
    main()
