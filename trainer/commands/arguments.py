"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    import torch
else:
    torch = later("torch")


def add_run(parser: argparse.ArgumentParser) -> None:
    """A run's folder, and which average of its weights."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run: the `out` of its settings")
    parser.add_argument(
        "--ema",
        type=float,
        metavar="SIGMA_REL",
        help="relative width of the average of the weights (default: the first of ema.sigma_rel)",
    )


def add_pipeline(parser: argparse._ActionsContainer) -> None:
    """The pipeline that a student goes into, and the times that its scheduler keeps."""
    parser.add_argument(
        "--pipeline",
        type=Path,
        metavar="FOLDER",
        help="pipeline of diffusers to put the student into (default: the one that the teacher came from)",
    )
    parser.add_argument(
        "--times",
        choices=("even", "run"),
        default="even",
        help="where diffusers' own scheduler cannot keep the run's times: even steps next to them (default), or the "
        "run's own by a class in the folder, which from_pretrained takes with trust_remote_code=True only",
    )


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """The scale that a student is told."""
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="guidance scale of a student that learnt several (default: sampling.guidance of its settings, or the "
        "middle)",
    )


def device_named(name: str) -> torch.device:
    """`auto`: this process's GPU, if there is one. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device of torch: auto, cpu, cuda, cuda:0, ...") from error


def positive(text: str) -> int:
    """An integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
