"""The context manager ``hydra_ddp``."""

from __future__ import annotations

import os
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from hydra.types import RunMode

from lightning_rprop import _lightning
from lightning_rprop._hydra import RunningJob, running_job, runs_in_script
from lightning_rprop._hydra_ddp.children import (
    RankFailedError,
    Watch,
    check,
    leave_process_group,
    stop,
    wait,
    wait_for_any,
)
from lightning_rprop._hydra_ddp.rank import Child, is_launched_rank
from lightning_rprop._hydra_ddp.rank import start as start_rank

# Lightning's launchers leave these set. LOCAL_RANK would keep Lightning from starting ranks in the next job.
_SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

_last_job_with_ranks: RunningJob | None = None


@contextmanager
def hydra_ddp(trainer: pl.Trainer) -> Iterator[None]:
    """Make strategies that run the script once per rank (``ddp``, ``fsdp``, ...) work in Hydra jobs and sweeps.

    Put all trainer calls into one block:

        with hydra_ddp(trainer):
            trainer.fit(model)
            trainer.test(model)

    Under ``--multirun`` Lightning starts the whole sweep again for each rank. This creates a second sweep folder, runs
    jobs twice and, with Optuna, silently gives each rank different hyperparameters (Lightning issues 11300 and 18175,
    Hydra issue 2070). Inside the block, Lightning only starts the job:

    - The other ranks get exactly the job's config: its number, its folder and the values of ``${now:...}``. Only
      ``hydra.run.dir``, ``hydra.output_subdir`` (only the first rank saves the configs) and the log file
      (``<job>_ddp_process_<rank>.log``) differ. The app's Hydra callbacks run on every rank.
    - Code after the block runs on all ranks, as after any Trainer call, and on the first rank after the others have
      finished it. Calls that involve all ranks therefore belong inside the block.
    - After the block the first process is as before: environment, number of threads, no process group and no child
      processes. The next job of a sweep may use a different number of devices.
    - If a rank fails at any time, its job ends with an error that names the rank, and the sweep continues with its
      other jobs. The same holds for ``sys.exit`` in a job of a sweep. Ctrl-C ends everything.

    The block changes nothing outside of Hydra, on one device, or with strategies that start their ranks differently
    (``ddp_spawn``), except that it restores the environment that Lightning changes. Use it in the thread in which Hydra
    runs the job. Starting ranks requires a POSIX system. Because NCCL does not notice a lost rank, its collectives are
    aborted after 10 seconds.

    Args:
        trainer: The trainer of the calls in the block, from ``lightning`` or ``pytorch_lightning``.

    Raises:
        RuntimeError: If another rank failed; if a job of a sweep called ``sys.exit``; if torchrun, srun or
            ``num_nodes`` gives each rank its own sweep, whose values may differ; if a job starts ranks in a second
            block; or if a launcher's process does not know which script to start.
    """
    is_rank, job = is_launched_rank(), running_job()
    if job is None or (is_rank and trainer.world_size == 1):
        yield
    elif is_rank:
        with _as_launched_rank():
            yield
    else:
        with _restored_settings(), _exits_as_errors(job):
            if _lightning.starts_scripts(trainer):
                with _as_first_rank(job, trainer):
                    yield
            else:
                yield


@contextmanager
def _as_launched_rank() -> Iterator[None]:
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None  # the rank has failed, even if the app handles errors
    leave_process_group()  # otherwise torch may abort the process when it exits (torch issue 190489)


@contextmanager
def _as_first_rank(job: RunningJob, trainer: pl.Trainer) -> Iterator[None]:
    if not _lightning.starts_ranks(trainer):
        _check_single_sweep(job, trainer.world_size)
        yield
        return
    _check_single_sweep(job, trainer.num_nodes)
    children = list[Child]()
    watch = Watch(children)

    def start(local_rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        global _last_job_with_ranks
        if _last_job_with_ranks is not None and _last_job_with_ranks.config is job.config and local_rank == 1:
            raise RuntimeError(
                "This job has already started its ranks in another hydra_ddp block. Put all trainer calls on several "
                "devices into one block."
            )
        _last_job_with_ranks = job
        children.append(start_rank(job, trainer.global_rank + local_rank, local_rank, environment))
        return children[-1].process

    try:
        with _lightning.start_ranks_by(trainer, start, lambda processes: watch.start()):
            yield
        wait(children)
    except BaseException as error:
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, RankFailedError):
                wait_for_any(children)
                check(children, early=True)
        finally:
            stop(children, immediately=not isinstance(error, Exception))
        raise
    finally:
        watch.end()
        leave_process_group()


def _check_single_sweep(job: RunningJob, processes: int) -> None:
    if job.config.hydra.mode == RunMode.MULTIRUN and processes > 1 and runs_in_script(job):
        raise RuntimeError(
            f"Each of {processes} processes runs its own sweep, so their values and folders may differ. Start the "
            "sweep without torchrun or srun and let Lightning start the ranks; for several nodes use "
            "hydra/launcher=submitit_slurm."
        )


@contextmanager
def _restored_settings() -> Iterator[None]:
    environment = {name: os.environ.get(name) for name in _SET_BY_LIGHTNING}
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def _exits_as_errors(job: RunningJob) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        # Lightning raises a subclass of SystemExit on SIGTERM.
        if job.config.hydra.mode == RunMode.MULTIRUN and type(error) is SystemExit and not _is_ctrl_c(error):
            raise RuntimeError(f"This job of the sweep called sys.exit({error.code!r}).") from error
        raise


def _is_ctrl_c(error: BaseException) -> bool:
    """Return whether Lightning raised this ``SystemExit`` on Ctrl-C."""
    return isinstance(error.__context__, KeyboardInterrupt)
