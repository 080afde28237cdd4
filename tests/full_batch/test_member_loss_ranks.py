"""Losses of members on one, two and three ranks (gloo)."""

import pytest
import torch
from member_loss_ranks import MEMBERS, WORLDS
from programs import HELPERS, run


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return the results of each rank, by the number of ranks; every fit of members has equalled separate fits."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, HELPERS / "member_loss_ranks.py")
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in WORLDS}


def test_ranks_have_equal_member_losses(seen):
    for case in ("irprop+", "rprop-", "few", "weight 0"):
        for ranks in seen.values():
            for found in ranks:
                assert torch.equal(found["distributed"], found["irprop+"])
                assert found[case].shape == (8, MEMBERS)
                assert found[case].isfinite().all()
                assert torch.equal(found[case], ranks[0][case]), case
                # other numbers of ranks add up in another order
                assert torch.allclose(found[case][0], seen[1][0][case][0], rtol=1e-14, atol=0), case


def test_different_members_fail_on_every_rank(seen):
    values = {"length": ("3", "2"), "missing": ("3", "0")}
    for world in WORLDS[1:]:
        for found in seen[world]:
            for case, (first, other) in values.items():
                assert found[case].startswith(
                    "training_step returns different things: the number of member_losses is "
                    f"{first} on rank 0, {other} on rank 1"
                )
                assert found[case].endswith(". Train the same members on every rank")


def test_sharded_gradients_lose_bad_rows(seen):
    for ranks in seen.values():
        for found in ranks:
            assert (found["zeroed"] == 0).all(dim=1).tolist() == [True, False, True]
            assert found["zeroed"].isnan().all(dim=1).tolist() == [False, True, False]
