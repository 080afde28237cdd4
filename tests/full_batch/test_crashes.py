"""After a SIGKILL at any moment the other ranks end, and a second start resumes the run."""

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
def test_killed_run_resumes_bit_for_bit(kind, world, times, tmp_path):
    output = run(tmp_path, HELPERS / "crashes.py", kind, times, world, timeout=400)
    crashes = [json.loads(line.removeprefix("seen ")) for line in output.splitlines() if line.startswith("seen ")]
    assert len(crashes) == times
    for i, crash in enumerate(crashes):
        victim = i % world
        assert crash["codes"] == [-9 if rank == victim else 1 for rank in range(world)], crash  # the others fail
        assert crash["seconds"] < 20, crash  # mostly the time before the kill
        assert crash["again"] == [0] * world, crash
        assert crash["equal"] == [True] * world, crash  # to an undisturbed run
        if crash["step"] is not None:  # it loses no checkpoint (and may have saved another one)
            assert crash["from"][0] >= (crash["step"] - 1) // 4 * 4, crash
    assert any(crash["from"][0] for crash in crashes)  # some runs did resume
