"""jvpgraph prepare"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import device_named, positive
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer.prepare import look, plan, start, write
else:
    look, plan = later("jvpgraph.trainer.prepare.look"), later("jvpgraph.trainer.prepare.plan")
    start, write = later("jvpgraph.trainer.prepare.start"), later("jvpgraph.trainer.prepare.write")

MAX_ENLARGE, SHARD_SIZE = 2.0, 128  # those of prepare.plan.Options

EPILOG = """\
files: .jpg, .png, .webp; .mp4, .webm (pip install av). Captions: NAME.txt or NAME.json ("text", "caption" or "prompt")
beside NAME.jpg, or metadata.jsonl, .csv or .parquet with "file_name" and "text". Instead of a folder: a .txt file with
a prompt a line, for objectives that need no data (dmd); from image to video, a folder of pictures alone is that.

  torchrun --nproc-per-node 8 -m jvpgraph.trainer.cli prepare models/FLUX.1-dev photos --out data/photos

After a stop the same command goes on; it encodes nothing twice. What comes out is the same for any number of processes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a diffusers pipeline")
    add(
        "source",
        type=Path,
        metavar="FOLDER",
        help="folder of pictures or clips with captions, or a .txt file of prompts",
    )
    add("--out", type=Path, required=True, metavar="DATA", help="folder of the shards")
    add("--size", type=size, metavar="WxH", help="pixels (default: the pipeline's)")
    add(
        "--aspects",
        nargs="*",
        metavar="W:H",
        help="further sizes of the same area, by aspect ratio; nothing behind it: none (default: nine from 1:2 to 2:1)",
    )
    add("--frames", type=positive, nargs="+", metavar="N", help="lengths of clips (default: the pipeline's)")
    add(
        "--fps",
        type=above_zero,
        metavar="F",
        help="frames per second of clips (default: those of the network's training)",
    )
    add("--caption", metavar="TEXT", help="of files that have none")
    add("--negative", default="", metavar="TEXT", help="negative prompt of the teacher's guidance (default: empty)")
    add("--guidance", type=float, metavar="G", help="told to guidance-distilled networks (default: the pipeline's)")
    add("--text-length", type=positive, metavar="N", help="tokens (default: the pipeline's)")
    add("--limit", type=positive, metavar="N", help="samples at most, the first by name")
    add(
        "--max-enlarge",
        type=above_zero,
        default=MAX_ENLARGE,
        metavar="X",
        help=f"leave out what is smaller than that times (default: {MAX_ENLARGE:g})",
    )
    add(
        "--shard-size",
        type=positive,
        default=SHARD_SIZE,
        metavar="N",
        help=f"default: {SHARD_SIZE} samples",
    )
    add("--on-bad", choices=("skip", "fail"), default="skip", help="of files that cannot be used (default: skip)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the text encoders (default: bfloat16 on a GPU, float32 on a CPU); the VAE runs in float32",
    )
    add("--device", default="auto", help="default: cuda if there is one")


def run(args: argparse.Namespace) -> None:
    device = device_named(args.device)
    options = plan.Options(
        size=args.size,
        aspects=None if args.aspects is None else tuple(args.aspects),
        frames=None if args.frames is None else tuple(args.frames),
        fps=args.fps,
        caption=args.caption,
        negative=args.negative,
        guidance=args.guidance,
        text_length=args.text_length,
        limit=args.limit,
        max_enlarge=args.max_enlarge,
        shard_size=args.shard_size,
        on_bad=args.on_bad,
        dtype=args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
    )
    card = write.prepare(args.checkpoint, args.source, args.out, options, device)
    if card:
        print(f"{look.describe(card)}\nSettings to start from: {args.out / start.RUN}")


def size(text: str) -> tuple[int, int]:
    """`832x480` -> (832, 480)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 832x480")
    return int(found[1]), int(found[2])


def above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} is not above 0")
    return value
