"""The cache of compiled kernels: loading, damaged files, permissions and the choice of its folder."""

import os
import shutil
from pathlib import Path

import pytest
from numba_programs import STEP, run_code
from programs import run

from lightning_rprop.optim import _machine_code, _numba


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache folder with a kernel."""
    folder = tmp_path_factory.mktemp("compiled")
    assert run_code(STEP, NUMBA_CACHE_DIR=str(folder)) == "fused compiled"
    return folder


def test_kernel_is_compiled_once_then_loaded(tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert run_code(STEP, **place) == "fused compiled"
    (file,) = tmp_path.rglob("*.o")
    whole = file.read_bytes()
    assert run_code(STEP, **place) == "fused loaded"
    assert file.read_bytes() == whole
    # a damaged file is replaced, and no other file is left
    for damaged in (whole[:1000], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert run_code(STEP, **place) == "fused compiled"
        assert len(file.read_bytes()) == len(whole)
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [file]


def test_unwritable_cache_means_compiling(tmp_path):
    """A file in place of the folder prevents even root from writing."""
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    assert run_code(STEP, NUMBA_CACHE_DIR=str(occupied), XDG_CACHE_HOME=str(occupied)) == "fused compiled"


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("folder", ["", ".", "cache", "here"])
def test_cache_folder_does_not_hide_the_package(folder, variable, tmp_path):
    """Empty and relative paths are ignored; the absolute path of the script's folder is used."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": "", "NUMBA_CACHE_DIR": ""}
    environment[variable] = str(here) if folder == "here" else folder
    (here / "script.py").write_text(STEP)
    for expected in ("fused compiled", "fused loaded"):
        assert run(here, "script.py", environment=environment, timeout=120).strip() == expected
    (file,) = tmp_path.rglob("*.o")
    assert file.parent == (here if folder == "here" else home / ".cache") / "lightning-rprop"


def test_file_of_another_kernel_is_not_loaded(tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run_code(STEP, **place)
    (file,) = tmp_path.rglob("rprop_float32-*.o")
    run_code(
        STEP.replace("torch.zeros(10)", "torch.zeros(10).double()")
        .replace("torch.ones(10)", "torch.ones(10).double()")
        .replace("assert", "#"),
        **place,
    )
    (other,) = tmp_path.rglob("rprop_float64-*.o")
    file.write_bytes(other.read_bytes())
    assert run_code(STEP, **place) == "fused compiled"
    assert run_code(STEP, **place) == "fused loaded"


def test_code_without_function_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    module = 'define void @"other"() { ret void }'
    with pytest.raises(RuntimeError, match="The compiled code has no function rprop_missing"):
        _machine_code.load("rprop_missing", "source", lambda: ("rprop_missing", module), check=lambda _: None)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("how", ["others", "group", "owner"])
def test_code_writable_by_others_is_not_loaded(how, what, compiled, tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "home")}
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob("*.o")
    assert (file.parent.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    target = file.parent if what == "folder" else file
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can change the owner of a file")
        os.chown(target, 12345, -1)
    else:
        target.chmod(target.stat().st_mode | (0o002 if how == "others" else 0o020))
    assert run_code(STEP, **place) == "fused compiled"
    assert run_code(STEP, **place) == "fused loaded"  # from the next folder, or from the replaced file


def test_step_works_without_home_folder():
    """Such as in a container that runs with a user id without an entry in the user database."""
    program = "import os; os.environ.clear(); os.getuid = lambda: 54321\n" + STEP
    assert run_code(program).startswith("fused")


def test_package_folder_is_not_written_to(tmp_path):
    folder = Path(_numba.__file__).parent

    def files():
        return {file for file in folder.rglob("*") if "__pycache__" not in file.parts}

    before = files()
    run_code(STEP, NUMBA_CACHE_DIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert files() == before
    assert not list(folder.rglob("*.nbi"))
