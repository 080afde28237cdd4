"""Ranks that are forked from a process that has imported everything already: dozens of runs in seconds.

The process must not have used torch's threads, which do not survive a fork.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback


def start(world, folder, function):
    """Fork the ranks of a run, each of which calls the function in the folder; give their process ids."""
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
    """Give their exit codes (negative for a signal), and how long it took; what is still there then is killed."""
    begun, codes = time.monotonic(), {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > limit:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children], time.monotonic() - begun
