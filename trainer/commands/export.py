"""jvpgraph export"""

from __future__ import annotations

import argparse
from pathlib import Path

from jvpgraph.trainer.commands.arguments import add_run, positive
from jvpgraph.trainer.run import finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--step", type=positive, help="checkpoint to take (default: the last)")


def run(args: argparse.Namespace) -> None:
    print(finished.export_run(args.folder, args.out, ema=args.ema, step=args.step))
