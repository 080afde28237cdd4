"""Plots of a run's loss and step sizes. Imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from lightning_rprop.monitor._logs import Series, read_series
from lightning_rprop.monitor._names import MEMBER_LOSS, PREFIX, QUANTILE, key_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    Floats = npt.NDArray[np.float64]

# Safe for color blindness: Paul Tol's "muted" scheme (SRON/EPS/TN/09-002), and black.
_COLORS = ["#332288", "#cc6677", "#44aa99", "#ddcc77", "#882255", "#88ccee", "#117733", "#aa4499", "#999933", "#000000"]
_LOSS_COLORS = [_COLORS[-1], *_COLORS[1:-1]]
_MOST_LINES = len(_COLORS)  # more parameters become a heat map
_MOST_LOSSES = 8
_SUMMARY = re.compile("/(min|median|max)$")  # of the losses of members, as FullBatch logs them
_LINES = ("median", "q50", "mean", "max", "min")  # a parameter's line: the first of these that was logged
_ROW = 0.13  # height of a heat map row in inches, enough for a name in this font size
_ROW_FONT = 7
_TOO_LARGE = 1e100  # far beyond this, Matplotlib's axis limits overflow
_TALLEST = 60.0  # inches; with more parameters the rows shrink, and only some are named


def plot_run(folder: str | Path) -> tuple[Figure, npt.NDArray[np.object_]]:
    """Plot the loss and the step sizes of a finished run from its log folder; needs no torch.

    Args:
        folder: The log folder of a ``CSVLogger`` or ``TensorBoardLogger``, or a folder above it.

    Returns:
        The figure, made by pyplot, and its axes from top to bottom. ``plot_series()`` says what they show.

    Raises:
        FileNotFoundError: If there is no log.
        ValueError: If there are no step sizes in it, or more than one run logged some.
        ModuleNotFoundError: If Matplotlib, or TensorBoard for its event files, is not installed.
    """
    return plot_series(read_series(folder), title=printable("/".join(Path(folder).resolve().parts[-2:])))


def printable(path: str) -> str:
    """Return a path in which bytes that are not text are replaced, so that it can be printed."""
    return os.fsencode(path).decode(errors="replace")


def plot_series(series: Series, title: str = "", maximize: bool = False) -> tuple[Figure, npt.NDArray[np.object_]]:
    """Plot the loss and, below it, the step sizes over the optimizer steps.

    Each parameter is a line within a band, drawn from what was logged. The line is its median, else its mean, maximum
    or minimum. The band reaches from its lowest to its highest quantile, else from minimum to maximum. More than 10
    parameters become the rows of a heat map of the line's values, below the line and band of all parameters. If no
    parameter was logged separately, only the line and band of all parameters are drawn. The loss panel shows every key
    with "loss" in its last part, or before ``/min``, ``/median`` or ``/max``, at most the 8 shortest. The losses of
    members, ``member_loss/0`` and so on, are thin lines there, and the best member is emphasised.

    Args:
        series: ``{key: (steps, values)}`` as logged by ``StepSizeMonitor`` and Lightning. Values that are not finite
            or exceed 1e100 leave a gap.
        title: Title of the figure.
        maximize: Whether the best member is that with the highest loss instead of the lowest.

    Returns:
        The figure, made by pyplot, and its axes from top to bottom.

    Raises:
        ValueError: If there is no step size to draw.
        ModuleNotFoundError: If Matplotlib is not installed.
    """
    series = {key: logged for key, logged in series.items() if logged[0]}
    names = _names(series)
    each = [name for name in names if name]
    panels: list[tuple[float, Callable[[Axes], None]]] = []  # height in inches, and the function that draws it
    losses, members = _losses(series), _drawable(series, [key for key in series if key.startswith(MEMBER_LOSS)])
    if losses or members:
        panels.append((2.2, partial(_draw_losses, series, losses, members, maximize)))
    if len(each) <= _MOST_LINES:
        panels.append((4.2, partial(_draw_lines, series, each or [""])))
    else:
        if "" in names:
            panels.append((2.8, partial(_draw_lines, series, [""])))
        height = min(max(_ROW * len(each), 3.0), _TALLEST)
        panels.append((height, partial(_draw_heat_map, series, each, height)))

    heights = [height for height, _ in panels]
    fig, grid = _pyplot().subplots(
        len(panels),
        sharex=True,
        squeeze=False,
        layout="constrained",
        figsize=(10, sum(heights) + 0.8),
        height_ratios=heights,
    )
    axes: npt.NDArray[np.object_] = grid[:, 0]
    for ax, (_, draw) in zip(axes, panels, strict=True):
        ax.margins(x=0.01)
        draw(ax)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if title:
        fig.suptitle(title, parse_math=False)
    return fig, axes


def save(fig: Figure, path: str | Path) -> None:
    """Write a figure to a file and close it; a failure leaves no partial file.

    Args:
        fig: The figure.
        path: The file. Its suffix sets the format, and missing folders are created.

    Raises:
        ValueError: If Matplotlib does not support the format.
    """
    path = Path(path)
    form = path.suffix[1:].lower()
    known = fig.canvas.get_supported_filetypes()
    if form not in known:
        raise ValueError(f"the suffix of {str(path)!r} must be a picture format: {', '.join(sorted(known))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fig.savefig(part, format=form, dpi=150)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        _pyplot().close(fig)


def _pyplot() -> ModuleType:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need Matplotlib: pip install 'lightning-rprop[plot]'") from error
    return plt


def _names(series: Series) -> list[str]:
    """Return the parameters that can be drawn, in logged order; ``""`` stands for all parameters together."""
    parts = _parts(series)
    if not parts:
        raise ValueError(
            f"there is no step size to draw (no key '{PREFIX}...'); "
            "train with Trainer(callbacks=[StepSizeMonitor()]), long enough for it to record"
        )
    names = dict.fromkeys(name for name, statistic in parts if statistic in _LINES or QUANTILE.fullmatch(statistic))
    if not names:
        logged = ", ".join(dict.fromkeys(statistic for _, statistic in parts))
        raise ValueError(
            f"there is no step size to draw, only {logged}; let StepSizeMonitor log 'median' or 'mean' too"
        )
    return list(names)


def _parts(series: Series) -> list[tuple[str, str]]:
    """Return the parameter and statistic of each step size key."""
    parts = [key.removeprefix(PREFIX).rpartition("/") for key in series if key.startswith(PREFIX)]
    return [(name, statistic) for name, _, statistic in parts]


def _losses(series: Series) -> list[str]:
    keys = [k for k in series if not k.startswith(PREFIX)]
    keys = [k for k in keys if "loss" in _SUMMARY.sub("", k).rpartition("/")[2].lower()]
    keys = [k for k in keys if not (k.endswith("_epoch") and k.removesuffix("_epoch") + "_step" in series)]
    return _drawable(series, keys)


def _drawable(series: Series, keys: list[str]) -> list[str]:
    return [k for k in keys if (np.abs(series[k][1]) < _TOO_LARGE).any()]


def _choose_statistics(series: Series, names: Sequence[str]) -> tuple[str, tuple[str, str] | None]:
    """Choose the statistics of the line and of the ends of the band, the same for all these parameters."""
    owners = set(names)
    logged = Counter(statistic for name, statistic in _parts(series) if name in owners)
    quantiles = sorted(filter(QUANTILE.fullmatch, logged), key=lambda q: float(q[1:]))
    choices = [*_LINES, *sorted(quantiles, key=lambda q: abs(float(q[1:]) - 50))]
    line = max(choices, key=lambda statistic: logged[statistic])  # the first that the most parameters have
    if len(quantiles) > 1:
        return line, (quantiles[0], quantiles[-1])
    return line, ("min", "max") if {"min", "max"} <= logged.keys() else None


def _aligned(series: Series, keys: Sequence[str]) -> tuple[Floats, Floats]:
    """Align values on common steps; return the steps, and a row of values for each key, NaN if missing."""
    logged = [series.get(key, ([], [])) for key in keys]
    steps = np.unique(np.concatenate([np.asarray(at, dtype=float) for at, _ in logged]))
    rows = np.full((len(keys), len(steps)), np.nan)
    for row, (at, values) in zip(rows, logged, strict=True):
        row[np.searchsorted(steps, at)] = values
    rows[~(np.abs(rows) < _TOO_LARGE)] = np.nan
    return steps, rows


def _bounds(series: Series) -> dict[str, float]:
    """Return the step size bounds that a log axis can show."""
    last = {kind: series[key][1][-1] for kind in ("lower", "upper") if (key := key_of("", f"{kind}_bound")) in series}
    return {kind: bound for kind, bound in last.items() if 0 < bound < _TOO_LARGE}


def _draw_losses(series: Series, keys: list[str], members: list[str], maximize: bool, ax: Axes) -> None:
    short = set(sorted(keys, key=len)[:_MOST_LOSSES])  # the shortest names are usually totals, not parts
    drawn = [key for key in keys if key in short]
    lines, labels = _draw_members(series, members, maximize, ax) if members else ([], [])
    for key, color in zip(drawn, _LOSS_COLORS[len(lines[:1]) :], strict=False):  # the best member has the first
        steps, (values,) = _aligned(series, [key])
        lines.append(_draw_curve(ax, steps, values, color))
    ax.set(ylabel="loss", yscale="log" if ax.dataLim.ymin > 0 else "linear")
    labels += _shortened(drawn)
    _legend(ax, lines, labels, f"{len(drawn)} of {len(keys)} losses" if len(drawn) < len(keys) else "")


def _draw_members(series: Series, keys: list[str], maximize: bool, ax: Axes) -> tuple[list[Line2D], list[str]]:
    """Draw the losses of members, and return lines and labels for the legend."""
    steps, rows = _aligned(series, keys)
    found = np.where(np.isnan(rows), np.inf, -rows if maximize else rows)
    best = found.min(axis=1).argmin()
    others = [_draw_curve(ax, steps, row, "0.6") for row in np.delete(rows, best, axis=0)]
    for line in others:
        line.set(linewidth=0.7, markersize=2)
    lines = [_draw_curve(ax, steps, rows[best], _LOSS_COLORS[0]), *others[:1]]
    return lines, [f"member {keys[best].removeprefix(MEMBER_LOSS)}, the best", f"{len(others)} others"][: len(lines)]


def _draw_lines(series: Series, names: list[str], ax: Axes) -> None:
    line, band = _choose_statistics(series, names)
    lines = []
    for name, color in zip(names, _COLORS, strict=False):
        keys = [key_of(name, statistic) for statistic in (line, *(band or ()))]
        steps, rows = _aligned(series, keys)
        lines.append(_draw_curve(ax, steps, rows[0], color))
        if band:
            _draw_band(ax, steps, rows[1], rows[2], color, among=len(names))
    _draw_bounds(_bounds(series), ax, x=0.995, align="right", gap=2)
    ax.margins(y=0.08)
    positive = np.isfinite(ax.dataLim.minposy)  # Matplotlib rejects an empty log axis
    ax.set(ylabel="step size", yscale="log" if positive else "linear")
    labels = _shortened(names) if names != [""] else ["all parameters"]
    _legend(ax, lines, labels, f"line: {line}" + (f"\nband: {band[0]} to {band[1]}" if band else ""))


def _draw_heat_map(series: Series, names: list[str], height: float, ax: Axes) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    line, _ = _choose_statistics(series, names)
    steps, values = _aligned(series, [key_of(name, line) for name in names])
    drawn = values[values > 0] if (values > 0).any() else np.ones(1)
    low, high = drawn.min(), drawn.max()
    widen = max(1.0, np.sqrt(10 * low / high))  # at least a decade, so that small differences look small
    half = np.diff(steps) / 2 if len(steps) > 1 else np.array([0.5])
    edges = np.concatenate([[steps[0] - half[0]], steps[:-1] + half[: len(steps) - 1], [steps[-1] + half[-1]]])
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(names) + 1) - 0.5,
        values,
        norm=LogNorm(low / widen, high * widen),
        cmap=colormaps["viridis"].with_extremes(bad="0.85"),
        rasterized=True,  # vector formats would store every cell as a shape
    )
    every = -(-len(names) * _ROW // height) if height == _TALLEST else 1
    rows = np.arange(0, len(names), int(every))
    labels = _shortened(names)
    ax.set_yticks(rows, labels=[labels[row] for row in rows], fontsize=_ROW_FONT, parse_math=False)
    ax.tick_params(axis="x", top=True, labeltop=True)  # the labels below may be far away
    ax.invert_yaxis()
    tall = min(4.0, height - 0.4)
    bar = ax.figure.colorbar(mesh, cax=ax.inset_axes((1.015, 1 - (tall + 0.2) / height, 0.025, tall / height)))
    bar.set_label(f"step size: {line}" + ("" if (values > 0).all() else "\n(grey: none, zero or not finite)"))
    bounds = _bounds(series)
    bar.ax.set_ylim(min([low / widen, *bounds.values()]), max([high * widen, *bounds.values()]))
    bar.ax.tick_params(labelsize="small")
    _draw_bounds(bounds, bar.ax, x=0, align="left", gap=7)


def _draw_bounds(bounds: dict[str, float], ax: Axes, x: float, align: Literal["left", "right"], gap: int) -> None:
    for kind, bound in bounds.items():
        ax.axhline(bound, color="black", linestyle="--", linewidth=0.8, clip_on=False)
        ax.annotate(
            f"{kind} bound {bound:.4g}",
            (x, bound),
            xycoords=ax.get_yaxis_transform(),
            xytext=(0, gap if kind == "upper" else -gap),
            textcoords="offset points",
            ha=align,
            va="bottom" if kind == "upper" else "top",
            fontsize="small",
        )


def _draw_curve(ax: Axes, steps: Floats, values: Floats, color: str) -> Line2D:
    isolated = _isolated(values)
    (line,) = ax.plot(steps, values, color=color, marker="o" if len(isolated) else "", markersize=5, markevery=isolated)
    return line


def _draw_band(ax: Axes, steps: Floats, low: Floats, high: Floats, color: str, among: int) -> None:
    # paler if more bands overlap
    ax.fill_between(steps, low, high, color=color, alpha=0.05 + 0.15 / among**0.5, linewidth=0)
    isolated = _isolated(low + high)
    ax.vlines(steps[isolated], low[isolated], high[isolated], color=color, alpha=0.3, linewidth=3)


def _isolated(values: Floats) -> npt.NDArray[np.intp]:
    """Return the indices of values without a neighbor, which a line or band would not show."""
    gap = np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    return np.flatnonzero(gap[:-2] & ~gap[1:-1] & gap[2:])


def _legend(ax: Axes, lines: Sequence[Line2D], labels: Sequence[str], title: str) -> None:
    legend = ax.legend(
        lines,
        [""] * len(lines),
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
    )
    # set afterwards, because Matplotlib skips labels that start with "_" and parses "$" as math
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)


def _shortened(names: Sequence[str], most: int = 44) -> list[str]:
    """Shorten long names in the middle, but keep them distinct."""
    while most < 80:
        head = most // 3  # the end of a name is more specific
        short = [
            name if len(name) <= most else f"{name[:head].rstrip('.')}…{name[head + 1 - most :].lstrip('.')}"
            for name in names
        ]
        if len(set(short)) == len(names):
            break
        most += 10
    return short
