"""Threads for kernels that release the GIL and share the work among themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any


def run(kernel: Callable[..., None], threads: int, *needed: Any) -> None:
    """Run a kernel on several threads, including the calling one, and wait for all of them.

    Args:
        kernel: Called with ``needed`` on each thread; processes whatever work is left.
        threads: The maximum number of threads.
        needed: Objects that must live as long as any thread runs, even if this call is interrupted.
    """
    if threads < 2:
        kernel(*needed)
        return
    helpers = []
    try:
        with suppress(RuntimeError):  # cannot start a thread, for example at interpreter shutdown
            for _ in range(threads - 1):
                helpers.append(_pool(threads - 1).submit(kernel, *needed))
        kernel(*needed)
    finally:
        wait([helper for helper in helpers if not helper.cancel()])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool that lives as long as the process.

    Numba's threading layers abort the process when used from two threads (workqueue) or after a fork (GNU OpenMP).
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="rprop")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
