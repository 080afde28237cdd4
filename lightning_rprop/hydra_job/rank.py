"""The other ranks of a Hydra job: how they are started, and how each gets exactly the job's config.

A rank is a run of the app with the job's overrides. Arguments alone would not do: the number of the job, its folder
and what ``${now:...}`` has become in it are not theirs to say. So the job's node ``hydra`` and what was resolved in it
follow in a file, which a Hydra callback of the rank reads before its job begins.

Nothing here needs torch, as Hydra imports it before the app's own code runs.
"""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_rprop.hydra_job.running import RunningJob, program

_KEY = "hydra.callbacks.lightning_rprop_rank"


@dataclass
class _Handover:
    hydra: dict[str, Any]  # the node, unresolved
    task: dict[str, Any]  # all else, unresolved
    resolved: DictConfig  # empty: OmegaConf carries what ${now:...} has become beside the values
    local_rank: int
    ready: Path
    done: Path
    parent: int


def command(job: RunningJob, local_rank: int, folder: Path) -> list[str]:
    """Give the command that starts a rank of the job; what it reads is written into the folder."""
    handover = _handover(job, local_rank, folder)
    file = folder / f"rank-{local_rank}.pickle"
    with file.open("wb") as stream:
        pickle.dump(handover, stream)
    node, flags = handover.hydra, []
    for source in node["runtime"]["config_sources"]:
        path = source["path"] if source["schema"] == "file" else f"{source['schema']}://{source['path']}"
        if source["provider"] in ("main", "command-line") and source["path"]:
            flags += ["--config-path" if source["provider"] == "main" else "--config-dir", path]
    if node["job"]["config_name"] is not None:
        flags += ["--config-name", node["job"]["config_name"]]
    given = [override for override in node["overrides"]["hydra"] if not override.lstrip("+~").startswith("hydra.mode")]
    quoted = QuotedString(text=str(file), quote=Quote.single).with_quotes()
    return [
        *program(job),
        *flags,
        *node["overrides"]["task"],
        *given,
        "hydra.mode=RUN",  # also where the app's own config says MULTIRUN
        f"+{_KEY}._target_={__name__}.{RankCallback.__name__}",
        f"+{_KEY}.file={quoted}",
    ]


def _handover(job: RunningJob, local_rank: int, folder: Path) -> _Handover:
    task = _plain(job.config)
    node = task.pop("hydra")
    node["run"]["dir"] = job.config.hydra.runtime.output_dir
    node["output_subdir"] = None  # the configs are saved once
    node["job_logging"] = _logging_of_rank(job.config, local_rank)
    with suppress(OmegaConfBaseException):  # so that what rank 0 has not asked for yet will be the same as well
        OmegaConf.to_container(job.task_cfg, resolve=True)
    resolved = OmegaConf.create()
    OmegaConf.copy_cache(from_config=job.task_cfg, to_config=resolved)
    ready, done = (folder / f"rank-{local_rank}.{word}" for word in ("ready", "done"))
    return _Handover(node, task, resolved, local_rank, ready, done, os.getpid())


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _logging_of_rank(config: DictConfig, local_rank: int) -> Any:
    """Give the logging of a rank, with a file of its own, though the job's name is the same on all."""
    renamed = copy.deepcopy(config)
    with read_write(renamed.hydra):
        renamed.hydra.job.name = f"{config.hydra.job.name}_ddp_process_{local_rank}"
    logging = renamed.hydra.job_logging
    return OmegaConf.to_container(logging, resolve=True) if OmegaConf.is_config(logging) else logging


class RankCallback(Callback):
    """Gives a rank its job's config, before the job begins.

    Args:
        file: What ``command`` wrote.
    """

    def __init__(self, file: str) -> None:
        with open(file, "rb") as stream:
            self._handover: _Handover = pickle.load(stream)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Put the job's node ``hydra`` and what was resolved in the job into the config that was composed here.

        Raises:
            SystemExit: If another config was composed here than in the job, or the job's process is gone. (Hydra
                makes warnings of other exceptions.)
        """
        global _started
        sent = self._handover
        threading.Thread(target=_end_with, args=(sent.parent,), daemon=True).start()
        composed = _plain(config)
        del composed["hydra"]
        if composed != sent.task and repr(composed) != repr(sent.task):  # NaN equals itself in the second only
            raise SystemExit(
                f"Another config was composed for local rank {sent.local_rank} than for rank 0:\n"
                f"{composed}\n{sent.task}\n"
                "Was a file of it changed meanwhile, or is a default in it new in each process?"
            )
        with read_write(config), open_dict(config):
            config.hydra = OmegaConf.merge(config.hydra, sent.hydra)
            config.hydra.callbacks = sent.hydra["callbacks"]
        OmegaConf.copy_cache(from_config=sent.resolved, to_config=config)
        _started = StartedRank(sent.local_rank, sent.ready)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Let the first process know that the job is done here: how this process ends is no part of it.

        Where something still holds a process group, torch may abort (torch issue 190489).
        """
        if job_return.status is JobStatus.COMPLETED:
            with suppress(OSError):  # the first process has left already
                self._handover.done.touch()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # killed, for else it would have ended this process: nobody is left to talk to


@dataclass
class StartedRank:
    """This process, if it is a rank that the job's first process started."""

    local_rank: int
    _ready: Path

    def tell_ready(self) -> None:
        """Let the first process go on: this one is about to connect to it."""
        self._ready.touch()


_started: StartedRank | None = None


def started_rank() -> StartedRank | None:
    """Give what this process is, if a job's first process started it."""
    return _started
