"""Write runs to plot, make up series, and read back what was drawn."""

from __future__ import annotations

import matplotlib
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

LOGGERS = [CSVLogger, TensorBoardLogger]
KEY = "step_size/net.0.weight/median"


def write(logger, folder, *records):
    """Log ``(step, metrics)`` records to exactly this folder, as a Trainer would."""
    logger = logger(folder.parent, name="", version=folder.name)
    for step, metrics in records:
        logger.log_metrics(metrics, step=step)
    logger.save()
    logger.finalize("success")


def make_series(names, records=5, statistics=("median", "q10", "q90"), overall=True, **more):
    """Make up a run. Every value is distinct, and follows from the parameter, the statistic and the step."""
    steps = [10 * i + 9 for i in range(records)]
    made = {"loss": (steps, [1 / (i + 1) for i in range(records)])}
    for place, name in enumerate([*names, ""] if overall else names):
        for s, statistic in enumerate(statistics):
            values = [(place + 1) * 1e-3 * (1 + 0.1 * s) * 0.9**i for i in range(records)]
            made["/".join(filter(None, ("step_size", name, statistic)))] = (steps, values)
    return made | more


def parameters(count):
    return [f"layers.{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(count)]


def bands(ax):
    """Return ``(steps, lows, highs)`` of every filled band."""
    found = []
    for band in (c for c in ax.collections if isinstance(c, matplotlib.collections.PolyCollection)):
        for path in band.get_paths():
            steps = sorted({float(x) for x in path.vertices[:, 0]})
            ends = [[y for x, y in path.vertices if x == step] for step in steps]
            found.append((steps, [min(e) for e in ends], [max(e) for e in ends]))
    return found


def curves(ax):
    return [line for line in ax.lines if line.get_linestyle() == "-"]


def dashed(ax):
    return sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def visible(axis):
    """Return the tick labels within the axis limits."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def inside(fig, artist):
    box, whole = artist.get_window_extent(), fig.bbox
    return whole.x0 <= box.x0 < box.x1 <= whole.x1 and whole.y0 <= box.y0 < box.y1 <= whole.y1
