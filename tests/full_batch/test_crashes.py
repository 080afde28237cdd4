"""Runs killed with SIGKILL, twenty times, at as many moments: the other ranks end, and a second start goes on."""

import json

import pytest
from programs import HELPERS, run


@pytest.mark.parametrize(
    ("kind", "world", "times"),
    [
        pytest.param("rank", 2, 20, id="a rank, in the middle"),
        pytest.param("saving", 1, 20, id="one process, while it saves"),
        pytest.param("sharded", 2, 8, id="a rank, while shards are saved"),
    ],
)
def test_what_is_killed_goes_on_bit_for_bit(kind, world, times, tmp_path):
    output = run(tmp_path, HELPERS / "crashes.py", kind, times, world, timeout=400)
    crashes = [json.loads(line.removeprefix("seen ")) for line in output.splitlines() if line.startswith("seen ")]
    assert len(crashes) == times
    for i, crash in enumerate(crashes):
        victim = i % world
        assert crash["codes"] == [-9 if rank == victim else 1 for rank in range(world)], crash  # the others: an error
        assert crash["seconds"] < 20, crash  # they took notice at once; most of it is the run before
        assert crash["again"] == [0] * world, crash
        assert crash["equal"] == [True] * world, crash  # to the run that nobody disturbed
        if crash["step"] is not None:  # what was saved is not lost (the run may have come further meanwhile)
            assert crash["from"][0] >= (crash["step"] - 1) // 4 * 4, crash
    assert any(crash["from"][0] for crash in crashes)  # it did go on
