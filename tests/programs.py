"""Programs, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys


def run(folder, *command, fails=False, timeout=300, environment=None):
    """Run ``python command`` in the folder; give what it printed, or as an error where it is to fail."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout
