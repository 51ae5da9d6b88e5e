"""jvpgraph diagnose"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import add_run, positive
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer.run import diagnosis
else:
    diagnosis = later("jvpgraph.trainer.run.diagnosis")

READING = """
how to read it:
  A tangent says how the student's output changes along the teacher's path; consistency losses train on it. It is
  computed in the precision of the run, next to a reference of the same weights in float64. `adds` is the error that
  an op makes by itself, out of exact inputs: 3e-3 is what bfloat16 rounds, 1e-7 float32. Much more is a fault, and
  stands on top, with its module and line. `if float32` is what precision.tangent=float32 would leave of it.
  Above 0.1, `tangent off by` means that a training step goes another way than it should.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--times",
        type=float,
        nargs="+",
        metavar="T",
        help="where on the noise axis, in radians from 0, data, to 1.57, noise "
        "(default: 0.02 0.2 0.8 1.3 1.52 1.56; both ends are where it goes wrong)",
    )
    parser.add_argument("--count", type=positive, default=2, help="samples of the run's data (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--reference",
        choices=("float64", "float32"),
        default="float64",
        help="what is taken for right (default: float64; float32 is faster on a GPU, and does for bfloat16)",
    )
    parser.add_argument(
        "--no-differences",
        action="store_true",
        help="leave out how good finite differences would be, which is most of the time",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for diagnosis.json and diagnosis.png (default: RUN)"
    )
    parser.epilog = READING


def run(args: argparse.Namespace) -> None:
    found = diagnosis.diagnose_run(
        args.folder,
        times=diagnosis.TIMES if args.times is None else tuple(args.times),
        count=args.count,
        ema=args.ema,
        reference=args.reference,
        steps=() if args.no_differences else diagnosis.STEPS,
        seed=args.seed,
        out=args.out,
    )
    out = args.folder if args.out is None else args.out
    print(f"{found}\n{out / 'diagnosis.json'}\n{out / 'diagnosis.png'}")
