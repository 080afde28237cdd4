"""The sdist holds what a clone holds, so that tests, examples and benchmarks run from it."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDED = {"PKG-INFO", "setup.cfg"}  # by setuptools, beside the folder *.egg-info


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with git, which an unpacked sdist has not")
def test_sdist_holds_what_git_does(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tracked = {name for name in listed if (ROOT / name).is_file()}
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} - ADDED == tracked
