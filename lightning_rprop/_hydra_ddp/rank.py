"""The other ranks of a Hydra job: how they are started, and how each gets exactly the job's config.

A rank is a run of the app with the job's overrides. They do not set the job's number, its folder and the values that
``${now:...}`` took in it. So the job's node ``hydra`` and its resolved values follow in a file, which a Hydra callback
reads in the rank before its job begins.

Nothing here imports torch, because Hydra imports it in a rank before the app's own code runs.
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

from lightning_rprop import _hydra
from lightning_rprop._hydra_ddp import RANK_FILE
from lightning_rprop._hydra_ddp.running import RunningJob, program


@dataclass
class _Handover:
    hydra: dict[str, Any]  # the node, unresolved
    task: dict[str, Any]  # all else, unresolved
    resolved: DictConfig  # empty: OmegaConf keeps the values that ${now:...} took beside the content
    local_rank: int
    parent: int


@dataclass
class Child:
    """Another rank of the job, seen from its first."""

    rank: int
    process: subprocess.Popen[bytes]
    file: IO[bytes]
    size: int

    @property
    def done(self) -> bool:
        """Whether the rank's job has completed; after that, the process may end in any way."""
        return os.fstat(self.file.fileno()).st_size > self.size

    @property
    def lost(self) -> bool:
        """Whether the rank has ended before its job was done."""
        return self.process.poll() is not None and not self.done


def start(job: RunningJob, rank: int, local_rank: int, environment: dict[str, str]) -> Child:
    """Start a rank of the job."""
    handover = _handover(job, local_rank)
    file = tempfile.TemporaryFile()  # noqa: SIM115 (it has no name, so nothing is left when all processes are killed)
    pickle.dump(handover, file)
    file.flush()
    file.seek(0)  # the rank's position too
    process = subprocess.Popen(
        _command(job, handover.hydra),
        env={**environment, RANK_FILE: str(file.fileno())},
        cwd=job.config.hydra.runtime.cwd,
        pass_fds=[file.fileno()],
    )
    return Child(rank, process, file, os.fstat(file.fileno()).st_size)


def _command(job: RunningJob, node: dict[str, Any]) -> list[str]:
    flags = []
    for source in node["runtime"]["config_sources"]:
        path = source["path"] if source["schema"] == "file" else f"{source['schema']}://{source['path']}"
        if source["provider"] in ("main", "command-line") and source["path"]:
            flags += ["--config-path" if source["provider"] == "main" else "--config-dir", path]
    if node["job"]["config_name"] is not None:
        flags += ["--config-name", node["job"]["config_name"]]
    given = [override for override in node["overrides"]["hydra"] if not override.lstrip("+~").startswith("hydra.mode")]
    return [
        *program(job),
        *flags,
        *node["overrides"]["task"],
        *given,
        "hydra.mode=RUN",  # also where the app's own config says MULTIRUN
    ]


def _handover(job: RunningJob, local_rank: int) -> _Handover:
    task = _plain(job.config)
    node = task.pop("hydra")
    node["run"]["dir"] = job.config.hydra.runtime.output_dir
    node["output_subdir"] = None  # the configs are saved once
    node["job_logging"] = _logging_of_rank(job.config, local_rank)
    with suppress(OmegaConfBaseException):  # so that values that rank 0 has not read yet are the same too
        OmegaConf.to_container(job.task_cfg, resolve=True)
    resolved = OmegaConf.create()
    OmegaConf.copy_cache(from_config=job.task_cfg, to_config=resolved)
    return _Handover(node, task, resolved, local_rank, os.getpid())


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _logging_of_rank(config: DictConfig, local_rank: int) -> Any:
    """Return the logging of a rank, which has its own file although the job's name is the same on all ranks."""
    renamed = copy.deepcopy(config)
    with read_write(renamed.hydra):
        renamed.hydra.job.name = f"{config.hydra.job.name}_ddp_process_{local_rank}"
    logging = renamed.hydra.job_logging
    return OmegaConf.to_container(logging, resolve=True) if OmegaConf.is_config(logging) else logging


class RankCallback(Callback):
    """Gives a rank its job's config before the job begins.

    Args:
        file: What ``start`` wrote.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Put the job's node ``hydra`` and its resolved values into the config that was composed here.

        Raises:
            SystemExit: If this config differs from the job's. (Hydra turns other exceptions into warnings.)
        """
        global _started
        sent: _Handover = pickle.load(self._file)
        threading.Thread(target=_end_with, args=(sent.parent,), daemon=True).start()
        composed = _plain(config)
        del composed["hydra"]
        if composed != sent.task and repr(composed) != repr(sent.task):  # NaN equals itself in the second only
            raise SystemExit(
                f"The config composed for local rank {sent.local_rank} differs from that of rank 0:\n"
                f"{composed}\n{sent.task}\n"
                "Do not change config files during a run, and use no default that differs between processes."
            )
        with read_write(config), open_dict(config):
            config.hydra = OmegaConf.merge(config.hydra, sent.hydra)
        OmegaConf.copy_cache(from_config=sent.resolved, to_config=config)
        _started = True

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Tell the first process that the job is done here, so that the end of this process does not matter.

        If something still holds a process group, torch may abort (torch issue 190489).
        """
        if job_return.status is JobStatus.COMPLETED:
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"done")
            self._file.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # the first process was killed, otherwise it would have ended this one


_started = False


def is_started_rank() -> bool:
    """Return whether this process is a rank that a job's first process started.

    Raises:
        RuntimeError: If it is, but has not got the job's config.
    """
    if RANK_FILE in os.environ:
        raise RuntimeError(
            "This rank has not got the config of its job because Hydra did not load the plugin "
            "hydra_plugins.lightning_rprop. Install lightning_rprop with pip."
        )
    return _started


def join_job() -> None:
    """Make the next Hydra run of this process a rank of the job that started the process."""
    _hydra.add_callback(RankCallback(os.fdopen(int(os.environ.pop(RANK_FILE)), "r+b")))
