"""jvpgraph sample"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jvpgraph.trainer.commands.arguments import add_guidance, add_pipeline, add_run, positive
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer.export import prompts
    from jvpgraph.trainer.prepare import captions
    from jvpgraph.trainer.run import finished
else:
    prompts, captions = later("jvpgraph.trainer.export.prompts"), later("jvpgraph.trainer.prepare.captions")
    finished = later("jvpgraph.trainer.run.finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--steps", type=positive, help="network passes per sample (default: 4)")
    parser.add_argument("--count", type=positive, default=16, help="samples (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    add_guidance(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="PNG file, or a folder for prompts (default: RUN/samples-STEPS.png, RUN/prompts)",
    )
    group = parser.add_argument_group("prompts", "pictures and videos by the whole pipeline, instead of the data's")
    group.add_argument("--prompts", nargs="+", metavar="TEXT", help="one or more, or a file with one in each line")
    group.add_argument(
        "--images",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="what videos begin with, for pipelines from image to video: one picture for each prompt, or one for all",
    )
    group.add_argument(
        "--film",
        choices=("webp", "mp4"),
        default="webp",
        help="what videos are written as (default: webp, without loss; mp4: pip install av)",
    )
    add_pipeline(group)
    group.add_argument(
        "--call",
        nargs="+",
        type=argument,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the pipeline: height=480 width=832 num_frames=81",
    )


def run(args: argparse.Namespace) -> None:
    if args.prompts is None:
        steps = args.steps or 4
        out = args.out or args.folder / f"samples-{steps}.png"
        shown = finished.sample_run(
            args.folder, steps=steps, count=args.count, ema=args.ema, seed=args.seed, out=out, guidance=args.guidance
        )
        print(shown)
        return
    files = prompts.sample_prompts(
        args.folder,
        lines(args.prompts),
        out=args.out or args.folder / "prompts",
        pipeline=args.pipeline,
        steps=args.steps,
        own_times=args.times == "run",
        ema=args.ema,
        guidance=args.guidance,
        seed=args.seed,
        images=args.images,
        film=args.film,
        more=dict(args.call),
    )
    print("\n".join(map(str, files)))


def lines(given: list[str]) -> list[str]:
    """The prompts themselves, or those of a file."""
    if len(given) > 1 or not is_file(given[0]):
        return given
    found = captions.prompts_of(Path(given[0]))
    if not found:
        raise ValueError(f"{given[0]} has no prompts\nWrite one in each line.")
    return found


def is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a prompt can be longer than a name may be
        return False


def argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
