"""Converged with losses of members: the fit stops where separate fits of all members, or of the best, have stopped."""

import copy
import pickle

import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import all_equal, trainer
from members import WAVES, Alone, Members, Outputs, stacked
from torch.utils.data import DataLoader, TensorDataset

from lightning_rprop import Converged, KeepBest, Rprop

N = 3
CRITERIA = {"change": (1e-2, None, None, 3), "grad": (None, 2e-2, None, 2), "step": (None, None, 5e-3, 2)}
MOST = 120


def separate_steps(arguments, make=Rprop):
    """Return the steps at which separate fits of the members stop, and their losses in each step."""
    net, steps, losses = stacked(N), [], []
    for i in range(N):
        fitter = fit(None, Alone(net.member(i), make), None, WAVES, MOST, [Converged(*arguments, every_n_steps=1)])
        steps.append(fitter.global_step)
        outputs = Outputs("loss")
        fit(None, Alone(net.member(i), make), None, WAVES, MOST, [outputs])
        losses.append(outputs.values)
    return steps, torch.tensor(losses)


@pytest.mark.parametrize("name", CRITERIA)
def test_fit_stops_as_separate_ones(name, place, tmp_path):
    arguments = CRITERIA[name]
    steps, losses = separate_steps(arguments)
    assert len({*steps}) > 1
    best = next(step for step in range(1, MOST) if step >= steps[losses[:, step - 1].argmin()])
    for members, expected in (("all", max(steps)), ("best", best)):
        converged = Converged(*arguments, every_n_steps=1, members=members)
        fitter = fit(tmp_path, Members(stacked(N)), None, WAVES, MOST, [converged])
        assert fitter.global_step == expected
        assert f"in {'all 3 members' if members == 'all' else 'the best member'}" in converged.reason
        assert converged.reason.endswith(f"step {expected}")
        for copied in (copy.deepcopy(converged), pickle.loads(pickle.dumps(converged))):
            assert copied.reason == converged.reason
    assert max(steps) < MOST


def test_fit_without_full_batch_judges_members(tmp_path):
    arguments = CRITERIA["change"]
    steps, _ = separate_steps(arguments)
    fitter = trainer(tmp_path, [Converged(*arguments)], max_steps=MOST, max_epochs=-1)
    fitter.fit(Members(stacked(N)), DataLoader(TensorDataset(*WAVES), batch_size=103))
    assert fitter.global_step == max(steps)


def with_nan(losses, i):
    """Make the last member NaN from its third evaluation on."""
    return torch.where(torch.tensor([False, False, i >= 2]), torch.nan, losses)


@pytest.mark.filterwarnings("ignore:The loss of . of 3 members was NaN")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("members", ["all", "best"])
def test_resumed_members_stop_at_the_same_step(members, place, tmp_path):
    """A member whose loss stays NaN does not count."""
    steps, _ = separate_steps(CRITERIA["change"])

    def go(path=None, step=0):
        converged, module = Converged(*CRITERIA["change"], 1, members), Members(stacked(N), spoil=with_nan)
        module.steps = step
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [converged] if path else [converged, saves]
        fitter = fit(tmp_path, module, None, WAVES, MOST, callbacks, ckpt_path=path, enable_checkpointing=not path)
        return fitter.global_step, converged.reason, [*module.parameters()]

    end, reason, params = go()
    if members == "all":
        assert end == max(steps[:2])
        assert "in 2 of 3 members (the others have no finite loss)" in reason
    for step in (end - 9, end - 2, end):
        again = go(tmp_path / f"step={step}.ckpt", step)
        assert again[:2] == (end, reason)
        assert all_equal(again[2], params)


class Counting(Members):
    """Counts the evaluations of each step."""

    counts = ()

    def on_train_batch_start(self, batch, batch_idx):
        self.counts = [*self.counts, 0]

    def training_step(self, batch, batch_idx):
        self.counts[-1] += 1
        return super().training_step(batch, batch_idx)


class CountingAlone(Counting, Alone):
    """Counts the evaluations of a single model."""


@pytest.mark.filterwarnings("ignore:The loss of . of 3 members (is|was) NaN or infinite")
def test_max_iter_ends_with_all_or_the_best(place, tmp_path):
    """After as many evaluations as separate fits need. A member without a finite loss does not count."""
    make = lambda params: Rprop(params, lr=0.2, max_iter=60)  # noqa: E731
    arguments, net, counts, losses = (2e-2, None, None, 9), stacked(N), [], []
    for i in range(N):
        alone = CountingAlone(net.member(i), make)
        fit(tmp_path, alone, None, WAVES, 1, [Converged(*arguments, every_n_steps=1)])
        counts.append(alone.counts[0])
        outputs = Outputs("loss")
        fit(tmp_path, Alone(net.member(i), lambda params: Rprop(params, lr=0.2)), None, WAVES, 60, [outputs])
        losses.append(outputs.values)
    losses = torch.tensor(losses)
    assert len({*counts}) > 1
    assert max(counts) < 60
    best = next(count for count in range(1, 60) if count >= counts[losses[:, count - 1].argmin()])
    for members, expected in (("all", max(counts)), ("best", best)):
        module = Counting(copy.deepcopy(net), make)
        fit(tmp_path, module, None, WAVES, 1, [KeepBest(), Converged(*arguments, 1, members)])
        assert module.counts == [expected]
    slowest = counts.index(max(counts))
    for spoil, expected in ((slowest, sorted(counts)[-2]), (slowest - 1, max(counts))):
        nan = torch.where(torch.arange(N) == spoil % N, torch.nan, 0.0)
        module = Counting(copy.deepcopy(net), make, spoil=lambda losses, i, nan=nan: losses + nan)
        fit(tmp_path, module, None, WAVES, 1, [Converged(*arguments, 1)])
        assert module.counts == [expected]
