"""On several ranks, and on shards, KeepBest ends as in one process; a run resumes on another number of ranks."""

import strategy_ranks
import torch
from best_ranks import EVERY, RESUMED, STAGES, STEPS, STRATEGIES, WORLDS, member_losses, member_params
from best_walks import move
from programs import HELPERS, run
from strategy_ranks import OPTIONS, ROWS_OPTIONS, SAMPLES, VARIANTS, Rows, Towers, small_numbers
from whole_set import whole_numbers

from lightning_rprop import BestWeights, Rprop


def best_of(net, data, options, steps):
    """Return loss, step and parameters of the best evaluation of a plain loop in one process."""
    groups = [{"params": t.parameters(), "variant": v} for t, v in zip(net.towers, VARIANTS, strict=True)]
    optimizer = Rprop(groups, **options)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = net(*data)
        loss.backward()
        params = {f"net.{name}": param.detach().clone() for name, param in net.named_parameters()}
        seen.append((loss.item() / SAMPLES, step, params))
        optimizer.step(loss=loss)
    return min(seen, key=lambda found: found[0])


def same(found, truth):
    """Return whether a fit has found the best step and ends there."""
    *best, params = truth
    ends = all(torch.equal(found["params"][name], param) for name, param in params.items())
    return found["found"] == tuple(best) and found.get("loss", best[0]) == best[0] and ends


def test_ranks_end_at_the_best_of_one_process(tmp_path):
    truth = best_of(Towers(), whole_numbers(SAMPLES), OPTIONS, STEPS)
    assert EVERY < truth[1] < 2 * EVERY
    run(tmp_path, HELPERS / "best_ranks.py")
    for world in WORLDS:
        for rank in range(world):
            seen = torch.load(tmp_path / f"fit-{world}-{rank}.pt")
            assert tuple(seen) == STRATEGIES
            assert all(same(found, truth) for found in seen.values()), world
    for world, (_, step) in RESUMED.items():
        for rank in range(world):
            seen = torch.load(tmp_path / f"resume-{world}-{rank}.pt")
            assert len(seen) == len(STRATEGIES)
            assert all(found["from"] == step and same(found, truth) for found in seen.values()), world
    for rank in range(2):
        for output, tensors in torch.load(tmp_path / f"plain-{rank}.pt"):
            assert output.item() == 5 * 2 * (3 * 2 + 2) + 2  # all parameters are 2
            assert [tensor.shape for tensor in tensors] == [(5, 3), (5,), (1, 5), (1,)]
            assert all((tensor == 2).all() for tensor in tensors)
    for world in WORLDS:
        for rank in range(world):
            seen = torch.load(tmp_path / f"members-{world}-{rank}.pt")
            assert len(seen) == 4
            for (n, _), found in seen.items():
                assert_best_members(n, found)


def assert_best_members(n, found):
    """Assert that members spread over ranks have ended as those of one process."""
    params = member_params(n)
    best = BestWeights(params)
    for losses in member_losses(n):
        best.update(losses)
        move(params)
    kept = best.state_dict()["tensors"]
    best.restore()
    assert found["found"][0].tolist() == best.loss.tolist()
    assert found["found"][1].tolist() == best.step.tolist()
    assert all(map(torch.equal, found["params"], params))
    assert all(map(torch.equal, found["again"], kept))
    assert all(map(torch.equal, [param[:-1] for param in found["apart"]], [param[:-1] for param in params]))


def test_deepspeed_stages_end_at_the_best(tmp_path):
    truth = best_of(Rows(), small_numbers(SAMPLES), ROWS_OPTIONS, strategy_ranks.STEPS)
    run(tmp_path, HELPERS / "best_ranks.py", "deepspeed")
    for rank in range(2):
        seen = torch.load(tmp_path / f"deepspeed-{rank}.pt")
        assert len(seen) == 2 * len(STAGES)
        assert all(same(found, truth) for found in seen.values())
