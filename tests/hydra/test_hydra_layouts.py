"""Rprop in apps like lightning-hydra-template, where the optimizer is a section of the model's config."""

import re

import pytest
from omegaconf import OmegaConf
from programs import run

FILES = {
    "configs/train.yaml": """
defaults: [_self_, data: line, model: net, callbacks: default, trainer: default, experiment: null, debug: null]
empty: {of: the app}
hydra:
  run: {dir: run}
  sweep: {dir: sweep}
""",
    "configs/data/line.yaml": "_target_: net.Line\n",
    "configs/model/net.yaml": """
_target_: net.Net
optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.001, betas: [0.9, 0.99], weight_decay: 0.0}
""",
    "configs/model/grouped.yaml": "defaults: [/optimizer@optimizer: adam, _self_]\n_target_: net.Net\n",
    "configs/optimizer/adam.yaml": "{_target_: torch.optim.Adam, _partial_: true, amsgrad: true}\n",
    "configs/optimizer/sgd.yaml": "{_target_: torch.optim.SGD, _partial_: true}\n",
    "configs/callbacks/default.yaml": """
model_checkpoint: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: checkpoints}
""",
    "configs/trainer/default.yaml": """
{_target_: lightning.pytorch.Trainer, max_epochs: 2, accelerator: cpu, logger: false, enable_progress_bar: false}
""",
    "configs/debug/none.yaml": "{}\n",
    "configs/experiment/tuned.yaml": "# @package _global_\nmodel:\n  optimizer:\n    lr: 0.002\n",
    "configs/experiment/rprop.yaml": """
# @package _global_
defaults:
  - /optimizer@model.optimizer: rprop
  - override /callbacks: [default, full_batch]
model:
  optimizer:
    lr: 0.03
""",
    "net.py": """
import lightning as L
import torch
from lightning_rprop import FullBatchLoader


class Line(L.LightningDataModule):
    def train_dataloader(self):
        return FullBatchLoader(torch.linspace(-1, 1, 20).unsqueeze(1), 8)


class Net(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["optimizer"])
        self.optimizer, self.net = optimizer, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 2 * batch).square().mean()

    def configure_optimizers(self):
        return {"optimizer": self.optimizer(params=self.trainer.model.parameters())}
""",
    "train.py": """
import hydra
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg):
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(instantiate(cfg.model), datamodule=instantiate(cfg.data))
    optimizer = trainer.optimizers[0]
    print(type(optimizer).__name__, optimizer.param_groups[0]["lr"], *(type(c).__name__ for c in callbacks))


if __name__ == "__main__":
    main()
""",
}


@pytest.fixture
def app(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.lstrip("\n"))
    return tmp_path


def composed(app, *overrides):
    return OmegaConf.create(run(app, "train.py", "--cfg", "job", *overrides))


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
    error = run(app, "train.py", "--cfg", "job", "+optimizer@model.optimizer=rprop", override, fails=True)
    assert message in error


def test_app_trains_and_keeps_its_callbacks(app):
    overrides = ["experiment=tuned", "+optimizer@model.optimizer=rprop", "callbacks=[default,full_batch]"]
    output = run(app, "train.py", *overrides, "model.optimizer.lr=0.05")
    assert output.splitlines()[-1] == "Rprop 0.05 ModelCheckpoint FullBatch"
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
        output = run(app, "train.py", "-m", f"+{group}@swept={pattern}", "trainer.max_epochs=0")
        assert re.findall(r"#\d+ : \S+=(\S+)", output) == left
