"""Everything that needs a GPU, in one command: tests, the self-checks of the kernels, and the times of a step.

It writes one file with the device, the versions, the results and the figures. The file is rewritten after each result,
so that a crash loses only what has not run. The exit code is 0 if everything passed, 1 if not, and 2 without a GPU. The
tests need the packages of the extra ``test``.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --json gpu.json --seconds 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, write_json
from benchmarks.step import CUDA_CASES, time_rows
from lightning_rprop.optim._foreach import update_foreach
from lightning_rprop.optim._rule import Update
from lightning_rprop.optim._self_check import check

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe() -> dict[str, Any]:
    """Return the GPU and the versions of everything between it and the results."""
    properties = torch.cuda.get_device_properties(0)
    return machine(["cuda"]) | {
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "lightning-rprop": installed("lightning-rprop"),
    }


def driver() -> str:
    """Return the version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def installed(package: str) -> str:
    """Return the version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def run_tests(*arguments: str) -> dict[str, Any]:
    """Run pytest in a subprocess, which a crash of the GPU may end.

    Args:
        arguments: Options of pytest that select the tests.

    Returns:
        The exit code, the counts, and the errors of the tests that failed by their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", *arguments, "--continue-on-collection-errors", f"--junitxml={file}"]
        code = subprocess.run(command, cwd=Path(__file__).parents[1]).returncode
        cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    outcomes = [next((part for part in case if part.tag in ("failure", "error", "skipped")), None) for case in cases]
    failed = {
        f"{case.get('classname')}::{case.get('name')}": outcome.get("message", "")
        for case, outcome in zip(cases, outcomes, strict=True)
        if outcome is not None and outcome.tag != "skipped"
    }
    skipped = sum(outcome is not None and outcome.tag == "skipped" for outcome in outcomes)
    return {
        "exit_code": code,
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": failed,
    }


def run_checks(implementations: dict[str, Update], device: torch.device) -> Iterator[dict[str, Any]]:
    """Check implementations for each dtype, twice, because the first check includes compilation.

    Args:
        implementations: Implementations by their names.
        device: Where to run them.

    Yields:
        The name, the dtype, the seconds of both checks, and an error or an empty string.
    """
    for name, implementation in implementations.items():
        for dtype in DTYPES:
            seconds: list[float] = []
            error = ""
            try:
                for _ in range(2):
                    start = time.perf_counter()
                    check(implementation, dtype, device)
                    seconds.append(time.perf_counter() - start)
            except Exception as failure:  # compilers and drivers raise anything, and the other dtypes still count
                error = repr(failure)
            yield {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "seconds": seconds, "error": error}


def update_triton(*arguments: Any) -> Any:
    """Call the implementation in Triton, which may be missing."""
    from lightning_rprop.optim import _triton

    return _triton.update_triton(*arguments)


def run_steps(seconds: float) -> Iterator[dict[str, Any]]:
    """Time the cases of ``benchmarks.step`` that need a GPU.

    Args:
        seconds: Time for each case.

    Yields:
        The case, its rows, a text about its memory traffic, and an error or an empty string.
    """
    for name, case in CUDA_CASES.items():
        try:
            rows, roofline = time_rows(case, seconds)
        except Exception as failure:
            yield {"case": name, "rows": [], "roofline": "", "error": repr(failure)}
        else:
            print("\n".join(row.text() for row in rows), flush=True)
            yield {"case": name, "rows": [row._asdict() for row in rows], "roofline": roofline, "error": ""}


def main() -> int:
    """Run everything, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="(default: gpu.json)")
    parser.add_argument("--seconds", type=float, default=20, help="time for each case of a step (default: 20)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"torch {torch.__version__} finds no GPU. Use a CUDA build of torch on a machine with a GPU.\n")
    report: dict[str, Any] = {"machine": describe()}
    print(json.dumps(report["machine"], indent=2), flush=True)
    report["tests"] = run_tests("-m", "gpu")
    write_json(arguments.json, report)
    for part, results in (
        ("checks", run_checks({"triton": update_triton, "foreach": update_foreach}, torch.device("cuda", 0))),
        ("steps", run_steps(arguments.seconds)),
    ):
        report[part] = []
        for result in results:
            report[part].append(result)
            write_json(arguments.json, report)
    errors = [result["error"] for part in ("checks", "steps") for result in report[part] if result["error"]]
    print("\n".join([*errors, f"{arguments.json} written"]))
    return 1 if errors or report["tests"]["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
