"""Train a small network on a real data set with full-batch Rprop: the example app, configured by Hydra (``conf/``).

python examples/train.py                                    # digits
python examples/train.py data=diabetes optimizer.lr=0.05 trainer=ddp_cpu
python examples/train.py starts=64                          # 64 networks; tests the best one
python examples/train.py -m optimizer.lr=0.01,0.1           # a sweep; also with trainer=ddp_cpu
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

if missing := [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]:
    sys.exit(f"{Path(__file__).name} needs {', '.join(missing)}: pip install 'lightning-rprop[examples]'")

# Hydra 1.4 takes a list of what a config may instantiate, and deprecates version_base, which Hydra 1.3 needs.
ALLOWED = ["lightning.*", "lightning_rprop.*", "tabular.*", "torch.optim.*"]
OPTIONS: dict[str, Any] = (
    {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {"execution_whitelist": ALLOWED}
)


@hydra.main(config_path="../conf", config_name="train", **OPTIONS)
def main(cfg: DictConfig) -> float:
    """Train, test and print the results; return the validation score, for sweepers."""
    # imported here to keep --help and shell completion fast
    import lightning.pytorch as pl
    from tabular.report import SCORE, Report

    from lightning_rprop import hydra_ddp

    pl.seed_everything(cfg.seed)
    data = instantiate(cfg.data)
    model = instantiate(
        cfg.model,
        in_features=data.in_features,
        out_features=data.out_features,
        task=data.task,
        optimizer=instantiate(cfg.optimizer),
    )
    callbacks = [Report(data), *(instantiate(c) for c in (cfg.get("callbacks") or {}).values())]
    loggers = [instantiate(logger) for logger in (cfg.get("logger") or {}).values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)

    with hydra_ddp(trainer):
        trainer.fit(model, datamodule=data)
        held_out = float(trainer.callback_metrics.get("val/score", "nan"))
        best_loss = float(trainer.callback_metrics.get("best/loss", "nan"))
        checkpoint = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else None
        how = {"datamodule": data, "ckpt_path": checkpoint or None, "verbose": False}
        val = trainer.validate(model, **how)[0] if cfg.starts > 1 else {}  # chooses the network to test
        test = trainer.test(model, **how)[0]

    if trainer.is_global_zero:
        picture = draw(callbacks, Path(cfg.output_dir) / "step_sizes.png", f"{data.name}: full-batch Rprop")
        rows = {
            "data set": data.name,
            "optimizer": cfg.optimizer._target_,
            "optimizer steps": trainer.global_step,
            "stopped": next((c.reason for c in callbacks if getattr(c, "reason", None)), "at the last epoch"),
            "best training loss": f"{best_loss:.4g}",
            f"test {SCORE[data.task]}": f"{test['test/score']:.4f}",
            "test loss": f"{test['test/loss']:.4f}",
            "logs": ", ".join(logger.log_dir for logger in loggers) or "none",
            "checkpoint": checkpoint or "none",
            "picture": picture or "none (no step sizes)",
        }
        if val:
            rows["best start"] = f"{val['val/start']:.0f} of {cfg.starts}"
            rows[f"validation {SCORE[data.task]}"] = f"{val['val/score']:.4f}"
        print("\n".join(f"{name:<20} {value}" for name, value in rows.items()))
    return held_out


def draw(callbacks: list[Any], picture: Path, title: str) -> Path | None:
    """Save a plot of the step sizes, if any were recorded, and return its path."""
    from lightning_rprop import StepSizeMonitor
    from lightning_rprop.monitor.plot import save

    for monitor in callbacks:
        if isinstance(monitor, StepSizeMonitor):
            with suppress(ValueError):  # no record yet
                save(monitor.plot(title)[0], picture)
                return picture
    return None


if __name__ == "__main__":
    main()
