"""Profilers and hooks see every step, although steps without them skip torch's wrapper."""

import threading

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from lightning_rprop import Rprop, _torch


def new_optimizer(cls=Rprop):
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    return cls([param])


def names_of(profiler):
    return {event.key for event in profiler.key_averages()}


def test_profiler_shows_the_step():
    optimizer = new_optimizer()
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    with torch.autograd.profiler.profile() as older:
        optimizer.step()
    assert "Optimizer.step#Rprop.step" in names_of(profiler) & names_of(older)


def test_profiler_shows_steps_of_other_threads():
    optimizer = new_optimizer()
    all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads) as profiler:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    assert "Optimizer.step#Rprop.step" in names_of(profiler)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (register_optimizer_step_pre_hook, register_optimizer_step_post_hook),
        (None, register_optimizer_step_post_hook),
        (Rprop.register_step_pre_hook, None),
        (None, Rprop.register_step_post_hook),
    ],
    ids=["global", "global post", "pre", "post"],
)
def test_hooks_run_around_a_step(before, after):
    optimizer, seen = new_optimizer(), []
    handles = [
        register(*[optimizer] * (register.__name__ in vars(torch.optim.Optimizer)), lambda opt, *_: seen.append(opt))
        for register in (before, after)
        if register
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == [optimizer] * len(handles)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 2


def test_pre_hook_replaces_arguments():
    optimizer, losses = new_optimizer(), []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: losses.append(1) or 3.0}))
    assert optimizer.step() == 3.0
    assert losses == [1]


def test_unobserved_step_skips_the_wrapper(monkeypatch):
    optimizer, seen = new_optimizer(), []
    monkeypatch.setattr(type(optimizer), "_optimizer_step_code", lambda self: seen.append(self))
    optimizer.step()
    assert seen == []
    with profile(activities=[ProfilerActivity.CPU]):
        optimizer.step()
    assert seen == [optimizer]


class Counting(Rprop):
    steps = 0

    def step(self, *args, **kwargs):
        self.steps += 1
        return super().step(*args, **kwargs)


def test_step_of_a_subclass_is_observed():
    optimizer, seen = new_optimizer(Counting), []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step()
    assert optimizer.steps == 1
    assert len(seen) == 2  # torch wraps both methods
    assert Rprop.step.hooked
    assert Rprop.step.__doc__.startswith("Make one step")


def test_is_hooked_by_profilers_and_hooks():
    optimizer = new_optimizer()
    assert not _torch.is_hooked(optimizer)
    with torch.autograd.profiler.profile():
        assert _torch.is_hooked(optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert _torch.is_hooked(optimizer)
