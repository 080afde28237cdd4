"""The plot command: ``python -m lightning_rprop.monitor RUN_FOLDER -o picture.png``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from lightning_rprop.monitor.plot import plot_run, printable, save


def main(argv: Sequence[str] | None = None) -> None:
    """Draw a run and print the path of the picture.

    Args:
        argv: Command-line arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_rprop.monitor",
        description="Draw the loss and the step sizes of a run trained with StepSizeMonitor.",
    )
    parser.add_argument(
        "run_folder",
        metavar="RUN_FOLDER",
        help="log folder of CSVLogger or TensorBoardLogger, such as lightning_logs/version_0",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PICTURE",
        default="step_sizes.png",
        help="file to write; the suffix sets the format, such as .png, .pdf or .svg (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    os.environ["MPLBACKEND"] = "agg"  # draw without a window; a backend set by a notebook may not be installed here
    try:
        fig, _ = plot_run(arguments.run_folder)
        save(fig, arguments.output)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(printable(arguments.output))


if __name__ == "__main__":
    main()
