"""All private names of Hydra that this package uses, with the reason for each.

``tests/hydra/test_hydra_private.py`` names the releases that they hold for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


@dataclass
class RunningJob:
    """A running Hydra job: arguments and variables of Hydra's ``run_job``, under their names there.

    Attributes:
        config: The composed config with the node ``hydra``, without the job's own changes to ``task_cfg``.
        task_cfg: The config passed to the ``@hydra.main`` function.
        task_function: That function.
    """

    config: DictConfig
    task_cfg: DictConfig
    task_function: Callable[[DictConfig], Any]


def running_job() -> RunningJob | None:
    """Return the Hydra job that the caller runs in, or None outside of a job.

    The values are read from the frame of ``run_job`` (``_run_job`` in Hydra 1.4), because Hydra does not pass them to
    jobs: ``HydraConfig`` has only the node ``hydra``, and only ``task_cfg`` has the resolved values of ``${now:...}``.
    """
    names = [field.name for field in fields(RunningJob)]
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "hydra.core.utils" and all(name in frame.f_locals for name in names):
            return RunningJob(**{name: frame.f_locals[name] for name in names})
        frame = frame.f_back
    return None


def runs_in_script(job: RunningJob) -> bool:
    """Return whether the launcher is Hydra's ``BasicLauncher``, which runs jobs in the process of the app's script."""
    return str(job.config.hydra.launcher._target_).endswith(".BasicLauncher")


def add_callback(callback: Callback) -> None:
    """Add a Hydra callback to every Hydra run of this process, before the callbacks of the config.

    The class is patched because Hydra 1.4 only accepts callbacks from a config if the app's ``execution_whitelist``
    names them.
    """
    build = Callbacks.__init__

    def build_and_add(self: Callbacks, config: DictConfig | None = None) -> None:
        build(self, config)
        self.callbacks.insert(0, callback)

    Callbacks.__init__ = build_and_add  # type: ignore[method-assign]
