"""The snippets and commands of the README and the documentation pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def read_blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each code block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def read_snippets(page: str) -> dict[str, str]:
    """Return the Python blocks of a page by the file name in their first line."""
    return {re.match(r"# (\w+\.py)\n", text)[1]: text for language, text in read_blocks(page) if language == "python"}


def read_commands(page: str) -> list[str]:
    """Return the lines of the bash blocks of a page."""
    return [line for language, text in read_blocks(page) if language == "bash" for line in text.splitlines()]


def run(command: str, folder: Path) -> str:
    """Run a shell command in a folder with this Python first on the PATH, and return its output."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_seeded(snippet: str, folder: Path) -> str:
    """Run a snippet with a fixed seed, because about one seed in several dozen misses the tested loss."""
    program = f"import runpy, torch; torch.manual_seed(0); runpy.run_path('{snippet}', run_name='__main__')"
    return run(f'python -c "{program}"', folder)
