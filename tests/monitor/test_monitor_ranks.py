"""StepSizeMonitor on several ranks, in real gloo processes: what is logged is of the whole, once."""

import pytest
import torch
from monitor_ranks import WORLDS
from programs import HELPERS, run

WAYS = ("ddp", "zero", "fsdp", "fsdp2", "columns", "columns and rows")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank of one, two and three saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, HELPERS / "monitor_ranks.py")
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
        for world in WORLDS
        for rank in range(world)
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_records_are_those_of_one_process(way, world, seen):
    """Names, steps and values; logged by rank 0 alone, published on every rank."""
    right = seen[1, 0]["fsdp" if way == "fsdp" else "ddp"]  # that is in float32
    assert [step for step, _ in right["records"]] == [1, 3, 5]
    assert len({metrics["step_size/sign_changed"] for _, metrics in right["records"]}) > 1
    records = seen[world, 0][way]["records"]
    assert [step for step, _ in records] == [1, 3, 5]
    for (_, metrics), (_, alone) in zip(records, right["records"], strict=True):
        assert list(metrics) == list(alone)
        rounded = {key for key in alone if key.endswith(("mean", "std_log10"))}  # sums of shards have another order
        rel = 1e-6 if way == "fsdp" else 1e-12  # logarithms are taken in float32 there
        assert {key: metrics[key] for key in rounded} == pytest.approx({key: alone[key] for key in rounded}, rel=rel)
        assert {key: metrics[key] for key in set(alone) - rounded} == {key: alone[key] for key in set(alone) - rounded}
    for rank in range(world):
        assert seen[world, rank][way]["metrics"] == pytest.approx(right["metrics"], rel=1e-6)  # float32
        assert rank == 0 or seen[world, rank][way]["records"] == []


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_one_collective_a_record(way, world, seen):
    """And none under DDP, where every rank has all of it."""
    gathered = [n for n in seen[world, 0][way]["gathered"] if n > 36]  # FSDP gathers parameters by the same function
    assert len(gathered) == (0 if way == "ddp" else 3)
    # table, histograms and sketches of all and of 4 parameters with 36 elements, loss; of slices sketches have one size
    sketches = 5 * 4096 if way == "fsdp" else 2 * 36
    assert set(gathered) <= {15 * 4 + 60 * 5 + 2 * sketches + 1}
