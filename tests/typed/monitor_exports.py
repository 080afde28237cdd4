"""The lazily imported names of ``lightning_rprop.monitor``, as a type checker must see them; checked by ``mypy``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rprop.monitor import StepSizeMonitor, plot_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import assert_type


def check() -> None:
    assert_type(StepSizeMonitor().every_n_steps, int | None)
    figure, _ = plot_run("logs")
    assert_type(figure, Figure)
