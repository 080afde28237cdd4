"""Plots of more than ten parameters: a heat map, below the line and band of all parameters."""

from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from monitor_plots import curves, inside, legend, make_series, parameters

from lightning_rprop.monitor.plot import plot_series


@pytest.mark.parametrize("overall", [True, False])
def test_eleven_parameters_are_a_heat_map(overall):
    names = parameters(11)[::-1]  # not in alphabetical order
    made = make_series(names, overall=overall)
    steps = [3, 4, 10, 50, 51]  # not equally spaced
    made = {key: (steps, values) for key, (_, values) in made.items()}
    fig, axes = plot_series(made)
    assert [ax.get_ylabel() for ax in axes] == ["loss", *["step size"] * overall, ""]
    assert all(axes[0].get_shared_x_axes().joined(axes[0], ax) for ax in axes)
    *_, ax = axes
    (mesh,) = ax.collections
    expected = [made[f"step_size/{name}/median"][1] for name in names]
    np.testing.assert_array_equal(mesh.get_array(), expected)
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [2.5, 3.5, 7, 30, 50.5, 51.5])
    assert list(mesh.get_coordinates()[:, 0, 1]) == [i - 0.5 for i in range(12)]
    fig.canvas.draw()
    assert [text.get_text() for text in ax.get_yticklabels()] == names
    assert list(ax.get_yticks()) == list(range(11))
    assert any(tick.label2.get_visible() and tick.label2.get_text() for tick in ax.xaxis.get_major_ticks())  # on top
    assert ax.get_ylim() == (10.5, -0.5)  # the first parameter on top
    assert isinstance(mesh.norm, matplotlib.colors.LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (np.min(expected), np.max(expected))
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "step size: median"
    assert bar.get_yscale() == "log"
    if overall:
        assert legend(axes[1]) == ["all parameters"]
        assert list(curves(axes[1])[0].get_ydata()) == made["step_size/median"][1]


def test_heat_map_may_show_another_statistic():
    """Other than the line above it, if different statistics were logged."""
    made = make_series(parameters(11), statistics=("mean",), overall=False)
    made |= make_series([], statistics=("median", "q10", "q90"))
    _, (_, above, below) = plot_series(made)
    assert above.get_legend().get_title().get_text() == "line: median\nband: q10 to q90"
    assert below.child_axes[0].get_ylabel() == "step size: mean"


@pytest.mark.parametrize("count", [40, 160])
def test_heat_map_names_are_readable(count):
    fig, axes = plot_series(make_series(parameters(count), records=2))
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in axes[-1].get_yticklabels()]
    assert len(boxes) == count
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    assert min(box.height for box in boxes) / fig.dpi * 72 > 6  # points
    assert all(inside(fig, text) for text in axes[-1].get_yticklabels()[:: count - 1])


def test_height_of_large_heat_map_is_limited():
    fig, axes = plot_series(make_series(parameters(1000), records=1))
    assert fig.get_size_inches()[1] < 70
    labels = [text.get_text() for text in axes[-1].get_yticklabels()]
    assert labels == parameters(1000)[::3]
    assert axes[-1].collections[0].get_array().shape == (1000, 1)
