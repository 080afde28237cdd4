"""Random losses and gradients of members, for one optimizer of all members and for a twin of each weight."""

from __future__ import annotations

import math
import random

import torch
from tapes import INF, NAN, OPTIONS
from twin import ROUND, twin

from lightning_rprop import Rprop

SHAPES = ((5,), (5, 3), (5, 2, 2, 2), (5, 0))
MEMBERS = 5


def draw_history(steps: int, seed: int = 0) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Return gradients by shape, and losses, of each step.

    The last member's loss is never finite, and those of the others are bad now and then. The numbers are exact in every
    dtype.
    """
    draw = random.Random(seed)
    history = []
    for step in range(steps):
        grads = [
            torch.tensor([draw.choice((-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, NAN)) for _ in range(math.prod(shape))])
            for shape in SHAPES
        ]
        losses = [draw.choice((1.0, 2.0, 3.0, 4.0)) for _ in range(MEMBERS)]
        losses[step % MEMBERS] = draw.choice((NAN, INF, -INF, 1.0))
        losses[-1] = draw.choice((NAN, INF))
        shaped = [grad.reshape(shape).double() for grad, shape in zip(grads, SHAPES, strict=True)]
        history.append((shaped, torch.tensor(losses, dtype=torch.float64)))
    return history


def start(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in params]


def as_pairs(real: torch.Tensor) -> torch.Tensor:
    """Return complex numbers whose real and imaginary parts are those given, in opposite directions."""
    return torch.complex(real, -real)


def run_together(history, dtype, maximize=False, steps_as="loss", **options):
    """Return parameters, step sizes and stored gradients of one optimizer, which gets all losses at once."""
    real = dtype.to_real() if dtype.is_complex else dtype
    direction = -1 if maximize else 1
    params = [as_pairs(p) if dtype.is_complex else p for p in start(real)]
    if not options.get("differentiable"):  # autograd forbids moving a leaf in place
        params = [p.requires_grad_() for p in params]
    optimizer = Rprop(params, maximize=maximize, **(OPTIONS | options))
    for grads, losses in history:
        for p, grad in zip(params, grads, strict=True):
            grad = (direction * grad).to(real)
            p.grad = torch.empty_like(p).copy_(as_pairs(grad) if dtype.is_complex else grad)
        if steps_as == "loss":
            optimizer.step(loss=direction * losses)
        else:
            optimizer.step(lambda losses=losses: direction * losses)
    states = [optimizer.state[p] for p in params]
    rows = [(p.detach(), state["step_size"], state["prev"]) for p, state in zip(params, states, strict=True)]
    return [tuple(t.real if t.is_complex() else t for t in row) for row in rows], optimizer


def run_twins(history, variant, dtype, retreat=True, decay=0.0):
    """Return the same of one twin for each weight, with the losses of its member only."""
    rounded = ROUND[str(dtype).removeprefix("torch.")]
    rows = []
    for i, param in enumerate(start(dtype)):
        columns = torch.zeros(3, *param.shape, dtype=dtype)
        for index in torch.ones(param.shape).nonzero().tolist():
            tape = iter([(grads[i][tuple(index)].item(), losses[index[0]].item()) for grads, losses in history])

            def evaluate(w, tape=tape):
                grad, loss = next(tape)
                return rounded(grad + rounded(decay * w)) if decay and grad == grad else grad, loss

            w = param[tuple(index)].item()
            *_, last = twin(variant, evaluate, len(history), w, **OPTIONS, rounded=rounded, retreat=retreat)
            columns[(slice(None), *index)] = torch.tensor(last, dtype=dtype)
        rows.append(tuple(columns))
    return rows


def differ(rows, others) -> bool:
    return not all(
        torch.equal(a, b) for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True)
    )
