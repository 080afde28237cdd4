"""The private names of Hydra stand in one file and work in the releases named here."""

import ast
import re
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize
from packaging.version import Version
from programs import run

from lightning_rprop import _hydra
from lightning_rprop._hydra import RunningJob, runs_in_script

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "1.3.2", "1.4.0rc3"  # .ci/run runs this file with the oldest
INSTALLED = Path(_hydra.__file__).parents[1]
PACKAGES = ("hydra", "omegaconf")

APP = """
import hydra
from hydra.experimental.callback import Callback
from lightning_rprop._hydra import add_callback, running_job

OPTIONS = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {"execution_whitelist": ["__main__.*"]}


class Added(Callback):
    def on_run_start(self, config, **kwargs):
        print("added", config.value)


class Configured(Callback):
    def on_run_start(self, config, **kwargs):
        print("configured")


def task(cfg):
    job = running_job()
    assert job.task_cfg is cfg
    assert job.task_function is task
    print(job.config.value, "hydra" in cfg, job.config.hydra.job.name, job.config.hydra.runtime.output_dir)


add_callback(Added())
assert running_job() is None
hydra.main(config_path=None, **OPTIONS)(task)()
assert running_job() is None
"""


def test_releases_match_the_requirements():
    claimed = re.search(r'"hydra-core>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    pinned = re.search(r"^hydra-core==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert claimed == OLDEST
    assert f"hydra-core=={OLDEST}" in (ROOT / ".ci" / "run").read_text()
    for version in (pinned, hydra.__version__):
        assert Version(OLDEST) <= Version(version) <= Version(NEWEST), "check _hydra.py against this release"


def private_names(path):
    """Return the private names of Hydra and OmegaConf that a file imports, or reads from objects without defining."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [
        (f"{node.module}." if isinstance(node, ast.ImportFrom) else "") + alias.name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    names = [name for name in imports if name.partition(".")[0] in PACKAGES]
    found = {part for name in names for part in name.split(".") if part.startswith("_")}
    if names:
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        found |= {name for name in read - own - {"_exit"} if re.match("_[^_]", name)}  # os._exit is public
    return found


def test_no_other_file_uses_private_names():
    found = {
        str(path.relative_to(INSTALLED)): private_names(path)
        for folder in ("lightning_rprop", "hydra_plugins/lightning_rprop")
        for path in (INSTALLED / folder).rglob("*.py")
    }
    assert {path: names for path, names in found.items() if names} == {
        "lightning_rprop/_hydra.py": {"_internal", "_target_"}
    }


def test_job_is_found_and_callback_comes_first(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    overrides = ("+value=3", "+hydra.callbacks.theirs._target_=__main__.Configured", "hydra.run.dir=here")
    output = run(tmp_path, "app.py", *overrides)
    assert output.splitlines() == ["added 3", "configured", f"3 False app {tmp_path / 'here'}"]


@pytest.mark.filterwarnings("ignore:The version_base parameter is deprecated")  # from Hydra 1.4 on
def test_only_basic_launcher_runs_in_the_script():
    for launcher, expected in (("basic", True), ("joblib", False), ("submitit_local", False)):
        with initialize(version_base="1.3"):
            config = compose(overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
        assert runs_in_script(RunningJob(config, config, print)) is expected
