"""Starts the other ranks of a Hydra job, and gives each of them exactly the job's config.

A rank runs the app with the job's overrides. These do not determine the job's number, its folder and the values of
``${now:...}``, so the job's node ``hydra`` and its resolved values are passed in a file. In the rank, a Hydra callback
reads the file before the job begins.

This module does not import torch, because Hydra imports it in a rank before the app's own code runs.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_rprop._hydra import RunningJob, add_callback
from lightning_rprop._hydra_ddp import RANK_FILE
from lightning_rprop._hydra_ddp.command import rank_command


@dataclass
class _Handover:
    hydra: dict[str, Any]  # the node, unresolved
    task: dict[str, Any]  # the rest of the config, unresolved
    resolved: DictConfig  # empty, but its resolver cache holds the values of ${now:...}
    local_rank: int
    parent: int


@dataclass
class Child:
    """Another rank of the job, as its first rank sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    file: IO[bytes]
    size: int

    @property
    def done(self) -> bool:
        """Whether the rank's job has completed. After that, how the process ends does not matter."""
        return os.fstat(self.file.fileno()).st_size > self.size

    @property
    def lost(self) -> bool:
        """Whether the process has ended before its job was done."""
        return self.process.poll() is not None and not self.done


def start(job: RunningJob, rank: int, local_rank: int, environment: dict[str, str]) -> Child:
    """Start a rank of the job."""
    handover = _handover(job, local_rank)
    file = tempfile.TemporaryFile()  # noqa: SIM115 (it has no name, so nothing is left when all processes are killed)
    pickle.dump(handover, file)
    file.flush()
    file.seek(0)  # the rank shares this position
    process = subprocess.Popen(
        rank_command(job, handover.hydra),
        env={**environment, RANK_FILE: str(file.fileno())},
        cwd=job.config.hydra.runtime.cwd,
        pass_fds=[file.fileno()],
    )
    return Child(rank, process, file, os.fstat(file.fileno()).st_size)


def _handover(job: RunningJob, local_rank: int) -> _Handover:
    task = _plain(job.config)
    node = task.pop("hydra")
    node["run"]["dir"] = job.config.hydra.runtime.output_dir
    node["output_subdir"] = None  # only the first rank saves the configs
    node["job_logging"] = _logging_of_rank(job.config, local_rank)
    with suppress(OmegaConfBaseException):  # resolve values that the first rank has not read yet
        OmegaConf.to_container(job.task_cfg, resolve=True)
    resolved = OmegaConf.create()
    OmegaConf.copy_cache(from_config=job.task_cfg, to_config=resolved)
    return _Handover(node, task, resolved, local_rank, os.getpid())


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _logging_of_rank(config: DictConfig, local_rank: int) -> Any:
    """Return the logging config of a rank: the job's, with the rank's own log file."""
    renamed = copy.deepcopy(config)
    with read_write(renamed.hydra):
        renamed.hydra.job.name = f"{config.hydra.job.name}_ddp_process_{local_rank}"
    logging = renamed.hydra.job_logging
    return OmegaConf.to_container(logging, resolve=True) if OmegaConf.is_config(logging) else logging


class RankCallback(Callback):
    """Hydra callback that gives a rank its job's config before the job begins.

    Args:
        file: The file written by ``start``.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Copy the job's node ``hydra`` and its resolved values into the config composed by this process.

        Raises:
            SystemExit: If this config differs from the job's. (Hydra turns other exceptions into warnings.)
        """
        global _launched
        sent: _Handover = pickle.load(self._file)
        threading.Thread(target=_end_with, args=(sent.parent,), daemon=True).start()
        composed = _plain(config)
        del composed["hydra"]
        if composed != sent.task and repr(composed) != repr(sent.task):  # by repr, NaN equals NaN
            raise SystemExit(
                f"The config composed on local rank {sent.local_rank} differs from that of rank 0:\n"
                f"{composed}\n{sent.task}\n"
                "Do not edit config files during a run, and do not use defaults that differ between processes."
            )
        with read_write(config), open_dict(config):
            config.hydra = OmegaConf.merge(config.hydra, sent.hydra)
        OmegaConf.copy_cache(from_config=sent.resolved, to_config=config)
        _launched = True

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Report to the first rank that the job is done here, so that a later abort of this process is no failure.

        Torch may abort a process that still holds a process group when it exits (torch issue 190489).
        """
        if job_return.status is JobStatus.COMPLETED:
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"done")
            self._file.flush()


def _end_with(parent: int) -> None:
    """End this process when the first rank was killed and could not end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


_launched = False


def is_launched_rank() -> bool:
    """Return whether this process is a rank that a job's first rank started.

    Raises:
        RuntimeError: If it is, but did not receive the job's config.
    """
    if RANK_FILE in os.environ:
        raise RuntimeError(
            "This rank did not receive its job's config because Hydra did not load the plugin "
            "hydra_plugins.lightning_rprop. Install lightning_rprop with pip."
        )
    return _launched


def join_job() -> None:
    """Make the next Hydra run of this process a rank of the job that started the process."""
    add_callback(RankCallback(os.fdopen(int(os.environ.pop(RANK_FILE)), "r+b")))
