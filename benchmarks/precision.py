"""The final training loss with bfloat16 and float16, and which remedy helps, with the whole data set in each step.

The columns are Lightning's ``precision=``, with batches in the dtype of the weights, and remedies for "bf16-true".
"float32 loss" calls ``net(x).float()`` before the loss. The other remedies use float32 step sizes, and add a step to
the bfloat16 weight, to the weight with Kahan's compensation, or to a float32 master weight, whose loss is shown. A cell
is the median over the starts of the final loss of all samples, evaluated in float32.

Predicted before the first run: steps below half a bfloat16 ulp round away, so that bf16-true stalls and needs one of
the three remedies for steps. Sums of 16 micro-batches have no effect; with 100, where a bfloat16 sum is off by 2 %, the
loss is up to ten times as large. For a weight of 1.5, the first ceil(log(2^-8 / lr) / log 1.2) steps round away: 8 for
lr 1e-3.

    python -m benchmarks.precision
    python -m benchmarks.precision --json precision.json
    python -m benchmarks.precision --starts 1 --only cancer,moves
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from benchmarks.problems import CANCER, DIABETES, DIGITS, Fit, add_only, mlp
from benchmarks.report import machine, print_table, write_json
from lightning_rprop import Rprop

LR = 0.01
WEIGHT = 1.5  # its bfloat16 ulp is 2^-7
FIRST = 10  # steps
RATES = (1e-2, 1e-3, 1e-4, 1e-5)


class Remedy(NamedTuple):
    """How to add a float32 move to a bfloat16 weight, and what to store for that."""

    remember: Callable[[Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], object]


def add_rounded(weight: Tensor, move: Tensor, nothing: Tensor) -> None:
    """Add and round."""
    weight.copy_(weight.float() + move)


def add_compensated(weight: Tensor, move: Tensor, left: Tensor) -> None:
    """Add the move and the earlier rounding error; store the new rounding error in bfloat16 (Kahan)."""
    due = (left.float() + move).to(left.dtype)
    new = (weight.float() + due.float()).to(weight.dtype)
    left.copy_(due.float() - (new.float() - weight.float()))
    weight.copy_(new)


def add_to_master(weight: Tensor, move: Tensor, master: Tensor) -> None:
    """Add to the master weight, and copy it to the weight."""
    weight.copy_(master.add_(move))


STEP_SIZES = Remedy(lambda weight: weight.new_empty(0), add_rounded)
KAHAN = Remedy(torch.zeros_like, add_compensated)
MASTER = Remedy(Tensor.float, add_to_master)


class Remedied:
    """Rprop with float32 step sizes for bfloat16 weights, and a remedy for the rounding of each move.

    The parameters of the inner optimizer are the moves. They are 0 before each step, so that they hold it exactly.
    """

    def __init__(self, params: list[Tensor], remedy: Remedy) -> None:
        self.params = params
        self.add = remedy.add
        self.memory = [remedy.remember(p.detach()) for p in params]
        self.moves = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.optimizer = Rprop(self.moves, lr=LR)

    @torch.no_grad()
    def step(self) -> None:
        """Make a step."""
        for move, param in zip(self.moves, self.params, strict=True):
            move.zero_().grad = param.grad.float()
        self.optimizer.step()
        for param, move, memory in zip(self.params, self.moves, self.memory, strict=True):
            self.add(param, move, memory)


class Way(NamedTuple):
    """A Lightning precision and its remedies."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    float32_loss: bool = False
    remedy: Remedy | None = None


BF16 = torch.bfloat16
WAYS = {
    "32-true": Way(),
    "64-true": Way(torch.float64),
    "16-mixed, GradScaler": Way(autocast=torch.float16),
    "bf16-mixed": Way(autocast=BF16),
    "bf16-true": Way(BF16),
    "+ float32 loss": Way(BF16, float32_loss=True),
    "+ float32 step sizes": Way(BF16, float32_loss=True, remedy=STEP_SIZES),
    "+ Kahan": Way(BF16, float32_loss=True, remedy=KAHAN),
    "+ master weights": Way(BF16, float32_loss=True, remedy=MASTER),
    "master weights only": Way(BF16, remedy=MASTER),
}


class Row(NamedTuple):
    """A problem and its number of steps."""

    about: str
    fit: Fit
    steps: int


def sine() -> Fit:
    """Fit a network to 200 points of a sine."""
    x = torch.linspace(-3, 3, 200).unsqueeze(1)
    return Fit(x, x.sin(), lambda: mlp(1, 20, 1), F.mse_loss)


ROWS = {
    "digits": Row("digits, 64-32-10 network", DIGITS, 300),
    "cancer": Row("breast cancer, 30-16-2 network", CANCER, 300),
    "diabetes": Row("diabetes, 10-16-1 network", DIABETES, 500),
    "sine": Row("sine, 1-20-1 network", sine(), 500),
}
SUMS = [Row("digits, 64-32-10 network", DIGITS, 50), Row("diabetes, 10-16-1 network", DIABETES, 50)]
CUTS = [
    (1, False),
    (16, False),
    (16, True),
    (100, False),
    (100, True),
]  # number of micro-batches, and whether they are summed in float32


def end(row: Row, way: Way, seed: int, micro_batches: int = 1, float32_sum: bool = False) -> float:
    """Train with micro-batches, and return the final loss of all samples in float32."""
    fit = row.fit
    torch.manual_seed(seed)
    net = fit.net().to(way.weights)
    params = list(net.parameters())
    optimizer = Rprop(params, lr=LR) if way.remedy is None else Remedied(params, way.remedy)
    scaler = torch.amp.GradScaler("cpu", enabled=way.autocast == torch.float16)
    y = fit.y.to(way.weights) if fit.y.is_floating_point() else fit.y
    parts = [t.tensor_split(micro_batches) for t in (fit.x.to(way.weights), y)]
    for _ in range(row.steps):
        sums: list[Tensor | None] = [None] * len(params)
        net.zero_grad()
        for x, y in zip(*parts, strict=True):
            with torch.autocast("cpu", way.autocast, enabled=way.autocast is not None):
                loss = loss_of(net, x, y, fit, way.float32_loss)
            scaler.scale(loss * (len(x) / len(fit.x))).backward()
            if float32_sum:
                sums = [p.grad.float() if s is None else s + p.grad for p, s in zip(params, sums, strict=True)]
                net.zero_grad()
        if float32_sum:
            for p, s in zip(params, sums, strict=True):
                p.grad = s.to(p.dtype)  # keeps the sign
        if isinstance(optimizer, Remedied):
            optimizer.step()
        else:
            scaler.step(optimizer)
        scaler.update()
    net = copy.deepcopy(net).float()
    with torch.no_grad():
        if way.remedy is MASTER:
            for p, master in zip(net.parameters(), optimizer.memory, strict=True):
                p.copy_(master)
        return fit.criterion(net(fit.x), fit.y).item()


def loss_of(net: nn.Module, x: Tensor, y: Tensor, fit: Fit, float32_loss: bool) -> Tensor:
    """Compute the loss of a batch."""
    outputs = net(x)
    if float32_loss:
        outputs, y = outputs.float(), y.float() if y.is_floating_point() else y
    return fit.criterion(outputs, y)


def lost(lr: float, steps: int, seed: int) -> tuple[float, float]:
    """Return the share of moves that do not change a bfloat16 weight, in the first steps and in all, on digits."""
    torch.manual_seed(seed)
    net = DIGITS.net().to(BF16)
    params = list(net.parameters())
    optimizer = Rprop(params, lr=lr)
    counts = []
    for _ in range(steps):
        net.zero_grad()
        loss_of(net, DIGITS.x.to(BF16), DIGITS.y, DIGITS, True).backward()
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moves = [optimizer.state[p]["prev"] != 0 for p in params]  # prev is 0 where the sign changed, which is no move
        still = [move & (p == old) for move, p, old in zip(moves, params, before, strict=True)]
        counts.append((sum(int(t.sum()) for t in still), sum(int(t.sum()) for t in moves)))
    return tuple(sum(s for s, _ in some) / sum(m for _, m in some) for some in (counts[:FIRST], counts))


def lost_in_turn(lr: float) -> int:
    """Count the first steps that do not change a bfloat16 weight, with gradients of one sign."""
    weight = torch.tensor([WEIGHT], dtype=BF16)
    weight.grad = torch.ones_like(weight)
    optimizer = Rprop([weight], lr=lr)
    for count in range(1000):
        optimizer.step()
        if weight != WEIGHT:
            return count
    raise RuntimeError(f"lr={lr:g}: the weight has not moved in 1000 steps")


def predicted_in_turn(lr: float) -> int:
    """Predict the same: a step size that grows by 1.2 must exceed half an ulp."""
    return max(0, math.ceil(math.log(2**-8 / lr) / math.log(1.2)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="number of starts of each problem (default: 5)")
    add_only(parser, {**ROWS, "sums": None, "moves": None})
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.starts < 1:
        parser.error(f"--starts: must be at least 1, got {arguments.starts}")

    torch.set_num_threads(1)
    begin, seeds = time.perf_counter(), range(arguments.starts)
    figures: dict[str, list[dict[str, Any]]] = {"losses": [], "sums": [], "moves": []}

    def median(row: Row, way: Way, *cut: Any) -> float:
        return statistics.median(end(row, way, seed, *cut) for seed in seeds)

    def losses() -> Iterator[list[str]]:
        for name in (name for name in ROWS if name in arguments.only):
            found = {about: median(ROWS[name], way) for about, way in WAYS.items()}
            figures["losses"].append({"problem": name, **found})
            yield [ROWS[name].about, *(f"{loss:.2g}" for loss in found.values())]

    def sums() -> Iterator[list[str]]:
        for row in SUMS:
            found = [median(row, WAYS["+ float32 loss"], *cut) for cut in CUTS]
            figures["sums"].append({"problem": row.about, "losses": found})
            yield [row.about, *(f"{loss:.3g}" for loss in found)]

    def moves() -> Iterator[list[str]]:
        for lr in RATES:
            shares = zip(*(lost(lr, 300, seed) for seed in seeds), strict=True)
            first, whole = map(statistics.median, shares)
            found = {"first": first, "all": whole, "in_turn": lost_in_turn(lr), "predicted": predicted_in_turn(lr)}
            figures["moves"].append({"lr": lr, **found})
            yield [f"{lr:g}", f"{first:.1%}", f"{whole:.1%}", str(found["in_turn"]), str(found["predicted"])]

    if ROWS.keys() & arguments.only.keys():
        print_table(["problem", *WAYS], losses())
    if "sums" in arguments.only:
        cuts = [f"{n} micro-batches, summed in {'float32' if precise else 'bfloat16'}" for n, precise in CUTS[1:]]
        print_table(["bf16-true + float32 loss, 50 steps", "one batch", *cuts], sums())
    if "moves" in arguments.only:
        head = ["lr", f"lost, first {FIRST} steps", "lost, 300 steps", f"lost at the start from {WEIGHT}", "predicted"]
        print_table(head, moves())
    about = machine([])
    print(f"\n{', '.join(f'{name} {value}' for name, value in about.items())}, {time.perf_counter() - begin:.0f} s")
    if arguments.json:
        write_json(arguments.json, {"machine": about, **figures})


if __name__ == "__main__":
    main()
