"""jvpgraph sample"""

from __future__ import annotations

import argparse
from pathlib import Path

from jvpgraph.trainer.commands.arguments import add_run, positive
from jvpgraph.trainer.run import finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--steps", type=positive, default=4, help="network passes per sample (default: 4)")
    parser.add_argument("--count", type=positive, default=16, help="samples (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG file (default: RUN/samples-STEPS.png)")


def run(args: argparse.Namespace) -> None:
    out = args.out or args.folder / f"samples-{args.steps}.png"
    print(finished.sample_run(args.folder, steps=args.steps, count=args.count, ema=args.ema, seed=args.seed, out=out))
