"""Plots of unusual runs, as lines and as a heat map: single records, gaps, long names, nothing to draw."""

import math
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from monitor_plots import curves, dashed, inside, legend, make_series, parameters, visible

from lightning_rprop.monitor.plot import plot_series


@pytest.mark.parametrize("count", [3, 11])
def test_single_record_is_visible(count):
    made = make_series(parameters(count), records=1)
    fig, axes = plot_series(made)
    fig.canvas.draw()
    for ax in axes[:2]:
        assert all(line.get_marker() == "o" and list(line.get_markevery()) == [0] for line in curves(ax))
    bars = [c for c in axes[1].collections if isinstance(c, matplotlib.collections.LineCollection)]
    name = parameters(count)[0] + "/" if count == 3 else ""
    ends = [made[f"step_size/{name}{end}"][1][0] for end in ("q10", "q90")]
    np.testing.assert_array_equal(bars[0].get_segments(), [[[9, ends[0]], [9, ends[1]]]])
    assert visible(axes[-1].xaxis) == ["9"]
    if count == 11:
        np.testing.assert_array_equal(axes[2].collections[0].get_coordinates()[0, :, 0], [8.5, 9.5])


@pytest.mark.parametrize("count", [3, 11])
def test_nonfinite_values_leave_a_gap(count):
    made = make_series(parameters(count))
    name = parameters(count)[1]
    for key in ("loss", "step_size/median", f"step_size/{name}/median", f"step_size/{name}/q10"):
        made[key] = (made[key][0], [1e-3, math.inf, 2e-3, math.nan, 3e-3])
    fig, axes = plot_series(made)
    fig.canvas.draw()
    for line in curves(axes[0]) if count == 11 else [*curves(axes[0]), curves(axes[1])[1]]:
        np.testing.assert_array_equal(line.get_ydata(), [1e-3, math.nan, 2e-3, math.nan, 3e-3])
        assert line.get_marker() == "o"
        assert list(line.get_markevery()) == [0, 2, 4]
    if count == 11:
        mesh = axes[2].collections[0]
        assert np.ma.getmaskarray(mesh.get_array())[1].tolist() == [False, True, False, True, False]
        assert "grey" in axes[2].child_axes[0].get_ylabel()
        assert mesh.cmap.get_bad()[0] == mesh.cmap.get_bad()[1] == 0.85


@pytest.mark.parametrize("count", [3, 11])
@pytest.mark.parametrize(("value", "bounds"), [(0.1, True), (0.1, False), (0.0, False), (math.nan, False)])
def test_equal_values_are_drawn(value, count, bounds):
    more = {"step_size/lower_bound": ([9], [1e-6]), "step_size/upper_bound": ([9], [50.0])} if bounds else {}
    made = {key: (steps, [value] * len(steps)) for key, (steps, _) in make_series(parameters(count)).items()} | more
    fig, axes = plot_series(made)
    fig.canvas.draw()
    assert len(axes) == (2 if count == 3 else 3) - math.isnan(value)
    if value and count == 11:
        norm = axes[-1].collections[0].norm
        middle = 1.0 if math.isnan(value) else value
        assert norm.vmax / norm.vmin == pytest.approx(10)
        assert math.sqrt(norm.vmax * norm.vmin) == pytest.approx(middle)


@pytest.mark.parametrize("count", [3, 11])
def test_long_names_are_shortened_in_the_middle(count):
    names = [f"_model.{'a_long_wrapper.' * 6}layers.{i}.$x$.weight" for i in range(count - 1)] + ["_short" + 38 * "x"]
    fig, axes = plot_series(make_series(names))
    fig.canvas.draw()
    texts = axes[1].get_legend().get_texts() if count == 3 else axes[2].get_yticklabels()
    labels = [text.get_text() for text in texts]
    assert len(set(labels)) == count
    assert max(map(len, labels)) <= 44
    assert labels[-1] == names[-1]
    for i, label in enumerate(labels[:-1]):
        head, tail = label.split("…")
        assert names[i].startswith(head)
        assert names[i].endswith(tail)
    assert not any(text.get_parse_math() for text in texts)
    assert all(inside(fig, text) for text in texts)


def test_shortened_names_stay_distinct():
    _, axes = plot_series(make_series([f"{'a' * 20}{i}{'b' * 40}" for i in range(3)]))
    assert len({*legend(axes[1])}) == 3


def test_keys_without_values_are_ignored():
    empty = {"val_loss": ([], []), "step_size/b/median": ([], []), "step_size/lower_bound": ([], [])}
    _, axes = plot_series(make_series(["a"], **empty))
    assert [legend(ax) for ax in axes] == [["loss"], ["a"]]
    assert dashed(axes[1]) == []


def test_title_is_not_parsed_as_math():
    fig, _ = plot_series(make_series(["a"]), title="$HOME/{runs$")
    fig.canvas.draw()
    assert fig.get_suptitle() == "$HOME/{runs$"


def test_plot_error_names_the_remedy(monkeypatch):
    for nothing in ({}, {"loss": ([1], [1.0])}, {"step_size/mean": ([], [])}):
        with pytest.raises(ValueError, match=r"no step size to draw .*StepSizeMonitor\(\)"):
            plot_series(nothing)
    with pytest.raises(ValueError, match=r"only at_lower_bound, lower_bound; let StepSizeMonitor log 'median'"):
        plot_series({"step_size/a/at_lower_bound": ([1], [1.0]), "step_size/lower_bound": ([1], [1.0])})
    assert not plt.get_fignums()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-rprop\[plot\]'"):
        plot_series(make_series(["a"]))
