"""Runs of members that are saved and resumed, in every form of a checkpoint."""

import copy
import pickle

import members_ranks
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import TORCH_2_8, VARIANTS, through_file
from lit import all_equal
from programs import HELPERS, run
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_rprop import Rprop, Stacked

STEPS = 12


def build(variant="irprop+", **options):
    torch.manual_seed(0)
    net = Stacked(lambda: torch.nn.Linear(3, 2, dtype=torch.float64), 4)
    return net, Rprop(net.parameters(), lr=0.3, variant=variant, **options)


def fit(net, optimizer, steps):
    """Fit members to data; the third loss is bad at some steps."""
    x, y = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3), torch.ones(4, 2, dtype=torch.float64)
    for step in steps:
        optimizer.zero_grad()
        losses = (net(x) - y).square().mean(dim=(1, 2)) + net(x).abs().amax(dim=(1, 2))
        losses.sum().backward()
        optimizer.step(loss=losses * torch.tensor([1, 1, torch.nan if step % 5 == 3 else 1, 1]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_members_resume_from_any_step(variant):
    expected, optimizer = build(variant)
    fit(expected, optimizer, range(STEPS))
    for saved_at in range(0, STEPS, 2):
        net, optimizer = build(variant)
        fit(net, optimizer, range(saved_at))
        resumed, fresh = build(variant)
        resumed.load_state_dict(through_file(net.state_dict()))
        fresh.load_state_dict(through_file(optimizer.state_dict()))
        fit(resumed, fresh, range(saved_at, STEPS))
        assert all_equal(resumed.parameters(), expected.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_members_resume_in_copies(duplicate):
    net, optimizer = build()
    fit(net, optimizer, range(5))
    copied = duplicate((net, optimizer))
    for each in ((net, optimizer), copied):
        fit(*each, range(5, STEPS))
    assert all_equal(copied[0].parameters(), net.parameters())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_fresh_optimizer_loads_members(tmp_path):
    """torch.distributed.checkpoint loads a tensor only into one of its size, and the fresh one knows no losses yet."""
    net, optimizer = build()
    fit(net, optimizer, range(5))
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    resumed, fresh = build()
    state = {"optimizer": get_optimizer_state_dict(resumed, fresh)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(net.state_dict())
    set_optimizer_state_dict(resumed, fresh, state["optimizer"])
    for each in ((net, optimizer), (resumed, fresh)):
        fit(*each, range(5, STEPS))
    assert all_equal(resumed.parameters(), net.parameters())
    assert torch.equal(*(one.state[next(iter(one.state))]["prev_loss"] for one in (optimizer, fresh)))


def test_torch_loads_state_of_members():
    net, optimizer = build()
    fit(net, optimizer, range(5))
    other = torch.optim.Rprop(net.parameters())
    other.load_state_dict(through_file(optimizer.state_dict()))
    for p in net.parameters():
        assert torch.equal(other.state[p]["step_size"], optimizer.state[p]["step_size"])
    back = build()[1]
    back.load_state_dict(other.state_dict())
    assert back.state_dict()["state"][0]["prev_loss"] == optimizer.state_dict()["state"][0]["prev_loss"]
    assert optimizer.state[p]["prev_loss"].shape == (4,)


def test_older_state_with_a_tensor_loads():
    """Also one number, of a run with an ordinary loss."""
    net, optimizer = build()
    fit(net, optimizer, range(2))
    state = optimizer.state_dict()
    for losses in (torch.arange(4.0), torch.tensor(2.0)):
        for each in state["state"].values():
            each["prev_loss"] = losses
        optimizer.load_state_dict(state)
        assert all(torch.equal(optimizer.state[p]["prev_loss"], losses) for p in net.parameters())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.xfail(TORCH_2_8, reason="DTensors lack an operator for differentiable=True")
def test_spread_members_match_one_process(tmp_path):
    """On two and three ranks; their checkpoints resume there, in fresh processes with FSDP2, and in one process."""
    run(tmp_path, HELPERS / "members_ranks.py")
    expected, optimizer = members_ranks.build()
    members_ranks.fit(expected, optimizer, range(12))
    expected = list(expected.parameters())
    for world in members_ranks.WORLDS:
        for rank in range(world):
            assert all_equal(torch.load(tmp_path / f"{world}-{rank}.pt"), expected)
        assert all_equal(members_ranks.resume(tmp_path / f"checkpoint-{world}"), expected)
