"""Plots of up to ten parameters: lines in bands, bounds and losses."""

import math

import pytest
from lightning.pytorch.loggers import CSVLogger
from monitor_plots import KEY, bands, curves, dashed, inside, legend, make_series, parameters, write

from lightning_rprop.monitor.plot import plot_run, plot_series


@pytest.mark.parametrize("count", [1, 3, 10])
def test_parameter_is_a_line_in_a_band(count):
    names = parameters(count)
    made = make_series(names)
    fig, axes = plot_series(made, title="a run")
    loss, below = axes
    assert fig.get_suptitle() == "a run"
    assert axes.dtype == object
    assert loss.get_position().y0 > below.get_position().y0
    assert below.get_yscale() == "log"
    assert legend(below) == names
    assert below.get_legend().get_title().get_text() == "line: median\nband: q10 to q90"
    assert len(curves(below)) == len(bands(below)) == count
    for name, line, (steps, low, high) in zip(names, curves(below), bands(below), strict=True):
        assert list(line.get_xdata()) == steps == made[f"step_size/{name}/median"][0]
        assert list(line.get_ydata()) == made[f"step_size/{name}/median"][1]
        assert low == made[f"step_size/{name}/q10"][1]
        assert high == made[f"step_size/{name}/q90"][1]
    assert len({line.get_color() for line in curves(below)}) == count
    shown = [line.get_color() for line in below.get_legend().get_lines()]
    assert shown == [line.get_color() for line in curves(below)]
    (line,) = curves(loss)
    assert (list(line.get_xdata()), list(line.get_ydata())) == made["loss"]
    assert not line.get_marker()
    assert loss.get_yscale() == "log"
    assert legend(loss) == ["loss"]
    assert loss.get_shared_x_axes().joined(loss, below)
    assert below.get_xlabel() == "optimizer step"
    fig.canvas.draw()


@pytest.mark.parametrize(
    ("statistics", "line", "band"),
    [
        (("mean", "min", "max"), "mean", ("min", "max")),
        (("min", "max", "mean", "median"), "median", ("min", "max")),
        (("mean", "q90", "q2.5", "q10", "min", "max"), "mean", ("q2.5", "q90")),
        (("mean", "q10", "min", "max"), "mean", ("min", "max")),
        (("q25", "q75", "q50"), "q50", ("q25", "q75")),
        (("q1", "q40", "q99"), "q40", ("q1", "q99")),
        (("min", "max"), "max", ("min", "max")),
        (("min",), "min", None),
        (("max", "mean"), "mean", None),
        (("mean", "at_lower_bound", "std_log10"), "mean", None),
    ],
)
def test_line_and_band_depend_on_statistics(statistics, line, band):
    made = make_series(["w"], statistics=statistics)
    _, (_, ax) = plot_series(made)
    explained = f"line: {line}" + (f"\nband: {band[0]} to {band[1]}" if band else "")
    assert ax.get_legend().get_title().get_text() == explained
    assert [list(drawn.get_ydata()) for drawn in curves(ax)] == [made[f"step_size/w/{line}"][1]]
    drawn = [sorted([low, high]) for _, low, high in bands(ax)]
    assert drawn == ([sorted(made[f"step_size/w/{end}"][1] for end in band)] if band else [])


def test_line_is_the_most_common_statistic():
    made = make_series(["a", "b"], statistics=("mean",)) | {"step_size/a/median": ([9], [1.0])}
    _, (_, ax) = plot_series(made)
    assert [list(line.get_ydata()) for line in curves(ax)] == [made[f"step_size/{name}/mean"][1] for name in "ab"]


def test_values_at_other_steps_keep_their_step():
    made = make_series(["a"]) | {"step_size/a/q10": ([9, 12, 19], [1e-4, 2e-4, 3e-4])}
    _, (_, ax) = plot_series(made)
    (line,) = curves(ax)
    values = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert values[19] == made["step_size/a/median"][1][1]
    assert math.isnan(values[12])


def test_run_without_parameters_draws_totals():
    made = make_series([])
    _, (_, ax) = plot_series(made)
    assert legend(ax) == ["all parameters"]
    assert list(curves(ax)[0].get_ydata()) == made["step_size/median"][1]
    assert bands(ax)[0][1:] == (made["step_size/q10"][1], made["step_size/q90"][1])


@pytest.mark.parametrize("count", [3, 12])
def test_bounds_are_labelled_dashed_lines(count):
    bounds = {"step_size/lower_bound": ([9, 19], [1e-6] * 2), "step_size/upper_bound": ([9, 19], [50.0] * 2)}
    _, axes = plot_series(make_series(parameters(count), **bounds))
    labels = {"lower bound 1e-06": 1e-6, "upper bound 50": 50.0}
    assert dashed(axes[1]) == sorted(labels.values())
    assert {text.get_text(): text.xy[1] for text in axes[1].texts} == labels
    low, high = axes[1].get_ylim()
    assert low < 1e-6 < 50.0 < high
    if count == 12:
        (bar,) = axes[2].child_axes
        assert dashed(bar) == sorted(labels.values())
        assert {text.get_text(): text.xy[1] for text in bar.texts} == labels
        assert bar.get_ylim() == pytest.approx((1e-6, 50.0))
    _, (_, ax) = plot_series(make_series(["a"], **{"step_size/lower_bound": ([9], [0.0])}))
    assert dashed(ax) == []  # a log axis cannot show 0


def test_losses_are_chosen_by_last_part_of_key():
    steps = [9, 19]
    more = {
        "train/Loss": (steps, [3.0, 2.0]),
        "val_loss_step": ([10], [1.0]),
        "val_loss_epoch": (steps, [1.0, 1.0]),
        "test_loss_epoch": (steps, [1.0, 0.5]),
        "loss/accuracy": (steps, [0.0, 1.0]),
        "always_nan_loss": (steps, [math.nan, math.inf]),
        "lr-Rprop": (steps, [1.0, 1.0]),
        "step_size/loss/median": (steps, [1.0, 1.0]),
    }
    _, (ax, _) = plot_series(make_series(["a"], **more))
    assert legend(ax) == ["loss", "train/Loss", "val_loss_step", "test_loss_epoch"]
    assert [list(line.get_ydata()) for line in curves(ax)[1:]] == [[3.0, 2.0], [1.0], [1.0, 0.5]]
    assert [line.get_marker() for line in curves(ax)] == ["", "", "o", ""]  # a single value needs a marker
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, -2.0]])
def test_nonpositive_loss_has_a_linear_axis(values):
    _, (ax, _) = plot_series(make_series(["a"], loss=([9, 19], values)))
    assert ax.get_yscale() == "linear"


def test_run_without_loss_has_no_loss_panel():
    made = make_series(["a"])
    del made["loss"]
    _, axes = plot_series(made)
    assert [ax.get_ylabel() for ax in axes] == ["step size"]


def test_eight_shortest_loss_names_are_drawn():
    more = {f"train/part_{i:02d}_loss": ([9], [1.0]) for i in range(24)} | {"val_loss": ([9], [1.0])}
    fig, (ax, _) = plot_series(make_series(["a"], **more))
    assert legend(ax) == ["loss", *(f"train/part_{i:02d}_loss" for i in range(6)), "val_loss"]
    assert ax.get_legend().get_title().get_text() == "8 of 26 losses"
    assert len({line.get_color() for line in curves(ax)}) == 8
    fig.canvas.draw()
    assert inside(fig, ax.get_legend())


def test_plot_run_draws_a_folder(tmp_path):
    write(CSVLogger, tmp_path / "logs" / "version_3", (4, {KEY: 0.5, "loss": 2.0}), (9, {KEY: 0.25, "loss": 1.0}))
    fig, axes = plot_run(tmp_path / "logs" / "version_3")
    assert fig.get_suptitle() == "logs/version_3"
    assert [list(curves(ax)[0].get_ydata()) for ax in axes] == [[2.0, 1.0], [0.5, 0.25]]
