"""All ranks stop at the same step (gloo processes), that of a single process, however the parameters are sharded."""

import pytest
import torch
from converged_ranks import CRITERIA, SAMPLES, STRATEGIES, WORLDS, Linear, fit_own
from programs import HELPERS, run
from stopping import stop_step
from whole_set import make_data


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return the results of each rank, for two and three ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, HELPERS / "converged_ranks.py")
    return {(world, rank): torch.load(folder / f"{world}-{rank}.pt") for world in WORLDS for rank in range(world)}


def test_sharded_runs_stop_as_one_process(seen):
    """By gradients and step sizes of all shards; under DDP without a collective."""
    fits = [(place, found) for results in seen.values() for place, found in results["fits"].items()]
    assert {name for (name, _), _ in fits} == {*STRATEGIES}
    for (name, key), found in fits:
        expected = CRITERIA[key][1]
        assert found["steps"] == (expected or 10), (name, key)
        assert (found["reason"] or "").endswith(f"step {expected}" if expected else ""), (name, key)
        assert found["reductions"] == (0 if name == "ddp" else found["steps"]), (name, key)


def test_ranks_with_other_samples_stop_alike(seen, tmp_path):
    """Without FullBatch, by the mean of their losses; also within max_iter."""
    for max_iter in (1, 8):
        expected = fit_own(0, 1, max_iter, tmp_path)
        for results in seen.values():
            assert results["own"][max_iter] == expected
    module = Linear(1)
    optimizer, losses = module.configure_optimizers(), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(module.training_step([part.double() for part in make_data(SAMPLES)], 0))
        losses[-1].backward()
        optimizer.step()
    assert seen[2, 1]["own"][1]["steps"] == stop_step([loss.item() for loss in losses], change=1e-3, patience=3)


def test_largest_entry_counts_on_any_rank(seen):
    for results in seen.values():
        assert len(results["plain"]) == 15
        assert {*results["plain"].values()} == {3}


def test_spread_members_stop_as_whole_ones(seen):
    for results in seen.values():
        assert len(results["members"]) == 12
        for whole, *spread in results["members"]:
            assert whole is not None
            assert spread == [whole] * 2
    assert len({found[0] for found in seen[2, 0]["members"]}) > 8
