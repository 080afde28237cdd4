"""Every Lightning strategy gives the parameters of one process bit for bit, in real processes (gloo)."""

import deepspeed_ranks
import pytest
import torch
from programs import HELPERS, run
from strategy_ranks import (
    CHECKPOINTS,
    OPTIONS,
    PRECISIONS,
    ROWS_OPTIONS,
    SAMPLES,
    SAVED_AT,
    STEPS,
    STRATEGIES,
    VARIANTS,
    WORLDS,
    Rows,
    Towers,
    small_numbers,
)
from whole_set import Regression, exact, make_data, whole_numbers

from lightning_rprop import Rprop


def plain_loop(net, data, options, autocast=None):
    """Return the parameters after a plain loop in one process, without micro-batches, foreach or fused."""
    groups = [
        {"params": list(tower.parameters()), "variant": variant}
        for tower, variant in zip(net.towers, VARIANTS, strict=True)
    ]
    optimizer = Rprop(groups, **options, foreach=False, fused=False)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = net(*data)
        loss.backward()  # the loss is a sum, in which nothing rounds
        optimizer.step(loss=loss)
        seen.append({f"net.{name}": param.detach().clone() for name, param in net.named_parameters()})
    assert not all_equal(seen[-1], seen[-2])  # it still moves
    ends = {variant: seen[-1][f"net.towers.{i}.0.weight"] for i, variant in enumerate(VARIANTS)}
    assert len({tuple(end.flatten().tolist()) for end in ends.values()}) >= 3  # the variants differ
    return seen[-1]


@pytest.fixture(scope="module")
def single():
    """Return the parameters that one process ends with."""
    return plain_loop(Towers(), whole_numbers(SAMPLES), OPTIONS)


def all_equal(params, others):
    return params.keys() == others.keys() and all(torch.equal(params[name], others[name]) for name in params)


def load(folder, stage, world):
    return [torch.load(folder / f"{stage}-{world}-{rank}.pt") for rank in range(world)]


def test_ranks_equal_one_process_and_resume(single, tmp_path):
    run(tmp_path, HELPERS / "strategy_ranks.py", timeout=500)
    for world in WORLDS:
        for seen in load(tmp_path, "fit", world):
            assert tuple(seen) == STRATEGIES
            for name, found in seen.items():
                assert all_equal(found["params"], single), (name, world)
                assert found["collectives"] == 0, name  # in one optimizer step
                assert any(found["moved"]), name  # that step did move something
                assert all(param == state for param, state in found["placements"]), name
            assert seen["fsdp2"]["placements"] == {("(Shard(dim=0),)",) * 2}
            assert seen["columns"]["placements"] == {("None", "None"), ("(Shard(dim=0),)",) * 2}  # mixed in one group
        for seen in load(tmp_path, "resume", world):
            assert len(seen) == 2 * len(CHECKPOINTS)
            for checkpoint, found in seen.items():
                assert found["from"] == SAVED_AT, (checkpoint, world)
                assert all_equal(found["params"], single), (checkpoint, world)
    dtypes = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
    autocasts = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    for precision in PRECISIONS["ddp"]:
        dtype = dtypes.get(precision, torch.float32)
        data = [values.to(dtype) for values in small_numbers(SAMPLES)]
        expected = plain_loop(Rows().to(dtype), data, ROWS_OPTIONS, autocasts.get(precision))
        for seen in load(tmp_path, "precise", 2):
            for name, params in seen.items():
                if name.endswith(f" in {precision}"):
                    assert all_equal(params, expected), name


def test_deepspeed_stages_equal_one_process(tmp_path):
    """Covers all ZeRO stages and DeepSpeed's own checkpoints."""
    run(tmp_path, HELPERS / "deepspeed_ranks.py")
    expected = plain_loop(Rows(), small_numbers(SAMPLES), ROWS_OPTIONS)
    in_bfloat16 = plain_loop(Rows().bfloat16(), [t.bfloat16() for t in small_numbers(SAMPLES)], ROWS_OPTIONS)
    _, gradient = exact(Regression().net, make_data(deepspeed_ranks.RAGGED))
    squares = sum(grad.square().sum().item() for grad in gradient)
    for world in WORLDS:
        ranks = load(tmp_path, "deepspeed", world)
        for stage in deepspeed_ranks.STAGES:
            assert all(all_equal(rank[stage]["params"], expected) for rank in ranks), (stage, world)
            parts = [rank[stage]["squares"] for rank in ranks]
            # float32 rounding; the signs alone would hide a wrong factor
            assert (parts[0] if stage == 0 else sum(parts)) == pytest.approx(squares, rel=1e-5), (stage, world)
            if world == 2:
                assert all(rank[stage]["from"] == SAVED_AT for rank in ranks), stage
                assert all(all_equal(rank[stage]["resumed"], expected) for rank in ranks), stage
            if world == 2 and stage > 0:
                for precision in deepspeed_ranks.PRECISIONS:
                    assert all(all_equal(rank[stage][precision], in_bfloat16) for rank in ranks), (stage, precision)
        if world == 1:
            assert "gradient_clip_val is 0.5: leave it None" in ranks[0][1]["clip"]
            assert "remove the callback, or use a strategy" in ranks[0][1]["monitor"]
            assert "tolerance_grad=1e-07 and tolerance_step=None. Set both to None" in ranks[0][1]["tolerance"]
            assert ranks[0][1]["reason"].endswith("up to step 4")  # every change is small, from the second step on


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("strategies", [["ddp"], ["ddp_fork", "ddp_notebook", "ddp_spawn"]])
def test_launched_processes_equal_one(strategies, world, single, tmp_path):
    run(tmp_path, HELPERS / "launchers.py", world, *strategies)
    for strategy in strategies:
        for rank in range(world):
            assert all_equal(torch.load(tmp_path / f"{strategy}-{rank}.pt"), single)
