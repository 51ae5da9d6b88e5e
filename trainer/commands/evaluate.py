"""jvpgraph evaluate"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import add_run, positive
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer.run import finished
else:
    finished = later("jvpgraph.trainer.run.finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--steps", type=positive, nargs="+", default=(), help="network passes per sample (default: sampling.steps)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="of the noise (default: evaluation.seeds)")


def run(args: argparse.Namespace) -> None:
    print(finished.evaluate_run(args.folder, steps=tuple(args.steps), seeds=tuple(args.seeds), ema=args.ema))
