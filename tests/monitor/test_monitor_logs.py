"""read_series: the logged step sizes of a run, read back from its folder."""

import math
import sys

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitor_plots import KEY, LOGGERS, write

from lightning_rprop.monitor._logs import read_series


@pytest.mark.parametrize("logger", LOGGERS)
def test_logged_values_are_read_back(logger, tmp_path):
    write(
        logger,
        tmp_path / "run",
        (4, {"loss": 0.75}),
        (4, {KEY: 2.0**-20, "step_size/at_lower_bound": 0.0}),  # a second row of the same step
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
def test_layers_are_in_numeric_order(logger, tmp_path):
    names = [f"net.{i}.weight" for i in (0, 2, 10)]
    write(logger, tmp_path / "run", (0, {f"step_size/{name}/mean": 1.0 for name in names}))
    assert list(read_series(tmp_path / "run")) == [f"step_size/{name}/mean" for name in names]


def test_tensorboard_keys_keep_logged_order(tmp_path):
    write(TensorBoardLogger, tmp_path / "run", (0, {"step_size/z/mean": 1.0, "step_size/a/mean": 1.0, "loss": 1.0}))
    assert list(read_series(tmp_path / "run")) == ["step_size/z/mean", "step_size/a/mean", "loss"]


def test_long_tensorboard_run_is_read_in_full(tmp_path):
    write(TensorBoardLogger, tmp_path / "run", *((step, {KEY: 1.0}) for step in range(10_050)))
    assert read_series(tmp_path / "run")[KEY][0] == list(range(10_050))


def test_event_files_of_resumed_run_are_merged(tmp_path):
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
def test_later_value_of_a_repeated_step_wins(logger, tmp_path):
    write(logger, tmp_path / "run", *((step, {KEY: float(i)}) for i, step in enumerate((0, 2, 4, 1, 2, 5))))
    assert read_series(tmp_path / "run")[KEY] == ([0, 1, 2, 4, 5], [0.0, 3.0, 4.0, 2.0, 5.0])


def test_csv_of_a_killed_run_is_read(tmp_path):
    write(CSVLogger, tmp_path / "run", (1, {KEY: 0.5, "note": "text"}), (2, {KEY: 0.25}))
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("some text\n")
        file.write("more,3,text,than columns\n")
        file.write("0.125")
    assert read_series(tmp_path / "run") == {KEY: ([1, 2], [0.5, 0.25])}


def test_event_file_of_a_killed_run_is_read(tmp_path, capfd):
    write(TensorBoardLogger, tmp_path / "run", (1, {KEY: 0.5}), (2, {KEY: 0.25}))
    (file,) = (tmp_path / "run").glob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-3])
    assert read_series(tmp_path / "run") == {KEY: ([1], [0.5])}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("logger", LOGGERS)
def test_run_in_a_subfolder_is_found(logger, tmp_path):
    write(logger, tmp_path / "logs" / "version_0", (0, {"loss": 1.0}))
    write(logger, tmp_path / "logs" / "version_1", (0, {KEY: 2.0}))
    assert read_series(tmp_path) == {KEY: ([0], [2.0])}


def test_subfolders_of_a_run_are_ignored(tmp_path):
    write(CSVLogger, tmp_path / "run", (0, {KEY: 1.0}))
    write(CSVLogger, tmp_path / "run" / "other", (0, {KEY: 2.0}))
    assert read_series(tmp_path / "run") == {KEY: ([0], [1.0])}


@pytest.mark.parametrize(("in_csv", "taken"), [({KEY: 1.0}, 1.0), ({"loss": 1.0}, 2.0)])
def test_csv_with_step_sizes_is_preferred(in_csv, taken, tmp_path):
    write(CSVLogger, tmp_path / "run", (0, in_csv))
    write(TensorBoardLogger, tmp_path / "run", (0, {KEY: 2.0}))
    assert read_series(tmp_path / "run") == {KEY: ([0], [taken])}


def test_read_error_names_folder_and_remedy(tmp_path, monkeypatch):
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
