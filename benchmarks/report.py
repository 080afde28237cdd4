"""What the benchmarks report: the machine, tables in Markdown, and files of figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch


def machine(devices: Iterable[str]) -> dict[str, str]:
    """Describe the machine."""
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": processor(),
        "threads": str(torch.get_num_threads()),
    }
    if "cuda" in devices:
        about["gpu"] = torch.cuda.get_device_name()
    return about


def processor() -> str:
    """Return the processor's name and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def print_table(head: list[str], lines: Iterable[list[str]]) -> None:
    """Print lines in Markdown as soon as they are ready."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def write_json(path: Path, figures: object) -> None:
    """Replace a file by figures."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(figures, indent=2) + "\n")
    os.replace(new, path)
