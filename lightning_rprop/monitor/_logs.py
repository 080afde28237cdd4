"""Reading a run's logs from its folder."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from lightning_rprop.monitor._names import PREFIX

# Key to its steps, in ascending order, and its values.
Series: TypeAlias = dict[str, tuple[list[int], list[float]]]

_CSV = "metrics.csv"


def read_series(folder: str | Path) -> Series:
    """Read all numbers that a run logged.

    Args:
        folder: The log folder of a ``CSVLogger`` or ``TensorBoardLogger``, such as ``lightning_logs/version_0``. If
            both wrote there, the CSV file is read. A parent folder works if only one run below it logged step sizes.

    Returns:
        ``{key: (steps, values)}``. If a step was logged twice, as after a resume, the later value is returned. Keys
        from TensorBoard are in order of appearance. Keys from ``metrics.csv``, which does not keep that order, are
        in natural sort order (2 before 10). TensorBoard stores single precision.

    Raises:
        FileNotFoundError: If the folder does not exist, or there is no log in it or below it.
        ValueError: If no run or more than one run logged step sizes, or a log is damaged.
        ModuleNotFoundError: If TensorBoard is needed but not installed.
    """
    run = _find_run(Path(folder))
    read, source = (_read_csv, run / _CSV) if _holds_step_sizes(run / _CSV) else (_read_events, run)
    series = read(source)
    if not any(key.startswith(PREFIX) for key in series):
        raise ValueError(
            f"{source} has no step with a step size (keys 'step' and '{PREFIX}...'). Train long enough for "
            "StepSizeMonitor to record, or name the folder of another run"
        )
    return series


def _find_run(folder: Path) -> Path:
    """Return the folder of the only run with step sizes: this folder, or one below it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name the folder that the Trainer's logger wrote to")
    logs = {folder: _logs(folder)}
    unreadable: list[OSError] = []
    if not logs[folder]:
        logs = {below: found for below in _folders_below(folder, unreadable.append) if (found := _logs(below))}
    if not logs and unreadable:
        raise unreadable[0]
    if not logs:
        raise FileNotFoundError(
            f"there is neither a {_CSV} nor a TensorBoard event file in {folder} or below; name the folder of a run "
            "that was trained with Trainer(logger=CSVLogger(...)) or Trainer(logger=TensorBoardLogger(...))"
        )
    runs = [run for run, files in logs.items() if any(map(_holds_step_sizes, files))]
    if not runs:
        raise ValueError(
            f"the logs in {folder} hold no step sizes (keys '{PREFIX}...'); "
            "train with Trainer(callbacks=[StepSizeMonitor()]), long enough for it to record"
        )
    if len(runs) > 1:
        names = [str(run.relative_to(folder)) for run in runs[:10]]
        more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
        raise ValueError(f"{len(runs)} runs below {folder} logged step sizes; name one: {', '.join(names)}{more}")
    return runs[0]


def _folders_below(folder: Path, on_error: Callable[[OSError], None]) -> list[Path]:
    found = (Path(root) for root, _, _ in os.walk(folder, onerror=on_error))
    return sorted(found, key=lambda path: _natural(str(path)))


def _logs(folder: Path) -> list[Path]:
    """List the log files; TensorBoard recognizes its files by the same part of the name."""
    return [file for file in folder.iterdir() if (file.name == _CSV or "tfevents" in file.name) and file.is_file()]


def _holds_step_sizes(file: Path) -> bool:
    """Search a file for step size keys without parsing it; event files hold keys as plain text too."""
    if not file.is_file():
        return False
    with file.open("rb") as lines:
        return any(PREFIX.encode() in line for line in lines)


def _read_csv(file: Path) -> Series:
    try:
        return _parse_csv(file, encoding="utf-8-sig")
    except UnicodeDecodeError:  # Lightning writes in the platform's encoding; digits are the same in all of them
        return _parse_csv(file, encoding="latin-1")


def _parse_csv(file: Path, encoding: str) -> Series:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with file.open(newline="", encoding=encoding) as lines:
        rows = csv.DictReader(line.replace("\0", "") for line in lines)  # a machine crash may leave zero bytes
        try:
            for row in rows:
                step = _number(row.pop("step", None))
                if step is None:
                    continue
                if not math.isfinite(step):
                    raise ValueError(f"{file}, line {rows.line_num}: the step is {step}. Remove that line")
                for key, cell in row.items():
                    if (value := _number(cell)) is not None:
                        found[key][int(step)] = value
        except csv.Error as error:
            line = rows.line_num + 1  # line_num is the last line that could be read
            raise ValueError(f"{file}, line {line}: {error}. Remove that line") from error
    # Lightning sorts the columns alphabetically, layer 10 before layer 2
    return {key: _sorted(found[key]) for key in sorted(found, key=_natural)}


def _read_events(folder: Path) -> Series:
    try:
        from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder} holds TensorBoard event files, and reading them needs TensorBoard: pip install tensorboard"
        ) from error
    # all scalars (the default is a sample of 10,000), and nothing else
    sizes = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 1) | {event_accumulator.SCALARS: 0}
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=sizes)
    try:
        events.Reload()
    except Exception as error:  # TensorBoard documents none; truncated files raise no error
        files = ", ".join(sorted(file.name for file in _logs(folder) if file.name != _CSV))
        raise ValueError(f"TensorBoard cannot read {folder} ({files}): {error}. Remove the damaged file") from error
    keys = events.Tags()[event_accumulator.SCALARS]
    return {key: _sorted({event.step: event.value for event in events.Scalars(key)}) for key in keys}


def _sorted(values: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _number(cell: object) -> float | None:
    """Return the number in a cell, or ``None`` if it is blank, text, or truncated because the run was killed."""
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
