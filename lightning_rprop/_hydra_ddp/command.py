"""The running Hydra job: its config and its function."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_rprop import _hydra


@dataclass
class RunningJob:
    """A job as Hydra runs it; the names are those in Hydra's ``run_job``.

    Attributes:
        config: The composed config with the node ``hydra``, without the job's own changes to ``task_cfg``.
        task_cfg: The config that the function under ``@hydra.main`` was called with.
        task_function: That function.
    """

    config: DictConfig
    task_cfg: DictConfig
    task_function: Callable[[DictConfig], Any]


def running_job() -> RunningJob | None:
    """Return the job that the caller runs in, if it runs in one."""
    found = _hydra.running_job(list(RunningJob.__dataclass_fields__))
    return None if found is None else RunningJob(**found)


def program(job: RunningJob) -> list[str]:
    """Return the command that starts the job's app, without arguments.

    Raises:
        RuntimeError: If the app's script is unknown: ``main`` was imported from a module and a launcher runs the job in
            its own process, or there is no script.
    """
    app = inspect.unwrap(job.task_function).__globals__
    main, launcher = vars(sys.modules["__main__"]), job.config.hydra.launcher._target_
    if app["__name__"] == "__main__":
        main = app  # also where a launcher sent the function to another process, which has another __main__
    elif "__file__" not in main or not launcher.endswith(".BasicLauncher"):
        raise RuntimeError(
            f"hydra_ddp cannot start the other ranks: the function under @hydra.main is in the module "
            f"{app['__name__']}, and a process of {launcher} does not know which script starts the app. Move the "
            "function into the script, or use hydra/launcher=basic or strategy=ddp_spawn."
        )
    if main.get("__spec__") is not None:
        return [sys.executable, "-m", main["__spec__"].name]
    if main.get("__package__"):  # started with -m; a function that was sent comes without __spec__
        return [sys.executable, "-m", f"{main['__package__']}.{Path(main['__file__']).stem}"]
    return [sys.executable, os.path.join(job.config.hydra.runtime.cwd, main["__file__"])]
