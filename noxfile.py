"""Tests of the built package, outside the source tree, with the oldest and the newest supported versions.

``nox -s oldest`` needs Python 3.10 and ``nox -s newest`` Python 3.14; ``nox -s pinned`` uses the versions of
constraints.txt. Arguments after ``--`` go to pytest instead of ``-n 2``.
"""

import shutil
import tarfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OLDEST_INDIRECT = ["omegaconf==2.2.1"]  # the oldest release that hydra-core 1.3.2 accepts
HYDRA_ON_PYTHON_3_14 = "hydra-core>=1.4.0rc3"  # with Hydra 1.3, no app starts on Python 3.14
# Warnings of old releases about their own code; the last two of LBFGS and distributed.checkpoint in torch 2.8.
OLD_WARNINGS = [
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Converting a tensor with requires_grad=True to a scalar",
    "ignore:TypedStorage is deprecated",
]

nox.options.sessions = ["oldest", "newest"]


def lower_bounds():
    """Return each requirement of the package and of its test extra, pinned to its lower bound."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + extras["plot"] + extras["examples"] + extras["test"]
    requirements = [requirement for requirement in map(Requirement, lines) if requirement.specifier]
    pins = [f"{requirement.name}=={next(iter(requirement.specifier)).version}" for requirement in requirements]
    return pins + OLDEST_INDIRECT


def check_wheel(session, *pins, filters=()):
    """Build the package, install its wheel, and run the sdist's tests after removing its packages."""
    folder = Path(session.create_tmp())
    shutil.rmtree(folder)
    session.install("build")
    session.run_install("python", "-m", "build", "--outdir", folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    session.install(f"lightning-rprop[test] @ {wheel.resolve().as_uri()}", *pins)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    session.chdir(folder / sdist.name.removesuffix(".tar.gz"))
    shutil.rmtree("lightning_rprop")
    shutil.rmtree("hydra_plugins")
    session.run("python", "-c", "import lightning_rprop as rprop; assert 'site-packages' in rprop.__file__")
    options = ["-c", "pyproject.toml", "--pyargs", "tests", "lightning_rprop", *(f"-W{text}" for text in filters)]
    session.run("pytest", *options, *(session.posargs or ["-n", "2"]))


@nox.session(python="3.10")
def oldest(session):
    """Test the lower bounds of pyproject.toml."""
    check_wheel(session, *lower_bounds(), filters=OLD_WARNINGS)


@nox.session(python="3.14")
def newest(session):
    """Test the newest releases."""
    check_wheel(session, HYDRA_ON_PYTHON_3_14)


@nox.session
def pinned(session):
    """Test the versions of constraints.txt, on the Python that runs nox."""
    check_wheel(session, "-c", "constraints.txt")
