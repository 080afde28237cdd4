"""Full batches on one, two and three ranks (gloo): exact gradients, one all-reduce per evaluation."""

import copy

import pytest
import torch
from full_batch_ranks import SAMPLES, WORLDS, Absolute, halving
from lit import all_equal
from programs import HELPERS, run
from whole_set import Regression, exact, make_data, relative_error, whole_numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run all ranks and return the folder with their results."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, HELPERS / "full_batch_ranks.py")
    return folder


@pytest.fixture(params=WORLDS)
def ranks(request, folder):
    """Load the results of each rank, by case."""
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def fits(ranks):
    """Return the cases that fit all samples."""
    return [case for case, seen in ranks[0].items() if isinstance(seen, dict) and "zero" not in case]


def samples(case):
    """Return the data of a case."""
    n = case[0] if isinstance(case, tuple) else 2 if case in ("short DataLoader", "log of few") else 103
    return make_data(n)


def test_gradient_and_loss_are_exact_on_ranks(ranks):
    for case in fits(ranks):
        if case == "whole numbers":
            continue
        loss, gradient = exact(Regression().net, samples(case))
        for rank in ranks:
            # float32 rounding; plain gradient accumulation is off by 1e-2 to 5e1 here
            assert relative_error(rank[case]["gradient"], gradient) < 1e-6, case
            assert rank[case]["losses"][0] == pytest.approx(loss, rel=1e-6), case


def test_ranks_have_equal_losses_and_parameters(ranks):
    for case in fits(ranks):
        for rank in ranks[1:]:
            assert rank[case].get("losses") == ranks[0][case].get("losses"), case
            assert all_equal(rank[case]["parameters"], ranks[0][case]["parameters"]), case


def test_one_all_reduce_per_evaluation(ranks):
    evaluations = {"LBFGS": None, "whole numbers": None, "max_iter": 12, "log": 2, "log of few": 2}
    for case in fits(ranks):
        expected = evaluations.get(case, 3)
        if expected is not None:
            assert all(rank[case]["reductions"] == expected for rank in ranks), case


def test_every_sample_is_seen_once_over_ranks(ranks):
    for case in fits(ranks):
        if not isinstance(case, tuple):
            continue
        n, size, _ = case
        batches = [rank[case]["targets"] for rank in ranks]
        assert len(set(map(len, batches))) == 1  # so that the collectives match
        assert all(size is None or len(batch) <= size for rank in batches for batch in rank)
        seen = torch.cat([batch for rank in batches for batch in rank[: len(rank) // 3]])
        has_fillers = n < len(ranks) or size == 1  # samples that keep a rank in step but do not count
        if not has_fillers:
            assert torch.equal(seen.sort().values, make_data(n)[1].flatten().sort().values), case
        else:
            assert set(seen.tolist()) == set(make_data(n)[1].flatten().tolist()), case


def test_log_averages_over_samples_of_all_ranks(ranks):
    for rank in ranks:
        for seen in (rank["log"], rank["log of few"]):
            assert seen["metrics"]["loss_epoch"].item() == pytest.approx(sum(seen["losses"]) / 2, rel=1e-6)
            assert seen["metrics"]["loss_step"].item() == pytest.approx(seen["losses"][-1], rel=1e-6)
            assert seen["metrics"]["own"] == 1  # even on a rank without samples
        seen = rank["log"]
        shares = [(r + 1) * 103 // len(ranks) - r * 103 // len(ranks) for r in range(len(ranks))]
        weighed = sum(r * share for r, share in enumerate(shares)) / 103
        assert seen["metrics"]["rank"].item() == pytest.approx(weighed, rel=1e-6)


DIFFERENCES = {
    "different data": "the number of samples is 10 on rank 0, 11 on rank 1",
    "different order": "the checksum of the data is ",
    "different order streamed": "the checksum of the data is ",
    "different batch sizes": "the batch size is 3 on rank 0, 4 on rank 1",
    "different samplers": "the order of the samples is ",
    "different steps": "steps_per_epoch is 1 on rank 0, 2 on rank 1",
    "different sizes": "micro_batch_size is 4 on rank 0, 5 on rank 1",
    "different reductions": "FullBatch's reduction is mean on rank 0, sum on rank 1",
    "different weights": "whether FullBatch has a weight is True on rank 0, False on rank 1",
    "held and streamed": "what is done with the data is streamed on rank 0, held on rank 1",
}


def test_different_data_fail_on_every_rank(ranks):
    for case, words in DIFFERENCES.items():
        for rank in ranks:
            assert (case in rank) == (len(ranks) > 1)
            if case in rank:
                assert "the ranks have different data: " in rank[case]
                assert words in rank[case]
                assert "Give every rank the whole set, in the same order (seed a random split)" in rank[case]


def test_zero_weights_are_left_out_on_ranks(ranks):
    cases = [case for case in ranks[0] if "zero" in case]
    assert len(cases) == 8
    for case in cases:
        seen = ranks[0][case]
        x, y = make_data(seen["n"])
        loss, gradient = exact(Regression().net, (x[seen["counted"]], y[seen["counted"]]))
        for rank in ranks:
            assert relative_error(rank[case]["gradient"], gradient) < 1e-6, case  # float32 rounding
            assert rank[case]["losses"][0] == pytest.approx(loss, rel=1e-6), case
            assert rank[case]["metrics"]["logged_step"] == pytest.approx(rank[case]["losses"][-1], rel=1e-5), case
            assert all_equal(rank[case]["parameters"], seen["parameters"]), case


def test_loss_without_graph_may_weigh_zero(ranks):
    for rank in ranks:
        assert all_equal(rank["no graph"], ranks[0]["no graph"])
        assert all(param.isfinite().all() for param in rank["no graph"])


def test_log_sums_over_ranks_in_first_step(ranks):
    for rank in ranks:
        assert rank["sum of the first step"] == 12


def test_500_exact_steps_equal_a_plain_loop(ranks):
    module = Absolute(halving)
    x, y = whole_numbers(SAMPLES)
    optimizer = module.configure_optimizers()
    start = copy.deepcopy(list(module.parameters()))
    for _ in range(500):
        optimizer.zero_grad()
        (module.net(x) - y).abs().sum().backward()  # the sum instead of the mean: Rprop ignores the factor
        optimizer.step()
    assert not all_equal(start, module.parameters())
    for rank in ranks:
        assert all_equal(rank["whole numbers"]["parameters"], module.parameters())
