"""Waits for the processes of a job's other ranks, reports their failures and ends them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch.distributed as dist

from lightning_rprop._hydra_ddp.rank import Child
from lightning_rprop._torch import abort_process_group, reset_process_group_count

_log = logging.getLogger(__name__)

# In seconds.
_POLL = 0.05
_EXIT_TIME = 5.0  # for a rank to end by itself after it has lost the others
_LOSS_TIME = 10  # for this process to notice by itself that a rank has ended


class RankFailedError(RuntimeError):
    """Another rank of the job, named in the message, has failed."""


def wait(children: Sequence[Child]) -> None:
    """Wait until all ranks have ended.

    Raises:
        RankFailedError: If a rank has failed.
    """
    connected_until = time.monotonic() + _LOSS_TIME
    while any(child.process.poll() is None for child in children):
        check(children)
        if time.monotonic() > connected_until:
            leave_process_group()  # raises an error in ranks that wait for this one in a collective
        time.sleep(_POLL)
    check(children)


def check(children: Sequence[Child], early: bool = False) -> None:
    """Raise an error if a rank has failed, or, with ``early``, if it has ended before its job was done.

    Raises:
        RankFailedError: With the failed ranks and how they ended.
    """
    failed = [
        f"rank {child.rank} {_end(child.process.returncode)}"
        for child in children
        if child.lost and (early or child.process.returncode)
    ]
    if failed:
        message = f"This job failed because {' and '.join(failed)}. See the output of that rank above."
        _log.error(message)  # because Hydra only reports the first failed job of a sweep, at its end
        raise RankFailedError(message)


def _end(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def wait_for_any(children: Sequence[Child]) -> None:
    """Wait a few seconds for any rank to end."""
    _wait_for(any, children)


def stop(children: Sequence[Child], immediately: bool) -> None:
    """End all ranks, unless ``immediately`` after a few seconds in which they can end by themselves."""
    try:
        if not immediately:
            leave_process_group()
            _wait_for(all, children)
    finally:  # also after a second Ctrl-C
        for child in children:
            child.process.kill()
        for child in children:
            child.process.wait()


def _wait_for(how_many: Callable[[Iterable[bool]], bool], children: Sequence[Child]) -> None:
    until = time.monotonic() + _EXIT_TIME
    while time.monotonic() < until and not how_many(child.process.poll() is not None for child in children):
        time.sleep(_POLL)


def leave_process_group() -> None:
    """Destroy this process's torch process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    reset_process_group_count()


class Watch(threading.Thread):
    """Interrupts this process's waits for a rank that has ended, so that the process can report the rank.

    Torch waits half an hour for a rank that does not join a process group. In a collective, gloo notices a lost rank,
    but NCCL does not. Lightning's observer would kill this process, and the sweep with it.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        super().__init__(name="hydra-ddp-watch", daemon=True)
        self._children = children
        self._over = threading.Event()

    def run(self) -> None:
        """Wait until a rank is lost, then interrupt what this process may be waiting for."""
        port, seconds_lost = int(os.environ["MASTER_PORT"]), 0
        while not self._over.wait(1.0):
            if seconds_lost or any(child.lost for child in self._children):
                seconds_lost += 1
                _disconnect_from_store(port)  # every second, because this process may connect later
            if seconds_lost == _LOSS_TIME and dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
                abort_process_group()

    def end(self) -> None:
        """Stop watching."""
        self._over.set()


def _disconnect_from_store(port: int) -> None:
    """Shut down this process's connections to torch's store, so that C++ calls waiting for it raise an error.

    The ranks of a process group exchange their addresses through this store. Torch has no call to interrupt the wait.
    """
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed since listed, or not connected
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family != socket.AF_UNIX and connection.getpeername()[1] == port:
                        connection.shutdown(socket.SHUT_RDWR)
