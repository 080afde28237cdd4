"""Types that ``mypy`` must infer for ``Rprop``; this code is never run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, tensor

from lightning_rprop import Rprop

if TYPE_CHECKING:
    from typing_extensions import assert_type


def tensor_closure() -> Tensor:
    return tensor(1.0)


def float_closure() -> float:
    return 1.0


def check(optimizer: Rprop) -> None:
    assert_type(optimizer.step(), None)
    assert_type(optimizer.step(loss=1.0), None)
    assert_type(optimizer.step(None, loss=tensor(1.0)), None)
    assert_type(optimizer.step(float_closure), float)
    assert_type(optimizer.step(tensor_closure), Tensor)
    assert_type(optimizer.step(tensor_closure, loss=tensor(1.0)), Tensor)
    assert_type(optimizer.shared_loss, bool)
