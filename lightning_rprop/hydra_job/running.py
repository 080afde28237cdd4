"""The Hydra job that is being run: what was composed for it, and what it runs."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

_HYDRA_RUNS_JOBS_IN = "hydra.core.utils"


@dataclass
class RunningJob:
    """A job as Hydra runs it; the names are those of Hydra's ``run_job``.

    Attributes:
        config: All that was composed, with the node ``hydra``; nothing that the job changes in its own config is in it.
        task_cfg: The job's own config: what the function under ``@hydra.main`` was called with.
        task_function: That function.
    """

    config: DictConfig
    task_cfg: DictConfig
    task_function: Callable[[DictConfig], Any]


def running_job() -> RunningJob | None:
    """Find the job that the caller is a part of, if it is one.

    Hydra gives neither of these to a job: ``HydraConfig`` holds the node ``hydra`` alone, and what ``${now:...}`` has
    become is kept in ``task_cfg``. In the processes of a launcher, ``__main__`` is not the app. So they are taken from
    the frame of Hydra's ``run_job`` (in Hydra 1.4 ``_run_job``), whose arguments the launchers pass by name.
    """
    names = list(RunningJob.__dataclass_fields__)
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _HYDRA_RUNS_JOBS_IN and all(name in frame.f_locals for name in names):
            return RunningJob(**{name: frame.f_locals[name] for name in names})
        frame = frame.f_back
    return None


def program(job: RunningJob) -> list[str]:
    """Give the command that starts the job's app, without arguments.

    Raises:
        RuntimeError: If the app's script cannot be told: its ``main`` was imported from a module, and a launcher runs
            the job in a process of its own, or there is no script.
    """
    app = inspect.unwrap(job.task_function).__globals__
    main, launcher = vars(sys.modules["__main__"]), job.config.hydra.launcher._target_
    if app["__name__"] == "__main__":
        main = app  # also where a launcher sent the function to another process, which has another __main__
    elif "__file__" not in main or not launcher.endswith(".BasicLauncher"):
        raise RuntimeError(
            f"The other ranks cannot be started: the function under @hydra.main is in the module {app['__name__']}, "
            f"and which script starts the app is not known in a process of {launcher}. Put the function in the script, "
            "use hydra/launcher=basic, or strategy=ddp_spawn."
        )
    if main.get("__spec__") is not None:
        return [sys.executable, "-m", main["__spec__"].name]
    if main.get("__package__"):  # started with -m; a function that was sent comes without __spec__
        return [sys.executable, "-m", f"{main['__package__']}.{Path(main['__file__']).stem}"]
    return [sys.executable, os.path.join(job.config.hydra.runtime.cwd, main["__file__"])]
