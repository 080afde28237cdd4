"""Run Python programs in subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent


def run(folder, *command, fails=False, timeout=300, environment=None, streams="one"):
    """Run ``python *command`` in ``folder`` and return its stdout.

    Args:
        folder: The working directory.
        command: The arguments of the interpreter.
        fails: Whether the program must fail; then its stderr is returned.
        timeout: The time limit in seconds.
        environment: Additional environment variables.
        streams: ``"both"`` returns stdout and stderr.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    if streams == "both":
        return done.stdout + done.stderr
    return done.stderr if fails else done.stdout
