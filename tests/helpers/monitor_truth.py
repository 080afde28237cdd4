"""The monitor's statistics in plain Python, computed from the optimizer's state, to compare its records with."""

from __future__ import annotations

import math
import statistics

import lightning.pytorch as pl
import torch

DEFAULT = (
    "mean",
    "min",
    "max",
    "lower_bound",
    "upper_bound",
    "at_lower_bound",
    "at_upper_bound",
    "sign_changed",
    "zero_gradient",
    "nonfinite_gradient",
    "retreats",
)
GRADIENT = DEFAULT[-4:-1]


def numbers(tensor):
    """Return all numbers of a tensor; a complex one counts as two."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.double().flatten().tolist()


def sign(x):
    return (x > 0) - (x < 0)  # 0 for NaN


def quantile(values, share):
    """Return a quantile, interpolated linearly between the two nearest elements."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place % 1)


def of_step_sizes(values, bounds, names):
    rounded = torch.tensor(bounds, dtype=torch.float32).tolist()  # like the step sizes
    functions = {
        "mean": lambda: math.fsum(values) / len(values),
        "min": lambda: min(values),
        "max": lambda: max(values),
        "median": lambda: statistics.median(values),
        "std_log10": lambda: statistics.pstdev(map(math.log10, values)),
        "lower_bound": lambda: bounds[0],
        "upper_bound": lambda: bounds[1],
        "at_lower_bound": lambda: sum(v <= rounded[0] for v in values) / len(values),
        "at_upper_bound": lambda: sum(v >= rounded[1] for v in values) / len(values),
    }
    functions |= {name: lambda n=name: quantile(values, float(n[1:]) / 100) for name in names if name[0] == "q"}
    return {name: functions[name]() for name in names if name in functions}


def of_gradients(grads, signed, prevs, names):
    functions = {
        "sign_changed": lambda: sum(sign(g) * sign(p) < 0 for g, p in zip(signed, prevs, strict=True)) / len(grads),
        "zero_gradient": lambda: sum(g == 0 for g in grads) / len(grads),
        "nonfinite_gradient": lambda: sum(not math.isfinite(g) for g in grads),
    }
    return {name: functions[name]() for name in names if name in functions}


class Truth(pl.Callback):
    """Keep the step sizes after, and the gradients before, each optimizer step that Lightning counts."""

    def __init__(self):
        self.before = {}  # {name: [gradient, the same with maximize and weight decay, previous gradient]}
        self.after = {}  # {step: {name: step sizes}}
        self.gradients = {}  # {step: before}
        self.optimizers = []  # those that count retreats
        self.retreats = {}  # {step: their number, with one of these optimizers}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        names = {id(p): name for name, p in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                prev = optimizer.state.get(p, {}).get("prev", torch.zeros_like(p))
                signed = (-p.grad if group["maximize"] else p.grad) + group.get("weight_decay", 0) * p.detach()
                self.before[names[id(p)]] = [t.clone() for t in (p.grad, signed, prev)]

    def on_train_batch_end(self, trainer, pl_module, *_):
        states = [optimizer.state for optimizer in trainer.optimizers]
        sizes = {
            name: state[p]["step_size"].clone()
            for name, p in pl_module.named_parameters()
            for state in states
            if p in state
        }
        if sizes and self.before:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.after[step], self.gradients[step], self.before = sizes, self.before, {}
            counting = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "retreats")]
            self.optimizers += [optimizer for optimizer in counting if optimizer not in self.optimizers]
            if self.optimizers:
                self.retreats[step] = sum(int(optimizer.retreats) for optimizer in self.optimizers)

    def expected(self, step, names=DEFAULT, bounds=(1e-6, 50.0), parameters=(), groups=()):
        """Return the record that the monitor should log at a step, with the keys in order."""
        sizes, gradients = self.after[step], self.gradients[step]
        scopes = {"": list(sizes), **dict(groups), **{name: [name] for name in parameters}}
        result = {}
        for scope, members in scopes.items():
            grads, signed, prevs = ([x for m in members for x in numbers(gradients[m][i])] for i in range(3))
            values = of_step_sizes([x for m in members for x in numbers(sizes[m])], bounds, names)
            values |= of_gradients(grads, signed, prevs, names)
            if not scope and step in self.retreats:
                values["retreats"] = self.retreats[step]
            known = [name for name in names if name in values or name != "retreats"]
            result |= {f"step_size/{scope}/{n}".replace("//", "/"): values[n] for n in known}
        return result
