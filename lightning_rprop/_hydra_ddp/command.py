"""The command line that runs the app as another rank of a Hydra job."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

from lightning_rprop._hydra import RunningJob, runs_in_script


def rank_command(job: RunningJob, node: dict[str, Any]) -> list[str]:
    """Return the command that runs the app with the job's overrides, as a single run.

    Args:
        job: The job.
        node: The node ``hydra`` of its config, unresolved.
    """
    flags = []
    for source in node["runtime"]["config_sources"]:
        path = source["path"] if source["schema"] == "file" else f"{source['schema']}://{source['path']}"
        if source["provider"] in ("main", "command-line") and source["path"]:
            flags += ["--config-path" if source["provider"] == "main" else "--config-dir", path]
    if node["job"]["config_name"] is not None:
        flags += ["--config-name", node["job"]["config_name"]]
    given = [override for override in node["overrides"]["hydra"] if not override.lstrip("+~").startswith("hydra.mode")]
    return [
        *_program(job),
        *flags,
        *node["overrides"]["task"],
        *given,
        "hydra.mode=RUN",  # also if the app's config sets MULTIRUN
    ]


def _program(job: RunningJob) -> list[str]:
    """Return the command that starts the app, without arguments.

    Raises:
        RuntimeError: If the app's script is unknown.
    """
    app = inspect.unwrap(job.task_function).__globals__
    main = vars(sys.modules["__main__"])
    if app["__name__"] == "__main__":
        main = app  # differs from this process's __main__ if a launcher sent the function to another process
    elif "__file__" not in main or not runs_in_script(job):
        raise RuntimeError(
            f"hydra_ddp cannot start the other ranks: the @hydra.main function is in the module {app['__name__']}, and "
            f"a process of {job.config.hydra.launcher._target_} does not know which script starts the app. Move the "
            "function into the script, or use hydra/launcher=basic or strategy=ddp_spawn."
        )
    if main.get("__spec__") is not None:
        return [sys.executable, "-m", main["__spec__"].name]
    if main.get("__package__"):  # started with -m, and sent by a launcher, which drops __spec__
        return [sys.executable, "-m", f"{main['__package__']}.{Path(main['__file__']).stem}"]
    return [sys.executable, os.path.join(job.config.hydra.runtime.cwd, main["__file__"])]
