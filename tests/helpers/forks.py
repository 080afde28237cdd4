"""Ranks forked from a process that has already imported everything, so that dozens of runs take seconds.

The process must not have used torch's threads, which do not survive a fork. The ranks write their output to files,
because a rank would block on a full pipe.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def run(world, function, limit=200):
    """Call ``function(rank, world)`` on ``world`` ranks in this folder; exit with the logs if one fails."""
    codes, _ = wait(start(world, ".", lambda rank: function(rank, world)), limit)
    if any(codes):
        sys.exit("\n".join(f"{code}: {Path(f'log-{rank}').read_text()[-3000:]}" for rank, code in enumerate(codes)))


def start(world, folder, function):
    """Fork ranks that call ``function(rank)`` in the folder, and return their process ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [os.fork() or _run(rank, world, port, folder, function) for rank in range(world)]


def _run(rank, world, port, folder, function):
    code = 1
    try:
        os.chdir(folder)
        log = os.open(f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        places |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forks"}
        os.environ |= {name: str(value) for name, value in places.items()}
        function(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(children, limit=60):
    """Return exit codes (negative for a signal) and the time taken; kill what still runs after ``limit`` seconds."""
    start, codes = time.monotonic(), {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - start > limit:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children], time.monotonic() - start
