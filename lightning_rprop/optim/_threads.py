"""Threads for kernels that share the work among themselves: torch's own where possible, else a pool of this package."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from lightning_rprop._torch import EXTENSION

# The C type of a kernel, which takes the address of its arguments. Calls through it release the GIL.
PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# Pieces of work that are worth waking a thread of the pool, which takes about 50 microseconds.
_PIECES_PER_THREAD = 8


def run(kernel: Callable[[int], None], argument: int, pieces: int, needed: Any) -> None:
    """Run a kernel on as many threads as torch uses, including the calling one, and wait for all of them.

    Args:
        kernel: A function of type ``PROTOTYPE``, called on each thread; processes whatever work is left.
        argument: What to call it with.
        pieces: How many pieces the work has.
        needed: Objects that must live as long as any thread runs, even if this call is interrupted.
    """
    threads = torch.get_num_threads()
    if min(threads, pieces) < 2:
        kernel(argument)
    elif openmp := _openmp(os.getpid()):
        openmp(kernel, argument, threads, 0)  # not fewer: libgomp ends threads that a call does not need
    else:
        _run_in_pool(kernel, argument, min(threads, pieces // _PIECES_PER_THREAD) - 1, needed)


@cache
def _openmp(process: int) -> Callable[..., None] | None:
    """Return the function that runs a kernel on the threads of torch's OpenMP, or ``None`` if there is none.

    Other threads start late, because those of OpenMP wait for more work in a busy loop. The function is the one that
    compilers call for ``#pragma omp parallel``: libgomp exports it, and LLVM's libomp on Linux. In a forked process
    libgomp would wait forever for the threads of its parent.
    """
    is_available: Callable[[], bool] = torch.backends.openmp.is_available
    if sys.platform != "linux" or not is_available() or _is_forked(process):
        return None
    # a library that was loaded first for all others (LD_PRELOAD), else the one that torch is linked to
    found = (getattr(ctypes.CDLL(name), "GOMP_parallel", None) for name in (None, EXTENSION))
    parallel = next(filter(None, found), None)
    if parallel is None:
        return None
    parallel.argtypes = [PROTOTYPE, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return cast("Callable[..., None]", parallel)


def _is_forked(process: int) -> bool:
    """Return whether a process of Linux was forked and has not started another program since; also if unknown."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    flags = int(status.rpartition(")")[2].split()[6])
    return bool(flags & 0x40)  # PF_FORKNOEXEC


def _run_in_pool(kernel: Callable[[int], None], argument: int, others: int, needed: Any) -> None:
    """Run a kernel on this thread and on others, which live as long as the process."""
    helpers = []
    try:
        with suppress(RuntimeError):  # cannot start a thread, for example at interpreter shutdown
            for _ in range(others):
                helpers.append(_pool(os.getpid(), others).submit(lambda _: kernel(argument), needed))
        kernel(argument)
    finally:
        wait([helper for helper in helpers if not helper.cancel()])


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:  # threads do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="rprop")
