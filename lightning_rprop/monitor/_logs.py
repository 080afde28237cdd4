"""Read back what a run has logged, from its folder."""

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

# Logged key -> its steps, rising, and its values.
Series: TypeAlias = dict[str, tuple[list[int], list[float]]]

_CSV = "metrics.csv"


def read_series(folder: str | Path) -> Series:
    """Read everything that a run logged as numbers.

    Args:
        folder: Where Lightning's ``CSVLogger`` or ``TensorBoardLogger`` wrote, such as
            ``lightning_logs/version_0``; the CSV is taken if both did. A folder above it will do as long as only one
            run below logged step sizes.

    Returns:
        ``{key: (steps, values)}``. Of two values for the same step the later one counts, as after a resume. Keys
        come in the order of their first appearance in TensorBoard's files; a ``metrics.csv`` does not keep that
        order, its keys are sorted, 2 before 10. TensorBoard keeps single precision.

    Raises:
        FileNotFoundError: If there is no such folder, or no log in it or below.
        ValueError: If no run has logged step sizes, several have, or a log is damaged.
        ModuleNotFoundError: If TensorBoard is needed and not installed.
    """
    run = _find_run(Path(folder))
    read, source = (_read_csv, run / _CSV) if _holds_step_sizes(run / _CSV) else (_read_events, run)
    series = read(source)
    if not any(key.startswith(PREFIX) for key in series):
        raise ValueError(
            f"{source} holds no step and step size together (keys 'step' and '{PREFIX}...'). Train long enough for "
            "StepSizeMonitor to record, or name the folder of another run"
        )
    return series


def _find_run(folder: Path) -> Path:
    """Find the one folder that has logged step sizes: this one, or else one below."""
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
            "train with Trainer(callbacks=[StepSizeMonitor()]), and long enough for it to log"
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
    """The files with logs; TensorBoard too knows its own by this part of the name."""
    return [file for file in folder.iterdir() if (file.name == _CSV or "tfevents" in file.name) and file.is_file()]


def _holds_step_sizes(file: Path) -> bool:
    """Tell without parsing, as there may be many runs to choose from; event files too hold keys as plain text."""
    if not file.is_file():
        return False
    with file.open("rb") as lines:
        return any(PREFIX.encode() in line for line in lines)


def _read_csv(file: Path) -> Series:
    try:
        return _parse_csv(file, encoding="utf-8-sig")
    except UnicodeDecodeError:  # Lightning writes in the encoding of the platform; numbers are the same in all of them
        return _parse_csv(file, encoding="latin-1")


def _parse_csv(file: Path, encoding: str) -> Series:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with file.open(newline="", encoding=encoding) as lines:
        rows = csv.DictReader(line.replace("\0", "") for line in lines)  # a crash of the machine may leave zeros
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
            raise ValueError(
                f"{file}, line {rows.line_num + 1}: {error}. Remove that line"
            ) from error  # after the last
    # Lightning sorts the columns by the alphabet, where layer 10 comes before layer 2
    return {key: _sorted(found[key]) for key in sorted(found, key=_natural)}


def _read_events(folder: Path) -> Series:
    try:
        from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder} holds TensorBoard event files, which need TensorBoard to be read: pip install tensorboard"
        ) from error
    # every scalar, not a sample of 10000, and nothing else
    sizes = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 1) | {event_accumulator.SCALARS: 0}
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=sizes)
    try:
        events.Reload()
    except Exception as error:  # TensorBoard declares none; it stops at a cut-off record by itself
        files = ", ".join(sorted(file.name for file in _logs(folder) if file.name != _CSV))
        raise ValueError(f"TensorBoard cannot read {folder} ({files}): {error}. Remove the damaged file") from error
    keys = events.Tags()[event_accumulator.SCALARS]
    return {key: _sorted({event.step: event.value for event in events.Scalars(key)}) for key in keys}


def _sorted(values: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _number(cell: object) -> float | None:
    """Return the number in a cell, ``None`` if it is blank, a text, or cut off where a run was killed."""
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
