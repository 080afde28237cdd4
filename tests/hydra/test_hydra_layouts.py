"""Rprop in apps like lightning-hydra-template, where the optimizer is a section of the model's config."""

import re

import pytest
from omegaconf import OmegaConf
from programs import run
from template_app import write_app


@pytest.fixture
def app(tmp_path):
    write_app(tmp_path)
    return tmp_path


def composed(app, *overrides):
    return OmegaConf.create(run(app, "src/train.py", "--cfg", "job", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["+optimizer@model.optimizer=rprop"],
        ["+optimizer@model.optimizer=rprop", "experiment=tuned"],
        ["optimizer@model.optimizer=rprop", "model=grouped"],
        ["experiment=rprop"],
    ],
)
def test_optimizer_replaces_the_model_section(overrides, app):
    options = composed(app, *overrides).model.optimizer
    assert options == {**composed(app, "+optimizer=rprop").optimizer, "lr": options.lr}
    assert options.lr == (0.03 if "experiment=rprop" in overrides else 0.01)
    given = composed(app, *overrides, "model.optimizer.lr=0.5").model.optimizer
    assert given == {**options, "lr": 0.5}


def test_variants_replace_the_model_section(app):
    for name in ("rprop_plus", "rprop_minus", "irprop_plus", "irprop_minus"):
        options = composed(app, f"+optimizer@model.optimizer={name}").model.optimizer
        assert options == composed(app, f"+optimizer={name}").optimizer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.optimizer.lr=abc", "could not be converted to Float"),
        ("model.optimizer.betas=[0.9,0.99]", "Key 'betas' not in 'RpropConf'"),
        ("~model.optimizer.betas", "'model.optimizer.betas' does not exist"),
    ],
)
def test_model_section_is_typed(override, message, app):
    error = run(app, "src/train.py", "--cfg", "job", "+optimizer@model.optimizer=rprop", override, fails=True)
    assert message in error


def test_app_trains_and_keeps_its_callbacks(app):
    overrides = ["experiment=tuned", "+optimizer@model.optimizer=rprop", "callbacks=[default,full_batch]"]
    output = run(app, "src/train.py", *overrides, "model.optimizer.lr=0.05")
    assert "\nRprop 0.05 ModelCheckpoint FullBatch\n" in f"\n{output}"
    assert list(composed(app, "callbacks=full_batch").callbacks) == ["full_batch"]  # as docs/hydra.md warns


def test_typed_section_accepts_the_config(tmp_path):
    (tmp_path / "app.py").write_text("""
from dataclasses import dataclass, field
from typing import Any
import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from lightning_rprop import RpropConf


@dataclass
class Config:
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"optimizer": "rprop"}])
    optimizer: RpropConf = MISSING
    other: RpropConf = field(default_factory=lambda: RpropConf(lr=0.25))


ConfigStore.instance().store(name="config", node=Config)
@hydra.main(version_base="1.3", config_name="config", config_path=None)
def main(config):
    pass


main()
""")
    config = OmegaConf.create(run(tmp_path, "app.py", "--cfg", "job", "+optimizer@other=irprop_plus"))
    assert (config.optimizer.variant, config.other.variant, config.other.lr) == ("irprop-", "irprop+", 0.01)


def test_glob_sweep_can_exclude_our_configs(app):
    for group, pattern, left in (
        ("optimizer", "glob(*,exclude=*rprop*)", ["adam", "sgd"]),
        ("callbacks", "glob(*,exclude=[converged,full_batch,keep_best,step_size_monitor])", ["default"]),
    ):
        output = run(app, "src/train.py", "-m", f"+{group}@swept={pattern}", "trainer.max_epochs=0")
        assert re.findall(r"#\d+ : \S+=(\S+)", output) == left
