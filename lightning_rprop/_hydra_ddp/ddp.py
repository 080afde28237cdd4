"""The context manager for a job's trainer calls."""

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
from lightning_rprop._hydra_ddp.children import RankFailedError, Watch, check, leave_process_group, some_end, stop, wait
from lightning_rprop._hydra_ddp.rank import Child, is_started_rank
from lightning_rprop._hydra_ddp.rank import start as start_rank
from lightning_rprop._hydra_ddp.running import RunningJob, running_job

# Lightning's launchers leave these behind; LOCAL_RANK keeps Lightning from starting ranks again
_SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

_job_with_ranks: RunningJob | None = None  # the last one


@contextmanager
def hydra_ddp(trainer: pl.Trainer) -> Iterator[None]:
    """Run strategies that start the script again for each rank (``ddp``, ``fsdp``, ...) correctly in Hydra jobs.

    Put all trainer calls into one block::

        with hydra_ddp(trainer):
            trainer.fit(model)
            trainer.test(model)

    Under ``--multirun`` Lightning starts the whole sweep again for each rank: a second sweep folder, jobs that run
    twice, and with Optuna different hyperparameters on each rank, silently (Lightning issues 11300 and 18175, Hydra
    issue 2070). In this block it starts only the job:

    - The other ranks get exactly the job's config: its number, its folder, and the values that ``${now:...}`` took.
      Only ``hydra.run.dir``, ``hydra.output_subdir`` (only the first rank saves the configs) and the log file
      (``<job>_ddp_process_<rank>.log``) differ. Hydra callbacks of the app run on every rank.
    - The code after the block runs on all ranks, as after any Trainer call, and on the first rank when the others have
      finished it. So all calls that the ranks make together belong into the block.
    - After it the first process is as before: environment, number of threads, no process group, no processes. The next
      job of a sweep may use another number of devices.
    - If a rank fails at any time, its job ends with an error that names the rank; the sweep and its other jobs go on.
      The same holds for ``sys.exit`` in a job of a sweep. Ctrl-C ends everything.

    The block changes nothing outside of Hydra, on one device, or with strategies that start their ranks in another way
    (``ddp_spawn``), except that it restores the environment that Lightning changes. It works in the thread in which
    Hydra runs the job, and needs a POSIX system to start ranks. NCCL does not notice a lost rank; its collectives are
    aborted after 10 seconds.

    Args:
        trainer: The trainer of the calls in the block, from ``lightning`` or ``pytorch_lightning``.

    Raises:
        RuntimeError: If another rank failed (from this rank's own error if that is a ``RuntimeError``, as errors of
            lost connections are); if a job of a sweep called ``sys.exit``; if torchrun, srun or ``num_nodes`` give each
            rank its own sweep, whose values may differ; if a job has a second block that starts ranks; or if a
            launcher's process does not know which script to start.
    """
    is_rank, job = is_started_rank(), running_job()
    if job is None or (is_rank and trainer.world_size == 1):
        yield
    elif is_rank:
        with _as_started_rank():
            yield
    else:
        with _as_it_was(), _without_exits(job):
            if _lightning.starts_scripts(trainer):
                with _as_first_rank(job, trainer):
                    yield
            else:
                yield


@contextmanager
def _as_started_rank() -> Iterator[None]:
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None  # this rank has failed, whatever the app does with errors
    leave_process_group()  # with one, torch may abort the process at its very end (torch issue 190489)


@contextmanager
def _as_first_rank(job: RunningJob, trainer: pl.Trainer) -> Iterator[None]:
    if not _lightning.starts_ranks(trainer):
        _check_for_a_sweep_in_each_process(job, trainer.world_size)
        yield
        return
    _check_for_a_sweep_in_each_process(job, trainer.num_nodes)
    children = list[Child]()
    watch = Watch(children)

    def start(local_rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        global _job_with_ranks
        if _job_with_ranks is not None and _job_with_ranks.config is job.config and local_rank == 1:
            raise RuntimeError("A job starts its ranks once: put all trainer calls on several devices into one block.")
        _job_with_ranks = job
        children.append(start_rank(job, trainer.global_rank + local_rank, local_rank, environment))
        return children[-1].process

    try:
        with _lightning.start_ranks_by(trainer, start, lambda processes: watch.start()):
            yield
        wait(children)
    except BaseException as error:
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, RankFailedError):
                some_end(children)
                check(children, early=True)
        finally:
            stop(children, at_once=not isinstance(error, Exception))
        raise
    finally:
        watch.end()
        leave_process_group()


def _check_for_a_sweep_in_each_process(job: RunningJob, processes: int) -> None:
    node = job.config.hydra
    if node.mode == RunMode.MULTIRUN and processes > 1 and node.launcher._target_.endswith(".BasicLauncher"):
        raise RuntimeError(
            f"Each of {processes} processes runs its own sweep here, and their values and folders may differ. Start "
            "the sweep without torchrun or srun and let Lightning start the ranks; for several nodes use "
            "hydra/launcher=submitit_slurm."
        )


@contextmanager
def _as_it_was() -> Iterator[None]:
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
def _without_exits(job: RunningJob) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        # subclasses are Lightning's answer to SIGTERM
        if job.config.hydra.mode == RunMode.MULTIRUN and type(error) is SystemExit and not _is_ctrl_c(error):
            raise RuntimeError(f"This job of the sweep called sys.exit({error.code!r}).") from error
        raise


def _is_ctrl_c(error: BaseException) -> bool:
    """Return whether this is the ``sys.exit`` by which Lightning answers Ctrl-C."""
    return isinstance(error.__context__, KeyboardInterrupt)
