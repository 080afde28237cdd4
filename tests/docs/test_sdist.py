"""The sdist contains every tracked file, so that tests, examples and benchmarks run from it."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDED = {"PKG-INFO", "setup.cfg"}  # by setuptools, in addition to *.egg-info/


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git clone; this is an unpacked sdist")
def test_sdist_contains_all_tracked_files(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} - ADDED == tracked
