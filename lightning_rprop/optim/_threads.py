"""Threads for kernels, which release the interpreter's lock and share out their work among themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any


def run(kernel: Callable[..., None], threads: int, *needed: Any) -> None:
    """Run a kernel on some threads at once, this one among them, and wait for them all.

    Args:
        kernel: is called with ``needed`` on each thread, and takes what work is left.
        threads: how many at most; as many as can be had.
        needed: what must live as long as a thread runs, whatever happens here.
    """
    if threads < 2:
        kernel(*needed)
        return
    helpers = []
    try:
        with suppress(RuntimeError):  # no thread to be had, at the interpreter's end for one: this one does it all
            for _ in range(threads - 1):
                helpers.append(_pool(threads - 1).submit(kernel, *needed))
        kernel(*needed)
    finally:
        wait([helper for helper in helpers if not helper.cancel()])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Give threads that stay for the process's life.

    Threads of our own, as Numba's layers end the process when they are used from two threads (workqueue) or after a
    fork (GNU OpenMP).
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="rprop")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
