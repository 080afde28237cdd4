"""KeepBest with losses of members: each member ends as a fit of its own."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import all_equal
from members import WAVES, Alone, Members, stacked

from lightning_rprop import KeepBest, Rprop

N, STEPS = 3, 8
MAKERS = {
    "irprop+": lambda params: Rprop(params, lr=0.4, variant="irprop+"),
    "max_iter": lambda params: Rprop(params, lr=2.0, max_iter=3),
    "maximize": lambda params: Rprop(params, lr=0.4, maximize=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
}


class Logged(pl.Callback):
    """Records ``best/loss`` and the best losses in each step."""

    def __init__(self, keep):
        self.keep, self.seen, self.best = keep, [], []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(trainer.callback_metrics["best/loss"].item())
        self.best.append(self.keep.best_loss)


@pytest.mark.parametrize("name", MAKERS)
def test_members_end_as_separate_fits(name, place, tmp_path):
    make, net = MAKERS[name], stacked(N)
    sign = -1 if name == "maximize" else 1
    models, keep = [net.member(i) for i in range(N)], KeepBest()
    logged = Logged(keep)
    fit(tmp_path, Members(net, make, spoil=lambda losses, i: sign * losses), None, WAVES, STEPS, [keep, logged])
    best = max if sign < 0 else min
    assert logged.seen == [best(losses.tolist()) for losses in logged.best]
    for i, model in enumerate(models):
        one = KeepBest()
        fit(tmp_path, Alone(model, make, spoil=lambda loss, i: sign * loss), None, WAVES, STEPS, [one])
        assert (keep.best_loss[i].item(), keep.best_step[i].item()) == (one.best_loss, one.best_step)
        assert all_equal(net.member(i).parameters(), model.parameters())
    assert len({*keep.best_step.tolist()}) > 1, keep.best_step
    for copied in (copy.deepcopy(keep), pickle.loads(pickle.dumps(keep))):
        assert torch.equal(copied.best_loss, keep.best_loss)
        assert torch.equal(copied.best_step, keep.best_step)


def with_nan(losses, i):
    """Make the last member NaN, and another one from its fifth evaluation on."""
    return torch.where(torch.tensor([False, i >= 4, True]), torch.nan, losses)


@pytest.mark.filterwarnings("ignore:The loss of . of 3 members (is|was) NaN or infinite")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("name", ["irprop+", "max_iter"])
def test_resumed_members_end_as_the_whole_run(name, place, tmp_path):
    """With a member that never has a finite loss."""
    whole, keep = Members(stacked(N), MAKERS[name], spoil=with_nan), KeepBest()
    every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path, whole, None, WAVES, 6, [keep, every], enable_checkpointing=True)
    assert keep.best_loss[2] == float("inf")
    assert keep.best_step[2] == -1
    assert 0 <= keep.best_step[1] < 5
    for step in range(1, 7):
        module, again = Members(stacked(N), MAKERS[name], spoil=with_nan), KeepBest()
        module.steps = step * (3 if name == "max_iter" else 1)
        fit(tmp_path, module, None, WAVES, 6, [again], ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all_equal(module.parameters(), whole.parameters()), step
        assert torch.equal(again.best_loss, keep.best_loss)
        assert torch.equal(again.best_step, keep.best_step)
