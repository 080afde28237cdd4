"""The context manager for a job's trainer calls."""

from __future__ import annotations

import os
import subprocess
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from hydra.types import RunMode

from lightning_rprop import lightning_private
from lightning_rprop.hydra_job.children import (
    RankFailedError,
    Watch,
    check,
    leave_process_group,
    some_end,
    stop,
    wait,
    wait_until_ready,
)
from lightning_rprop.hydra_job.rank import StartedRank, command, started_rank
from lightning_rprop.hydra_job.running import RunningJob, running_job

# what Lightning's launchers leave behind, of which LOCAL_RANK alone keeps it from starting ranks again
_SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

_job_with_ranks: RunningJob | None = None  # the last one


@contextmanager
def hydra_ddp(trainer: pl.Trainer) -> Iterator[None]:
    """Make the strategies that start the script again for each rank (``ddp``, ``fsdp``, ...) right in Hydra's jobs.

    Put all calls of the trainer into one block::

        with hydra_ddp(trainer):
            trainer.fit(model)
            trainer.test(model)

    Under ``--multirun`` Lightning starts the whole sweep again for each rank: a second folder of the sweep, jobs that
    are run twice, and with Optuna other hyperparameters on other ranks, silently (Lightning issues 11300 and 18175,
    Hydra issue 2070). In this block it starts the job:

    - The other ranks get exactly the job's config, with its number, its folder, and the values that ``${now:...}`` has
      in it. Only ``hydra.run.dir``, ``hydra.output_subdir`` (no rank but the first saves the configs) and the file of
      the log (``<job>_ddp_process_<rank>.log``) differ. A Hydra callback of the app is told of each rank's run.
    - What comes behind the block runs on all ranks, as after any call of a Trainer, and on the first when the others
      are through with it. So all calls that ranks make together belong into the block.
    - After it the first process is as it was before: environment, number of threads, no process group, no processes.
      The sweep's next job may use another number of devices, or one.
    - A rank that fails ends its job, by an error that names the rank, and neither the sweep nor its other jobs. Nor
      does ``sys.exit`` in a job of a sweep. Ctrl-C ends all.

    The block changes nothing outside of Hydra, for one device, and with strategies that start their ranks otherwise
    (``ddp_spawn``), but for the environment that Lightning leaves behind. A job is known by Hydra running it in the
    same thread. With NCCL, which does not notice a lost rank by itself, the collectives are aborted after 10 seconds.

    Args:
        trainer: The trainer of the calls in the block, of ``lightning`` or of ``pytorch_lightning``.

    Raises:
        RuntimeError: If another rank failed (from this one's own error, if that is a ``RuntimeError``, as those of lost
            connections are); if a job of a sweep called ``sys.exit``; if torchrun, srun or ``num_nodes`` make each
            rank a sweep of its own, which may give them other values; if a job has a second block with ranks to start;
            or if a launcher's process does not know which script to start.
    """
    rank, job = started_rank(), running_job()
    if job is None or (rank is not None and trainer.world_size == 1):
        yield
    elif rank is not None:
        with _as_started_rank(rank, trainer):
            yield
    else:
        with _as_it_was(), _without_exits(job):
            if lightning_private.starts_scripts(trainer):
                with _as_first_rank(job, trainer):
                    yield
            else:
                yield


@contextmanager
def _as_started_rank(rank: StartedRank, trainer: pl.Trainer) -> Iterator[None]:
    strategy = trainer.strategy
    connect = strategy.setup_environment

    def tell_and_connect() -> None:
        rank.tell_ready()
        connect()

    strategy.setup_environment = tell_and_connect  # type: ignore[method-assign]
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None  # whatever the app makes of errors: this rank has failed
    leave_process_group()  # with one, torch may abort the process at its very end (torch issue 190489)


@contextmanager
def _as_first_rank(job: RunningJob, trainer: pl.Trainer) -> Iterator[None]:
    if not lightning_private.starts_ranks(trainer):
        _check_for_a_sweep_in_each_process(job, trainer.world_size)
        yield
        return
    _check_for_a_sweep_in_each_process(job, trainer.num_nodes)
    with tempfile.TemporaryDirectory(prefix="lightning_rprop_") as name:
        folder, watches = Path(name), list[Watch]()

        def start(local_rank: int) -> tuple[Sequence[str], str]:
            global _job_with_ranks
            if _job_with_ranks is not None and _job_with_ranks.config is job.config and local_rank == 1:
                raise RuntimeError("A job starts its ranks once: all trainer calls on several devices go in one block.")
            _job_with_ranks = job
            return command(job, local_rank, folder), job.config.hydra.runtime.cwd

        def watch(children: list[subprocess.Popen[bytes]]) -> None:
            watches.append(Watch(children))
            watches[0].start()
            wait_until_ready(children, trainer.global_rank, folder)

        try:
            with lightning_private.start_ranks_by(trainer, start, watch):
                yield
            wait(lightning_private.children(trainer), trainer.global_rank, folder)
        except BaseException as error:
            children = lightning_private.children(trainer)
            try:
                if isinstance(error, RuntimeError) and not isinstance(error, RankFailedError):
                    some_end(children)
                    check(children, trainer.global_rank, folder, early=True)
            finally:
                stop(children, at_once=not isinstance(error, Exception))
            raise
        finally:
            for each in watches:
                each.end()
            leave_process_group()


def _check_for_a_sweep_in_each_process(job: RunningJob, processes: int) -> None:
    node = job.config.hydra
    if node.mode == RunMode.MULTIRUN and processes > 1 and node.launcher._target_.endswith(".BasicLauncher"):
        raise RuntimeError(
            f"Each of {processes} processes has a sweep of its own here, whose values and folders need not be those of "
            "the others. Start the sweep without torchrun or srun, and let Lightning start the ranks; for several "
            "nodes use hydra/launcher=submitit_slurm."
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
    """Tell whether this is the ``sys.exit`` by which Lightning answers Ctrl-C."""
    return isinstance(error.__context__, KeyboardInterrupt)
