"""Losses that are not finite on one of two ranks, in real processes (gloo)."""

import math

import pytest
import torch
from bad_loss_ranks import WORLD
from programs import HELPERS, run

FIRST = "at the first evaluation, before any move that could be undone; "


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return the results of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, HELPERS / "bad_loss_ranks.py")
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(WORLD)]


def test_all_ranks_retreat_together(seen):
    for case in ("irprop-", "irprop+", "rprop-", "rprop+", "zero"):
        one, other = (found[case] for found in seen)
        assert one["error"] is None, one["error"]
        assert all(map(math.isfinite, one["losses"])), case
        assert any(map(math.isnan, other["losses"])), case
        assert torch.equal(one["params"][0], other["params"][0]), case
        # the mean over both shifts of the derivative 1 - 1 / sqrt(w - shift) is 0 here
        w = one["params"][0].double()
        assert ((1 - w.rsqrt()) + (1 - (w - 0.5).rsqrt())).abs().max() < 1e-4, case
        assert len(one["warnings"]) == 1, case
        assert other["warnings"] == []
        assert one["published"] == other["published"] >= 1, case


def test_all_ranks_stop_together(seen):
    for found in seen:
        assert found["late"]["error"].startswith("The loss is nan at step 15 and was NaN or infinite 10 times in a row")


def test_all_ranks_name_the_same_reason(seen):
    reasons = {
        "first": "no parameter or input is NaN or infinite. Start from other parameters",
        "input": "batch[1] of micro-batch 1 on rank 1 has 1 of 2 entries that are NaN or infinite",
        "once": "batch[1] of micro-batch 0 on rank 0 has 1 of 12 entries that are NaN or infinite",
        "sharded": "parameter 'net.0.weight' on rank 1 has 1 of 20 entries that are NaN or infinite",
    }
    for case, reason in reasons.items():
        loss = "inf" if case in ("input", "once") else "nan"
        for found in seen:
            assert found[case]["error"].startswith(f"The loss is {loss} {FIRST}{reason}"), found[case]["error"]
