"""Pictures of a run: what is read back from its folder, what is drawn of it, and the command."""

import math
import os
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rprop.monitor.__main__ import main
from lightning_rprop.monitor._logs import read_series
from lightning_rprop.monitor.plot import plot_run, plot_series, save

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOGGERS = [CSVLogger, TensorBoardLogger]
KEY = "step_size/net.0.weight/median"


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close("all")


def write(logger, folder, *records):
    """Log to exactly this folder, as a Trainer would."""
    logger = logger(folder.parent, name="", version=folder.name)
    for step, metrics in records:
        logger.log_metrics(metrics, step=step)
    logger.save()
    logger.finalize("success")


def series(names, records=5, statistics=("median", "q10", "q90"), overall=True, **more):
    """A made-up run: every value differs, and is known from its parameter's place, its statistic's and its step."""
    steps = [10 * i + 9 for i in range(records)]
    made = {"loss": (steps, [1 / (i + 1) for i in range(records)])}
    for place, name in enumerate([*names, ""] if overall else names):
        for s, statistic in enumerate(statistics):
            values = [(place + 1) * 1e-3 * (1 + 0.1 * s) * 0.9**i for i in range(records)]
            made["/".join(filter(None, ("step_size", name, statistic)))] = (steps, values)
    return made | more


def parameters(count):
    return [f"layers.{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(count)]


def bands(ax):
    """``(steps, lowest, highest)`` of every filled band."""
    found = []
    for band in (c for c in ax.collections if isinstance(c, matplotlib.collections.PolyCollection)):
        for path in band.get_paths():
            steps = sorted({float(x) for x in path.vertices[:, 0]})
            ends = [[y for x, y in path.vertices if x == step] for step in steps]
            found.append((steps, [min(e) for e in ends], [max(e) for e in ends]))
    return found


def curves(ax):
    return [line for line in ax.lines if line.get_linestyle() == "-"]


def dashed(ax):
    return sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def visible(axis):
    """The labels that are within the axis."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def inside(fig, artist):
    box, whole = artist.get_window_extent(), fig.bbox
    return whole.x0 <= box.x0 < box.x1 <= whole.x1 and whole.y0 <= box.y0 < box.y1 <= whole.y1


# What is read


@pytest.mark.parametrize("logger", LOGGERS)
def test_what_a_logger_wrote_is_read_back(logger, tmp_path):
    write(
        logger,
        tmp_path / "run",
        (4, {"loss": 0.75}),
        (4, {KEY: 2.0**-20, "step_size/at_lower_bound": 0.0}),  # another row of the same step
        (9, {KEY: math.nan, "loss": math.inf}),
        (14, {KEY: 50.0}),
    )
    found = read_series(tmp_path / "run")
    assert found.keys() == {"loss", KEY, "step_size/at_lower_bound"}
    assert found["loss"] == ([4, 9], [0.75, math.inf])
    assert found["step_size/at_lower_bound"] == ([4], [0.0])
    steps, values = found[KEY]
    assert steps == [4, 9, 14]
    np.testing.assert_array_equal(values, [2.0**-20, math.nan, 50.0])
    assert all(type(step) is int for step in steps)
    assert all(type(value) is float for value in values)
    assert read_series(str(tmp_path / "run")).keys() == found.keys()


@pytest.mark.parametrize("logger", LOGGERS)
def test_layers_are_in_their_order(logger, tmp_path):
    names = [f"net.{i}.weight" for i in (0, 2, 10)]
    write(logger, tmp_path / "run", (0, {f"step_size/{name}/mean": 1.0 for name in names}))
    assert list(read_series(tmp_path / "run")) == [f"step_size/{name}/mean" for name in names]


def test_tensorboard_keys_come_as_they_were_logged(tmp_path):
    write(TensorBoardLogger, tmp_path / "run", (0, {"step_size/z/mean": 1.0, "step_size/a/mean": 1.0, "loss": 1.0}))
    assert list(read_series(tmp_path / "run")) == ["step_size/z/mean", "step_size/a/mean", "loss"]


def test_no_scalar_of_a_long_tensorboard_run_is_dropped(tmp_path):
    write(TensorBoardLogger, tmp_path / "run", *((step, {KEY: 1.0}) for step in range(10_050)))
    assert read_series(tmp_path / "run")[KEY][0] == list(range(10_050))


def test_a_resumed_run_has_two_event_files(tmp_path):
    run = tmp_path / "run"
    write(TensorBoardLogger, run, *((step, {KEY: 1.0}) for step in (0, 1, 2, 3)))
    (first,) = run.glob("*tfevents*")
    _, _, _, when, *rest = first.name.split(".")
    first.rename(run / ".".join(["events.out.tfevents", f"{int(when) - 60:010d}", *rest]))  # a minute ago
    write(TensorBoardLogger, run, *((step, {KEY: 2.0, "loss": 3.0}) for step in (2, 3, 4)))
    assert len(list(run.glob("*tfevents*"))) == 2
    found = read_series(run)
    assert found[KEY] == ([0, 1, 2, 3, 4], [1.0, 1.0, 2.0, 2.0, 2.0])
    assert found["loss"] == ([2, 3, 4], [3.0, 3.0, 3.0])


@pytest.mark.parametrize("logger", LOGGERS)
def test_of_a_step_logged_twice_the_later_counts(logger, tmp_path):
    write(logger, tmp_path / "run", *((step, {KEY: float(i)}) for i, step in enumerate((0, 2, 4, 1, 2, 5))))
    assert read_series(tmp_path / "run")[KEY] == ([0, 1, 2, 4, 5], [0.0, 3.0, 4.0, 2.0, 5.0])


def test_a_csv_that_a_killed_run_left(tmp_path):
    write(CSVLogger, tmp_path / "run", (1, {KEY: 0.5, "note": "text"}), (2, {KEY: 0.25}))
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("some text\n")
        file.write("more,3,text,than columns\n")
        file.write("0.125")
    assert read_series(tmp_path / "run") == {KEY: ([1, 2], [0.5, 0.25])}


def test_an_event_file_that_a_killed_run_left(tmp_path, capfd):
    write(TensorBoardLogger, tmp_path / "run", (1, {KEY: 0.5}), (2, {KEY: 0.25}))
    (file,) = (tmp_path / "run").glob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-3])
    assert read_series(tmp_path / "run") == {KEY: ([1], [0.5])}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_one_run_below_with_step_sizes_is_found(logger, tmp_path):
    write(logger, tmp_path / "logs" / "version_0", (0, {"loss": 1.0}))
    write(logger, tmp_path / "logs" / "version_1", (0, {KEY: 2.0}))
    assert read_series(tmp_path) == {KEY: ([0], [2.0])}


def test_a_folder_with_logs_is_not_searched_below(tmp_path):
    write(CSVLogger, tmp_path / "run", (0, {KEY: 1.0}))
    write(CSVLogger, tmp_path / "run" / "other", (0, {KEY: 2.0}))
    assert read_series(tmp_path / "run") == {KEY: ([0], [1.0])}


@pytest.mark.parametrize(("in_csv", "taken"), [({KEY: 1.0}, 1.0), ({"loss": 1.0}, 2.0)])
def test_of_both_the_csv_is_read_if_it_has_step_sizes(in_csv, taken, tmp_path):
    write(CSVLogger, tmp_path / "run", (0, in_csv))
    write(TensorBoardLogger, tmp_path / "run", (0, {KEY: 2.0}))
    assert read_series(tmp_path / "run") == {KEY: ([0], [taken])}


def test_errors_of_reading_name_the_folder_and_the_remedy(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent; name the folder"):
        read_series(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"neither a metrics\.csv nor .* in .*empty or below; name the folder"):
        read_series(empty)
    for logger in LOGGERS:
        folder = tmp_path / logger.__name__
        write(logger, folder, (0, {"loss": 1.0}))
        with pytest.raises(ValueError, match=rf"{folder.name} hold no step sizes .*StepSizeMonitor\(\)"):
            read_series(folder)
    for version in range(12):
        write(CSVLogger, tmp_path / "many" / f"version_{version}", (0, {KEY: 1.0}))
    listed = ", ".join(f"version_{version}" for version in range(10))
    with pytest.raises(ValueError, match=rf"12 runs below .*many .* name one: {listed} and 2 more$"):
        read_series(tmp_path / "many")
    write(TensorBoardLogger, tmp_path / "events", (0, {KEY: 1.0}))
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    with pytest.raises(ModuleNotFoundError, match=r"events holds .* pip install tensorboard"):
        read_series(tmp_path / "events")


# What is drawn


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_parameter_is_a_line_in_a_band(count):
    names = parameters(count)
    made = series(names)
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
def test_the_line_and_the_band_are_of_what_is_logged(statistics, line, band):
    made = series(["w"], statistics=statistics)
    _, (_, ax) = plot_series(made)
    explained = f"line: {line}" + (f"\nband: {band[0]} to {band[1]}" if band else "")
    assert ax.get_legend().get_title().get_text() == explained
    assert [list(drawn.get_ydata()) for drawn in curves(ax)] == [made[f"step_size/w/{line}"][1]]
    drawn = [sorted([low, high]) for _, low, high in bands(ax)]
    assert drawn == ([sorted(made[f"step_size/w/{end}"][1] for end in band)] if band else [])


def test_the_line_is_what_most_parameters_have():
    made = series(["a", "b"], statistics=("mean",)) | {"step_size/a/median": ([9], [1.0])}
    _, (_, ax) = plot_series(made)
    assert [list(line.get_ydata()) for line in curves(ax)] == [made[f"step_size/{name}/mean"][1] for name in "ab"]


def test_the_heat_map_and_the_line_above_it_need_not_be_of_the_same():
    made = series(parameters(11), statistics=("mean",), overall=False) | series([], statistics=("median", "q10", "q90"))
    _, (_, above, below) = plot_series(made)
    assert above.get_legend().get_title().get_text() == "line: median\nband: q10 to q90"
    assert below.child_axes[0].get_ylabel() == "step size: mean"


def test_what_is_logged_at_other_steps_stays_there():
    made = series(["a"]) | {"step_size/a/q10": ([9, 12, 19], [1e-4, 2e-4, 3e-4])}
    _, (_, ax) = plot_series(made)
    (line,) = curves(ax)
    values = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert values[19] == made["step_size/a/median"][1][1]
    assert math.isnan(values[12])


def test_without_single_parameters_all_of_them_are_one_line():
    made = series([])
    _, (_, ax) = plot_series(made)
    assert legend(ax) == ["all parameters"]
    assert list(curves(ax)[0].get_ydata()) == made["step_size/median"][1]
    assert bands(ax)[0][1:] == (made["step_size/q10"][1], made["step_size/q90"][1])


@pytest.mark.parametrize("count", [3, 12])
def test_the_bounds_are_dashed_lines_with_their_values(count):
    bounds = {"step_size/lower_bound": ([9, 19], [1e-6] * 2), "step_size/upper_bound": ([9, 19], [50.0] * 2)}
    _, axes = plot_series(series(parameters(count), **bounds))
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
    _, (_, ax) = plot_series(series(["a"], **{"step_size/lower_bound": ([9], [0.0])}))
    assert dashed(ax) == []  # a log axis has no place for it


def test_the_losses_are_chosen_by_the_last_part_of_their_key():
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
    _, (ax, _) = plot_series(series(["a"], **more))
    assert legend(ax) == ["loss", "train/Loss", "val_loss_step", "test_loss_epoch"]
    assert [list(line.get_ydata()) for line in curves(ax)[1:]] == [[3.0, 2.0], [1.0], [1.0, 0.5]]
    assert [line.get_marker() for line in curves(ax)] == ["", "", "o", ""]  # of one value there is no line
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, -2.0]])
def test_a_loss_that_is_not_positive_is_on_a_linear_axis(values):
    _, (ax, _) = plot_series(series(["a"], loss=([9, 19], values)))
    assert ax.get_yscale() == "linear"


def test_without_a_loss_there_is_no_panel_for_it():
    made = series(["a"])
    del made["loss"]
    _, axes = plot_series(made)
    assert [ax.get_ylabel() for ax in axes] == ["step size"]


def test_of_many_losses_the_shortest_names_are_drawn():
    more = {f"train/part_{i:02d}_loss": ([9], [1.0]) for i in range(24)} | {"val_loss": ([9], [1.0])}
    fig, (ax, _) = plot_series(series(["a"], **more))
    assert legend(ax) == ["loss", *(f"train/part_{i:02d}_loss" for i in range(6)), "val_loss"]
    assert ax.get_legend().get_title().get_text() == "8 of 26 losses"
    assert len({line.get_color() for line in curves(ax)}) == 8
    fig.canvas.draw()
    assert inside(fig, ax.get_legend())


@pytest.mark.parametrize("overall", [True, False])
def test_more_than_ten_parameters_are_a_heat_map(overall):
    names = parameters(11)[::-1]  # not the order of the alphabet
    made = series(names, overall=overall)
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
    assert ax.get_ylim() == (10.5, -0.5)  # the first on top
    assert isinstance(mesh.norm, matplotlib.colors.LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (np.min(expected), np.max(expected))
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "step size: median"
    assert bar.get_yscale() == "log"
    if overall:
        assert legend(axes[1]) == ["all parameters"]
        assert list(curves(axes[1])[0].get_ydata()) == made["step_size/median"][1]


@pytest.mark.parametrize("count", [40, 160])
def test_every_name_at_the_heat_map_is_readable(count):
    fig, axes = plot_series(series(parameters(count), records=2))
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in axes[-1].get_yticklabels()]
    assert len(boxes) == count
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    assert min(box.height for box in boxes) / fig.dpi * 72 > 6  # points
    assert all(inside(fig, text) for text in axes[-1].get_yticklabels()[:: count - 1])


def test_a_thousand_parameters_make_no_endless_picture():
    fig, axes = plot_series(series(parameters(1000), records=1))
    assert fig.get_size_inches()[1] < 70
    labels = [text.get_text() for text in axes[-1].get_yticklabels()]
    assert labels == parameters(1000)[::3]
    assert axes[-1].collections[0].get_array().shape == (1000, 1)


@pytest.mark.parametrize("count", [3, 11])
def test_one_record_is_seen(count):
    made = series(parameters(count), records=1)
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
def test_what_is_not_finite_leaves_a_gap(count):
    made = series(parameters(count))
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
    made = {key: (steps, [value] * len(steps)) for key, (steps, _) in series(parameters(count)).items()} | more
    fig, axes = plot_series(made)
    fig.canvas.draw()
    assert len(axes) == (2 if count == 3 else 3) - math.isnan(value)
    if value and count == 11:
        norm = axes[-1].collections[0].norm
        middle = 1.0 if math.isnan(value) else value
        assert norm.vmax / norm.vmin == pytest.approx(10)
        assert math.sqrt(norm.vmax * norm.vmin) == pytest.approx(middle)


@pytest.mark.parametrize("count", [3, 11])
def test_long_names_are_cut_where_they_still_differ(count):
    names = [f"_model.{'a_long_wrapper.' * 6}layers.{i}.$x$.weight" for i in range(count - 1)] + ["_short" + 38 * "x"]
    fig, axes = plot_series(series(names))
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


def test_names_are_cut_less_where_they_would_be_the_same():
    _, axes = plot_series(series([f"{'a' * 20}{i}{'b' * 40}" for i in range(3)]))
    assert len({*legend(axes[1])}) == 3


def test_a_key_without_a_value_is_not_there():
    empty = {"val_loss": ([], []), "step_size/b/median": ([], []), "step_size/lower_bound": ([], [])}
    _, axes = plot_series(series(["a"], **empty))
    assert [legend(ax) for ax in axes] == [["loss"], ["a"]]
    assert dashed(axes[1]) == []


def test_a_title_is_no_mathematics():
    fig, _ = plot_series(series(["a"]), title="$HOME/{runs$")
    fig.canvas.draw()
    assert fig.get_suptitle() == "$HOME/{runs$"


def test_errors_of_drawing_name_the_remedy(monkeypatch):
    for nothing in ({}, {"loss": ([1], [1.0])}, {"step_size/mean": ([], [])}):
        with pytest.raises(ValueError, match=r"no step size to draw .*StepSizeMonitor\(\)"):
            plot_series(nothing)
    with pytest.raises(ValueError, match=r"only at_lower_bound, lower_bound; let StepSizeMonitor log 'median'"):
        plot_series({"step_size/a/at_lower_bound": ([1], [1.0]), "step_size/lower_bound": ([1], [1.0])})
    assert not plt.get_fignums()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-rprop\[plot\]'"):
        plot_series(series(["a"]))


def test_a_folder_is_drawn(tmp_path):
    write(CSVLogger, tmp_path / "logs" / "version_3", (4, {KEY: 0.5, "loss": 2.0}), (9, {KEY: 0.25, "loss": 1.0}))
    fig, axes = plot_run(tmp_path / "logs" / "version_3")
    assert fig.get_suptitle() == "logs/version_3"
    assert [list(curves(ax)[0].get_ydata()) for ax in axes] == [[2.0, 1.0], [0.5, 0.25]]


# What is written


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("new/folder/a.svg", b"<?xml"), ("a.b.png", b"\x89P")],
)
def test_a_picture_is_saved_in_the_format_of_its_suffix(name, start, tmp_path):
    fig, _ = plot_series(series(["a"]))
    save(fig, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("name", ["new/a.xyz", "new/a"])
def test_an_unknown_suffix_is_refused_before_anything_is_written(name, tmp_path):
    fig, _ = plot_series(series(["a"]))
    with pytest.raises(ValueError, match=rf"the suffix of '.*{name}' must be a picture format: .*png"):
        save(fig, str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    fig, _ = plot_series(series(["a"]))

    def full_disk(name, **_):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(fig, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(fig, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    assert not plt.fignum_exists(fig.number)


# The command


def command(*arguments, folder):
    """As from a notebook's terminal, which names a backend that the process need not have."""
    environment = os.environ | {"MPLBACKEND": "module://notebook_backend", "MPLCONFIGDIR": matplotlib.get_cachedir()}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "lightning_rprop.monitor", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_draws_a_run_and_tells_where(tmp_path):
    write(CSVLogger, tmp_path / "run", (4, {KEY: 0.5}), (9, {KEY: 0.25}))
    done = command("run", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "step_sizes.png\n", "")
    assert (tmp_path / "step_sizes.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_in_one_line(tmp_path):
    done = command("absent", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("python -m lightning_rprop.monitor: error: there is no folder absent")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "hidden", "message"),
    [
        ("a.xyz", None, "the suffix of"),
        ("run/metrics.csv/a.png", None, "metrics.csv"),  # a file where a folder should be
        ("a.png", "matplotlib.pyplot", "pip install 'lightning-rprop[plot]'"),
    ],
)
def test_what_fails_later_is_one_line_too(output, hidden, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")  # which the command sets
    write(CSVLogger, tmp_path / "run", (4, {KEY: 0.5}))
    if hidden:
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(SystemExit) as failed:
        main([str(tmp_path / "run"), "--output", str(tmp_path / output)])
    out, err = capsys.readouterr()
    assert failed.value.code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    write(TensorBoardLogger, tmp_path / "run", (4, {KEY: 0.5}))
    main([str(tmp_path / "run"), "-o", str(tmp_path / "a.pdf")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.pdf'}\n"
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_drawing_needs_no_torch():
    code = (
        "import sys, lightning_rprop.monitor.__main__ as m; "
        "print(*{'torch', 'lightning', 'matplotlib', 'tensorboard'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"
