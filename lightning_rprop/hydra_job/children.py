"""The processes of a job's other ranks, seen from its first: wait for them, say which failed, leave none behind."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

_log = logging.getLogger(__name__)

_POLL = 0.05  # seconds
_TO_END = 5.0  # seconds in which a rank that has lost the others should end by itself
_TO_NOTICE = 10.0  # seconds in which this process should notice that a rank has ended


class RankFailedError(RuntimeError):
    """Another rank of the job has failed; the message names it."""


def wait_until_ready(children: Sequence[subprocess.Popen[bytes]], first_rank: int, folder: Path) -> None:
    """Wait until all ranks are about to connect: who waits in torch for one that never comes, waits half an hour.

    Raises:
        RankFailedError: If a rank has ended before.
    """
    while True:
        ready = len(list(folder.glob("*.ready"))) >= len(children)
        check(children, first_rank, folder, early=True)
        if ready:
            return
        time.sleep(_POLL)


def wait(children: Sequence[subprocess.Popen[bytes]], first_rank: int, folder: Path) -> None:
    """Wait until all ranks have ended.

    Raises:
        RankFailedError: If one has failed.
    """
    connected_until = time.monotonic() + _TO_NOTICE
    while any(child.poll() is None for child in children):
        check(children, first_rank, folder)
        if time.monotonic() > connected_until:
            leave_process_group()  # a rank that waits for this one in a collective gets an error by that
        time.sleep(_POLL)
    check(children, first_rank, folder)


def check(children: Sequence[subprocess.Popen[bytes]], first_rank: int, folder: Path, early: bool = False) -> None:
    """Raise an error if a rank has failed, or, with ``early``, if it has ended at all.

    Raises:
        RankFailedError: Naming the ranks and how they ended.
    """
    failed = [
        f"rank {first_rank + number} {_end(child.returncode)}"
        for number, child in enumerate(children, start=1)
        if child.poll() is not None and (early or (child.returncode and not (folder / f"rank-{number}.done").exists()))
    ]
    if failed:
        message = f"This job failed, as {' and '.join(failed)}. What a rank has to say is in the output above."
        _log.error(message)  # now: at the end of a sweep, Hydra tells of the first failed job alone
        raise RankFailedError(message)


def _end(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def some_end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the ranks some time in which one of them may turn out to have ended."""
    _wait_for(any, children)


def stop(children: Sequence[subprocess.Popen[bytes]], at_once: bool) -> None:
    """End all ranks, at first by leaving them alone if not at once, then by force."""
    try:
        if not at_once:
            leave_process_group()
            _wait_for(all, children)
    finally:  # a second Ctrl-C too
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _wait_for(how_many: Callable[[Iterable[bool]], bool], children: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _TO_END
    while time.monotonic() < until and not how_many(child.poll() is not None for child in children):
        time.sleep(_POLL)


def leave_process_group() -> None:
    """End torch's process group in this process, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Watch(threading.Thread):
    """Frees this process from a collective of NCCL's, which, unlike gloo's, waits on for a rank that has ended.

    In place of Lightning's observer, which ends this process, and with it the sweep.
    """

    def __init__(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        super().__init__(name="hydra-ddp-watch", daemon=True)
        self._children = children
        self._over = threading.Event()

    def run(self) -> None:
        """Wait for the first rank to fail, then for this process to notice, then abort."""
        while not self._over.wait(1.0):
            if any(child.poll() for child in self._children):
                break
        if not self._over.wait(_TO_NOTICE) and dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
            distributed_c10d._abort_process_group()

    def end(self) -> None:
        """Watch no longer."""
        self._over.set()
