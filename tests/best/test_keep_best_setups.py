"""KeepBest refuses setups in which it cannot know or copy the best weights."""

import copy

import pytest
from fitting import DATA
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lit import all_equal, trainer
from whole_set import Regression

from lightning_rprop import FullBatch, FullBatchLoader, KeepBest, Rprop


def half(params):
    first, *others = params
    return Rprop([{"params": [first], "maximize": True}, {"params": others}])


def sliced(params):
    params = [*params]
    params[0]._fsdp_flattened = True
    return Rprop(params)


class Another(KeepBest):
    pass


@pytest.mark.parametrize(
    ("callbacks", "make", "message"),
    [
        ([KeepBest()], Rprop, r"no FullBatch among the callbacks. Add FullBatch\(\)"),
        (
            [FullBatch(), KeepBest(), Another()],
            Rprop,
            "KeepBest is among the callbacks more than once: leave one",
        ),
        ([FullBatch(), KeepBest()], half, "only some parameter groups have maximize=True. Set it for all groups"),
        (
            [FullBatch(), KeepBest()],
            sliced,
            "cannot copy the parameters of FullyShardedDataParallel .version 1.* Use strategy='ddp'",
        ),
    ],
)
def test_bad_setups_are_refused(callbacks, make, message, tmp_path):
    module = Regression(make)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, callbacks).fit(module, FullBatchLoader(DATA))
    assert all_equal(module.state_dict().values(), before.values())


def test_two_are_refused_by_lightning(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `KeepBest`"):
        trainer(tmp_path, [FullBatch(), KeepBest(), KeepBest()])


def test_restore_must_be_a_bool():
    with pytest.raises(ValueError, match="restore must be True or False, got 'no'"):
        KeepBest("no")
