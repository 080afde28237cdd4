"""A Hydra app with the layout of lightning-hydra-template: the optimizer is a section of the model's config."""

FILES = {
    "configs/train.yaml": """
defaults: [_self_, data: line, model: net, callbacks: default, trainer: default, experiment: null, debug: null]
empty: {of: the app}
hydra:
  run: {dir: run}
  sweep: {dir: sweep}
""",
    "configs/data/line.yaml": "_target_: net.Line\n",
    "configs/data/shuffled.yaml": "_target_: net.ShuffledLine\n",
    "configs/model/net.yaml": """
_target_: net.Net
optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.001, betas: [0.9, 0.99], weight_decay: 0.0}
scheduler: {_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 10}
""",
    "configs/model/grouped.yaml": """
defaults: [/optimizer@optimizer: adam, _self_]
_target_: net.Net
scheduler: null
""",
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
    "src/net.py": """
import lightning as L
import torch
from lightning_rprop import FullBatchLoader
from torch.utils.data import DataLoader

DATA = torch.linspace(-1, 1, 20).unsqueeze(1)


class Line(L.LightningDataModule):
    def train_dataloader(self):
        return FullBatchLoader(DATA, 8)


class ShuffledLine(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(DATA, batch_size=8, shuffle=True)


class Net(L.LightningModule):
    def __init__(self, optimizer, scheduler):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["optimizer", "scheduler"])
        self.optimizer, self.scheduler, self.net = optimizer, scheduler, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 2 * batch).square().mean()

    def configure_optimizers(self):
        optimizer = self.optimizer(params=self.trainer.model.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer=optimizer)}
""",
    "src/train.py": """
import hydra
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg):
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(instantiate(cfg.model), datamodule=instantiate(cfg.data))
    optimizer = trainer.optimizers[0]
    print(type(optimizer).__name__, optimizer.param_groups[0]["lr"], *(type(c).__name__ for c in callbacks))
    schedulers = len(trainer.lr_scheduler_configs)
    print(f"{trainer.global_step} steps in {trainer.current_epoch} epochs, schedulers: {schedulers}")


if __name__ == "__main__":
    main()
""",
}


def write_app(folder):
    """Write the app into a folder."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.lstrip("\n"))
