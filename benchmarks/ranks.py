"""Run a benchmark on several ranks: gloo processes on this machine, started as torchrun does.

Each rank ends with ``answer``. On a normal exit torch may abort a process that still has a process group (torch issue
190489).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any, NoReturn


def on_ranks(world: int, module: str, *arguments: object) -> Any:
    """Run ``python -m module arguments`` on ``world`` ranks; return the answer of rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, "-m", module, *map(str, arguments)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    return json.loads(outputs[0].splitlines()[-1])


def answer(result: Any) -> NoReturn:
    """Print this rank's result and exit without cleaning up."""
    print(json.dumps(result), flush=True)
    os._exit(0)
