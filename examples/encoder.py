"""The encoder problems of Riedmiller and Braun (1993), with the four variants and many starts in parallel.

An n-h-n encoder reproduces each of n one-hot patterns through h hidden units (logistic units, half the squared error,
all patterns in one batch, float64, weights from U(-1, 1)). It is solved when every output meets the 40-20-40 criterion:
below 0.4 for a 0, above 0.6 for a 1. The result is the number of epochs, which are updates, until then.

All starts run as one model: one tensor with a row of weights for each start. Rprop treats each weight separately, so
the starts do not affect each other. Only iRprop+ uses a loss; the functional form of the optimizer takes a tensor that
says for each start whether its loss rose.

    python examples/encoder.py                                # all rows; writes encoder.png
    python examples/encoder.py --starts 100 --only 10-5-10
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rprop.optim import rprop

if importlib.util.find_spec("matplotlib") is None:
    sys.exit("encoder.py needs matplotlib: pip install 'lightning-rprop[examples]'")

VARIANTS = ("rprop+", "rprop-", "irprop+", "irprop-")
DRAWN = 1500  # epochs in the picture


class Row(NamedTuple):
    """A problem, its settings, and the figure in the paper."""

    n: int
    hidden: int
    lr: float
    largest: float
    cap: int
    paper: int


# The paper's figures for its standard parameters (30, 367) and its best ones (19, 322) are quoted from memory and
# unchecked. They are means of a few starts; the range of their initial weights is unknown.
ROWS = (
    Row(10, 5, 0.1, 50.0, 2000, 30),
    Row(10, 5, 1.0, 50.0, 2000, 19),
    Row(12, 2, 0.1, 50.0, 5000, 367),
    Row(12, 2, 0.1, 1.0, 15000, 367),
    Row(12, 2, 1.0, 1.0, 15000, 322),
)


class Result(NamedTuple):
    """Epochs until solved (inf if the cap was reached), and the first losses ``(epochs, starts)``."""

    epochs: Tensor
    losses: Tensor


def outputs(w: Tensor, n: int, hidden: int) -> Tensor:
    """Return outputs ``(starts, n, n)`` for all patterns from weights ``(starts, 2 n hidden + hidden + n)``."""
    first, second, bias, out_bias = w.split([n * hidden, hidden * n, hidden, n], dim=1)
    # the patterns are the rows of the identity, so the first layer's product is its weight matrix
    inner = torch.sigmoid(first.view(-1, n, hidden) + bias.unsqueeze(1))
    return torch.sigmoid(torch.baddbmm(out_bias.unsqueeze(1), inner, second.view(-1, hidden, n)))


def train(row: Row, variant: str, starts: int, seed: int = 0) -> Result:
    """Train all starts of a row until each is solved or the cap is reached."""
    n, hidden = row.n, row.hidden
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(starts, 2 * n * hidden + hidden + n, generator=generator, dtype=torch.float64) * 2 - 1
    prev, step_size = torch.zeros_like(w), torch.full_like(w, row.lr)
    loss_before = torch.full((starts, 1), torch.inf, dtype=torch.float64)
    counter, target = torch.tensor(0.0), torch.eye(n, dtype=torch.float64)
    solved_at = torch.full((starts,), torch.inf, dtype=torch.float64)
    running = torch.arange(starts)
    losses: list[Tensor] = []

    for epoch in range(row.cap + 1):
        w.requires_grad_()
        out = outputs(w, n, hidden)
        loss = 0.5 * (out - target).square().sum(dim=(1, 2))
        (grad,) = torch.autograd.grad(loss.sum(), w)
        w, out, loss = w.detach(), out.detach(), loss.detach().unsqueeze(1)

        right = torch.where(target > 0, out > 0.6, out < 0.4).all(dim=2).all(dim=1)
        solved_at[running] = torch.where(right, solved_at[running].clamp(max=epoch), solved_at[running])
        if epoch < DRAWN:
            losses.append(loss.squeeze(1))
        elif epoch % 100 == 0:  # continue only with the unsolved starts
            keep = solved_at[running].isinf()
            running, w, grad, prev, step_size = running[keep], w[keep], grad[keep], prev[keep], step_size[keep]
            loss, loss_before = loss[keep], loss_before[keep]
        if epoch == row.cap or (epoch >= DRAWN and solved_at.isfinite().all()):
            break
        rprop(
            [w], [grad], [prev], [step_size], [counter],
            variant=variant, loss_rose=loss > loss_before,
            etaminus=0.5, etaplus=1.2, step_size_min=1e-6, step_size_max=row.largest,
        )  # fmt: skip
        loss_before = loss
    return Result(solved_at, torch.stack(losses))


def picture(results: dict[tuple[Row, str], Result], path: str) -> None:
    """Draw the best loss so far over the epochs, with a panel for each row of the table.

    Not the current loss, because step sizes up to 50 drive many solved starts into saturation.
    """
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(row for row, _ in results))
    fig = Figure(figsize=(2.8 * len(rows), 3.2), layout="constrained")
    for row, panel in zip(rows, fig.subplots(1, len(rows), squeeze=False)[0], strict=True):
        for variant in VARIANTS:
            best = results[row, variant].losses.cummin(dim=0).values.median(dim=1).values
            panel.plot(range(1, len(best) + 1), best, label=variant, linewidth=1.2)
        panel.set(
            xlabel="epoch",
            xscale="log",
            yscale="log",
            title=f"{row.n}-{row.hidden}-{row.n}, lr {row.lr:g}, max {row.largest:g}",
        )
    fig.axes[0].set_ylabel("best loss so far (median of the starts)")
    fig.axes[0].legend()
    fig.savefig(path, dpi=110)


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--starts", type=int, default=400, help="number of starts of each row and variant (default: 400)"
    )
    parser.add_argument("--only", choices=["10-5-10", "12-2-12"], help="run only one problem")
    parser.add_argument("--cap", type=int, help="maximum number of epochs (default: depends on the row)")
    parser.add_argument("--output", default="encoder.png", help="file of the picture (default: encoder.png)")
    arguments = parser.parse_args()
    if arguments.starts < 1:
        parser.error(f"--starts must be at least 1, got {arguments.starts}")

    begin = time.perf_counter()
    results: dict[tuple[Row, str], Result] = {}
    print(f"{'problem':<9}{'lr':>5}{'max':>5}  {'variant':<9}{'median':>7}  {'solved':>9}  {'1993':>4}  within 20 %")
    for row in ROWS:
        name = f"{row.n}-{row.hidden}-{row.n}"
        if arguments.only not in (None, name):
            continue
        row = row._replace(cap=arguments.cap or row.cap)
        for variant in VARIANTS:
            result = results[row, variant] = train(row, variant, arguments.starts)
            middle = result.epochs.median().item()
            median = f"{middle:.0f}" if math.isfinite(middle) else f">{row.cap}"
            solved = f"{int(result.epochs.isfinite().sum())}/{arguments.starts}"
            again = "yes" if abs(middle / row.paper - 1) <= 0.2 else "no"
            setting = f"{name:<9}{row.lr:>5g}{row.largest:>5g}  {variant:<9}"
            print(f"{setting}{median:>7}  {solved:>9}  {row.paper:>4}  {again}", flush=True)
    print("1993: quoted from memory, unchecked; means of a few starts, which a single stuck start dominates")
    picture(results, arguments.output)
    print(f"{time.perf_counter() - begin:.0f} s, {torch.get_num_threads()} threads; picture: {arguments.output}")


if __name__ == "__main__":
    main()
