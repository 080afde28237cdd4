"""The wheel holds only the package, the sdist every tracked file, and both say what PyPI and citations need."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import lightning_rprop

ROOT = Path(__file__).parents[2]
ADDED = {"PKG-INFO", "setup.cfg"}  # to the sdist by setuptools, in addition to *.egg-info/
PYTHON = "Programming Language :: Python :: 3."

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git clone; this is an unpacked sdist")


@pytest.fixture(scope="module")
def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """Build both from a copy of the tracked files, and return the folder."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    build = "import setuptools.build_meta as backend; backend.build_sdist('dist'); backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


@needs_git
def test_sdist_contains_all_tracked_files(built, tracked):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} - ADDED == tracked


@needs_git
def test_wheel_contains_only_the_package(wheel, tracked):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.startswith(("lightning_rprop/", "hydra_plugins/"))}
    assert "hydra_plugins/__init__.py" not in names  # the namespace package of all Hydra plugins


@needs_git
def test_metadata_has_what_pypi_shows(metadata):
    assert metadata["Version"] == lightning_rprop.__version__
    assert metadata["Author"] == "The lightning_rprop developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# lightning_rprop\n")
    links = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert links.keys() == {"Homepage", "Documentation", "Issues", "Changelog"}
    assert f'"{links["Homepage"]}"' in (ROOT / "mkdocs.yml").read_text()


@needs_git
def test_claimed_pythons_are_those_of_ci(metadata):
    claimed = {f"3.{text[len(PYTHON) :]}" for text in metadata.get_all("Classifier") if text.startswith(PYTHON)}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert {*tested, *(row["python"] for row in jobs["versions"]["strategy"]["matrix"]["include"])} == claimed
    assert metadata["Requires-Python"] == f">={min(claimed, key=lambda version: int(version[2:]))}"


def test_citation_names_the_released_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert citation["version"] == lightning_rprop.__version__ == newest[1]
    assert citation["date-released"] == newest[2]
