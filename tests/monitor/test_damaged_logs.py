"""The plot command on damaged or unusual logs: it draws what it can read, and names what it cannot."""

import os
import re

import pytest
from pictures import is_png
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_rprop.monitor.__main__ import main
from lightning_rprop.monitor._logs import read_series

KEY = "step_size/mean"
HEADER = f"step,{KEY}\n".encode()


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    return run


def error_of(folder, capsys):
    """Run the command, and return the single line that it fails with."""
    with pytest.raises(SystemExit) as failed:
        main([str(folder), "-o", str(folder / "a.png")])
    out, err = capsys.readouterr()
    assert failed.value.code == 1
    assert out == ""
    assert err.count("\n") == 1
    assert not (folder / "a.png").exists()
    return err


def draws(folder):
    main([str(folder), "-o", str(folder / "a.png")])
    return is_png(folder / "a.png")


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        (b"inf,1\n", 3, "the step is inf"),
        (b"-inf,1\n", 3, "the step is -inf"),
        (b"nan,1\n", 3, "the step is nan"),
        (b"1e999,1\n", 3, "the step is inf"),
        (b"5," + b"1" * 200_000 + b"\n", 3, "field larger than field limit"),
        (b"5,1," + b"a" * 200_000 + b"\n", 3, "field larger than field limit"),
    ],
)
def test_error_names_damaged_line(lines, line, reason, folder, capsys):
    file = folder / "metrics.csv"
    file.write_bytes(HEADER + b"0,1\n" + lines + b"7,2\n")
    message = error_of(folder, capsys)
    assert re.search(rf"{re.escape(str(file))}, line {line}: {reason}.*\. Remove that line$", message)
    content = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(content[: line - 1] + content[line:]))  # follow the remedy
    assert read_series(folder) == {KEY: ([0, 7], [1.0, 2.0])}
    assert draws(folder)


def test_error_names_damaged_header(folder, capsys):
    (folder / "metrics.csv").write_bytes(f"step,{KEY},".encode() + b"a" * 200_000 + b"\n0,1,2\n")
    assert f"{folder / 'metrics.csv'}, line 1: field larger" in error_of(folder, capsys)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (f"step,{KEY},l\xe4_loss\n0,1,2\n".encode("latin-1"), {KEY, "l\xe4_loss"}),
        (f"step,{KEY},l\xe4_loss\n0,1,2\n".encode(), {KEY, "l\xe4_loss"}),
        (f"step,{KEY}\n0,1\n".encode("utf-8-sig"), {KEY}),
        (HEADER + b"\0" * 5000 + b"0,1\n" + b"\0" * 5000, {KEY}),
        (HEADER + b"text,2\n0,1\n,3\n", {KEY}),
        (f"step,{KEY}\r0,1\r".encode(), {KEY}),
    ],
    ids=["latin-1", "utf-8", "byte order mark", "zeros", "text as step", "carriage returns"],
)
def test_unusual_csv_is_read(content, keys, folder):
    (folder / "metrics.csv").write_bytes(content)
    found = read_series(folder)
    assert found.keys() == keys
    assert found[KEY] == ([0], [1.0])
    assert draws(folder)


@pytest.mark.parametrize(
    "content",
    [HEADER, f"epoch,{KEY}\n0,1\n".encode(), f"step;{KEY}\n0;1\n".encode(), HEADER + b'0,"1\n1,2\n', HEADER + b"0,\n"],
    ids=["header only", "no step", "semicolons", "open quote", "no value"],
)
def test_error_names_csv_without_records(content, folder, capsys):
    (folder / "metrics.csv").write_bytes(content)
    message = error_of(folder, capsys)
    assert f"{folder / 'metrics.csv'} has no step with a step size (keys 'step' and 'step_size/...')" in message


def test_error_names_folder_of_empty_csv(folder, capsys):
    (folder / "metrics.csv").write_bytes(b"")
    assert f"the logs in {folder} hold no step sizes" in error_of(folder, capsys)


@pytest.mark.parametrize("values", [b"1,1e308\n", b"1,1e308\n2,1e-200\n3,-1e308\n"])
@pytest.mark.parametrize("count", [1, 12])
def test_huge_values_do_not_break_the_plot(values, count, folder):
    """Matplotlib's axis limits would overflow."""
    keys = [f"step_size/{i}/mean" for i in range(count)] + ["step_size/upper_bound", "loss"]
    rows = [line + (b"," + line.partition(b",")[2]) * (count + 1) for line in (b"0,1", *values.splitlines())]
    (folder / "metrics.csv").write_bytes(",".join(["step", *keys]).encode() + b"\n" + b"\n".join(rows) + b"\n")
    assert draws(folder)


def test_error_names_damaged_event_file(folder, capsys):
    with (folder / "events.out.tfevents.1.host").open("wb") as file:
        RecordWriter(file).write(KEY.encode() + b"\xff\xff\xff")  # a valid record, but not an event
    message = error_of(folder, capsys)
    assert f"TensorBoard cannot read {folder} (events.out.tfevents.1.host): " in message


@pytest.mark.parametrize("content", [KEY.encode(), KEY.encode() * 1000, b"\xff" * 100 + KEY.encode()])
def test_error_names_file_without_events(content, folder, capsys):
    (folder / "events.out.tfevents.1.host").write_bytes(content)
    assert f"{folder} has no step with a step size" in error_of(folder, capsys)


def test_error_names_unreadable_subfolder(folder, capsys, monkeypatch):
    scan, hidden = os.scandir, folder / "hidden"
    hidden.mkdir()

    def scandir(path):  # instead of permissions, which root ignores
        if str(path) == str(hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"Permission denied: '{hidden}'" in error_of(folder, capsys)
    (folder / "other").mkdir()
    (folder / "other" / "metrics.csv").write_bytes(HEADER + b"0,1\n")
    assert read_series(folder) == {KEY: ([0], [1.0])}  # skipped if a readable run exists


def test_undecodable_folder_name_is_drawn(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"r\xe4n")
    folder.mkdir()
    (folder / "metrics.csv").write_bytes(HEADER + b"0,1\n")
    assert draws(folder)
    assert capsys.readouterr().out == f"{tmp_path}/r\ufffdn/a.png\n"
