"""Saving a plot, and the command ``python -m lightning_rprop.monitor``."""

import os
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitor_plots import KEY, make_series, write
from pictures import is_png

from lightning_rprop.monitor.__main__ import main
from lightning_rprop.monitor.plot import plot_series, save


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("new/folder/a.svg", b"<?xml"), ("a.b.png", b"\x89P")],
)
def test_suffix_decides_the_file_format(name, start, tmp_path):
    fig, _ = plot_series(make_series(["a"]))
    save(fig, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("name", ["new/a.xyz", "new/a"])
def test_unknown_suffix_is_refused(name, tmp_path):
    fig, _ = plot_series(make_series(["a"]))
    with pytest.raises(ValueError, match=rf"the suffix of '.*{name}' must be a picture format: .*png"):
        save(fig, str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_failed_save_keeps_the_existing_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    fig, _ = plot_series(make_series(["a"]))

    def fill_disk(name, **_):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(fig, "savefig", fill_disk)
    with pytest.raises(OSError, match="no space left"):
        save(fig, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    assert not plt.fignum_exists(fig.number)


def command(*arguments, folder):
    """Run the command as from a notebook's terminal, whose backend may be missing in a new process."""
    environment = os.environ | {"MPLBACKEND": "module://notebook_backend", "MPLCONFIGDIR": matplotlib.get_cachedir()}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "lightning_rprop.monitor", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_draws_run_and_prints_path(tmp_path):
    write(CSVLogger, tmp_path / "run", (4, {KEY: 0.5}), (9, {KEY: 0.25}))
    done = command("run", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "step_sizes.png\n", "")
    assert is_png(tmp_path / "step_sizes.png")


def test_command_reports_error_in_one_line(tmp_path):
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
        ("run/metrics.csv/a.png", None, "metrics.csv"),  # a file in place of a folder
        ("a.png", "matplotlib.pyplot", "pip install 'lightning-rprop[plot]'"),
    ],
)
def test_error_while_saving_is_one_line(output, hidden, message, tmp_path, monkeypatch, capsys):
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


def test_output_option_sets_the_path(tmp_path, capsys):
    write(TensorBoardLogger, tmp_path / "run", (4, {KEY: 0.5}))
    main([str(tmp_path / "run"), "-o", str(tmp_path / "a.pdf")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.pdf'}\n"
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_plot_command_does_not_import_torch():
    code = (
        "import sys, lightning_rprop.monitor.__main__ as m; "
        "print(*{'torch', 'lightning', 'matplotlib', 'tensorboard'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"
