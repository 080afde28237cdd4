"""Ranks that are set up differently fail with an error, in real processes (gloo)."""

import torch
from disagreement_ranks import WORLD
from programs import HELPERS, run

DIFFERENCES = {
    "same": None,
    "path": None,  # ranks may use different implementations
    "lr": ["lr is 0.1 on rank 0, 0.2 on rank 1", "lr is 0.1 on rank 0, 0.3 on rank 2"],
    "variant": ["variant is 'irprop-' on rank 0, 'irprop+' on rank 2"],
    "group": ["of parameter group 1 etas is (0.5, 1.2) on rank 0, (0.5, 1.5) on rank 1"],
    "width": ["net.0.weight is (8, 5) float32 on rank 0, (9, 5) float32 on rank 1"],
    "bias": ["net.0.bias is (8,) float32 on rank 0, missing on rank 1"],
    "adam": ["lr is 0.1 on rank 0, 0.2 on rank 1"],
    "parameters": ["the number of parameters is 4 on rank 0, 3 on rank 1"],
    "monitor only": ["lr is 0.1 on rank 0, 0.2 on rank 1"],
}


def test_ranks_name_all_differences(tmp_path):
    run(tmp_path, HELPERS / "disagreement_ranks.py")
    for rank in range(WORLD):
        seen = torch.load(tmp_path / f"seen-{rank}.pt")
        assert seen.keys() == DIFFERENCES.keys()
        for case, words in DIFFERENCES.items():
            error = seen[case]["error"]
            if words is None:
                assert error is None
            else:
                assert all(word in error for word in words), error
        assert seen["width"]["collectives"] == [2]  # numbers; the check comes before that of DDP
        assert seen["lr"]["collectives"] == [2, 2]
        assert seen["same"]["collectives"] == seen["path"]["collectives"]  # only FullBatch checks
