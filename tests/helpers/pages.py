"""The README and the documentation pages: their text, snippets and commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def find_pages() -> list[str]:
    """Return the README and all pages of the documentation, relative to the root."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def read_blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each code block of a page."""
    return _BLOCK.findall((ROOT / page).read_text())


def read_prose(page: str) -> str:
    """Return a page without its code blocks."""
    return _BLOCK.sub("", (ROOT / page).read_text())


def read_snippets(page: str) -> dict[str, str]:
    """Return the Python blocks of a page by the file name in their first line."""
    blocks = [text for language, text in read_blocks(page) if language == "python"]
    names = [re.match(r"# (\w+\.py)\n", text) for text in blocks]
    assert all(names), f"{page}: the first line of each Python block must be a comment with a file name"
    return {name[1]: text for name, text in zip(names, blocks, strict=True)}


def read_commands(page: str) -> list[str]:
    """Return the lines of the bash blocks of a page, and the commands in its sentences that start with python."""
    lines = [line for language, text in read_blocks(page) if language == "bash" for line in text.splitlines()]
    return [*lines, *re.findall(r"`(python [^`]+)`", read_prose(page))]


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
