"""The processes of a job's other ranks, seen from its first: wait for them, report failures, leave none behind."""

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

_POLL = 0.05  # seconds
_TO_END = 5.0  # seconds for a rank that has lost the others to end by itself
_TO_NOTICE = 10  # seconds for this process to notice that a rank has ended


class RankFailedError(RuntimeError):
    """Another rank of the job has failed; the message names it."""


def wait(children: Sequence[Child]) -> None:
    """Wait until all ranks have ended.

    Raises:
        RankFailedError: If one has failed.
    """
    connected_until = time.monotonic() + _TO_NOTICE
    while any(child.process.poll() is None for child in children):
        check(children)
        if time.monotonic() > connected_until:
            leave_process_group()  # a rank that waits for this one in a collective gets an error by that
        time.sleep(_POLL)
    check(children)


def check(children: Sequence[Child], early: bool = False) -> None:
    """Raise an error if a rank has failed, or, if ``early``, if it ended before its job was done.

    Raises:
        RankFailedError: Naming the ranks and how they ended.
    """
    failed = [
        f"rank {child.rank} {_end(child.process.returncode)}"
        for child in children
        if child.lost and (early or child.process.returncode)
    ]
    if failed:
        message = f"This job failed because {' and '.join(failed)}. See the output of that rank above."
        _log.error(message)  # now, because at the end of a sweep Hydra reports only the first failed job
        raise RankFailedError(message)


def _end(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def some_end(children: Sequence[Child]) -> None:
    """Wait a few seconds for a rank to end."""
    _wait_for(any, children)


def stop(children: Sequence[Child], at_once: bool) -> None:
    """End all ranks; if not at once, give them time to notice that this process has left the group."""
    try:
        if not at_once:
            leave_process_group()
            _wait_for(all, children)
    finally:  # a second Ctrl-C too
        for child in children:
            child.process.kill()
        for child in children:
            child.process.wait()


def _wait_for(how_many: Callable[[Iterable[bool]], bool], children: Sequence[Child]) -> None:
    until = time.monotonic() + _TO_END
    while time.monotonic() < until and not how_many(child.process.poll() is not None for child in children):
        time.sleep(_POLL)


def leave_process_group() -> None:
    """End torch's process group in this process, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    reset_process_group_count()


class Watch(threading.Thread):
    """Frees this process from waiting for a rank that has ended, so that it can report the rank.

    Torch waits half an hour for a rank that does not come to a process group, and NCCL does not notice a lost rank in a
    collective; gloo does. Lightning's own observer would kill this process, and with it the sweep.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        super().__init__(name="hydra-ddp-watch", daemon=True)
        self._children = children
        self._over = threading.Event()

    def run(self) -> None:
        """Wait for a rank to be lost, then break what this process may be waiting for."""
        port, lost_for = int(os.environ["MASTER_PORT"]), 0
        while not self._over.wait(1.0):
            if lost_for or any(child.lost for child in self._children):
                lost_for += 1
                _disconnect_from_store(port)  # each second, because this process may connect later
            if lost_for == _TO_NOTICE and dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
                abort_process_group()

    def end(self) -> None:
        """Stop watching."""
        self._over.set()


def _disconnect_from_store(port: int) -> None:
    """Shut down this process's connections to torch's store: a C++ call that waits on one raises an error.

    A process group's ranks exchange their addresses through this store. Torch has no call that interrupts the wait.
    """
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family != socket.AF_UNIX and connection.getpeername()[1] == port:
                        connection.shutdown(socket.SHUT_RDWR)
