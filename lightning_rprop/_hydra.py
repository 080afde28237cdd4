"""The private names of Hydra that this package uses, all of them, with the reason for each.

They hold for Hydra 1.3.2 to 1.4.0rc3.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_RUNS_JOBS = "hydra.core.utils"


def running_job(names: Sequence[str]) -> dict[str, Any] | None:
    """Return these arguments and variables of Hydra's ``run_job`` for the job that the caller runs in.

    Hydra does not pass them to a job: ``HydraConfig`` holds only the node ``hydra``, and only ``task_cfg`` keeps the
    values that ``${now:...}`` took. So they are read from the frame of ``run_job`` (``_run_job`` in Hydra 1.4), whose
    arguments the launchers pass by name.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _RUNS_JOBS and all(name in frame.f_locals for name in names):
            return {name: frame.f_locals[name] for name in names}
        frame = frame.f_back
    return None


def add_callback(callback: Callback) -> None:
    """Call this Hydra callback before those of the config, in every run of this process.

    A callback in the config must be on the app's ``execution_whitelist`` from Hydra 1.4 on.
    """
    build = Callbacks.__init__

    def build_with_ours(self: Callbacks, config: DictConfig | None = None) -> None:
        build(self, config)
        self.callbacks.insert(0, callback)

    Callbacks.__init__ = build_with_ours  # type: ignore[method-assign]
