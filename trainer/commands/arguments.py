"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_run(parser: argparse.ArgumentParser) -> None:
    """A run's folder, and which average of its weights."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run: the `out` of its settings")
    parser.add_argument(
        "--ema",
        type=float,
        metavar="SIGMA_REL",
        help="relative width of the average of the weights (default: the first of ema.sigma_rel)",
    )


def positive(text: str) -> int:
    """An integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
