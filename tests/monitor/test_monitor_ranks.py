"""StepSizeMonitor on several ranks (gloo processes): records cover the whole model, and rank 0 logs them."""

import pytest
import torch
from monitor_ranks import WORLDS
from programs import HELPERS, run

WAYS = ("ddp", "zero", "fsdp", "fsdp2", "columns", "columns and rows")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return the results of each rank, for one, two and three ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, HELPERS / "monitor_ranks.py")
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
        for world in WORLDS
        for rank in range(world)
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_records_match_a_single_process(way, world, seen):
    """Keys, steps and values. Only rank 0 logs; every rank publishes to callback_metrics."""
    right = seen[1, 0]["fsdp" if way == "fsdp" else "ddp"]  # FSDP runs in float32
    assert [step for step, _ in right["records"]] == [1, 3, 5]
    assert len({metrics["step_size/sign_changed"] for _, metrics in right["records"]}) > 1
    records = seen[world, 0][way]["records"]
    assert [step for step, _ in records] == [1, 3, 5]
    for (_, metrics), (_, single) in zip(records, right["records"], strict=True):
        assert list(metrics) == list(single)
        rounded = {key for key in single if key.endswith(("mean", "std_log10"))}  # sums over shards round differently
        exact = set(single) - rounded
        rel = 1e-6 if way == "fsdp" else 1e-12  # due to logarithms in float32
        assert {key: metrics[key] for key in rounded} == pytest.approx({key: single[key] for key in rounded}, rel=rel)
        assert {key: metrics[key] for key in exact} == {key: single[key] for key in exact}
    for rank in range(world):
        assert seen[world, rank][way]["metrics"] == pytest.approx(right["metrics"], rel=1e-6)  # float32
        assert rank == 0 or seen[world, rank][way]["records"] == []


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_record_takes_one_collective(way, world, seen):
    """DDP needs none, because every rank holds all step sizes."""
    gathered = [n for n in seen[world, 0][way]["gathered"] if n > 36]  # FSDP gathers its parameters by all_gather too
    assert len(gathered) == (0 if way == "ddp" else 3)
    # The table, histograms and sketches (overall and of 4 parameters with 36 elements in total), and the loss.
    # Sketches of FSDP slices have a fixed size.
    sketches = 5 * 4096 if way == "fsdp" else 2 * 36
    assert set(gathered) <= {15 * 4 + 60 * 5 + 2 * sketches + 1}
