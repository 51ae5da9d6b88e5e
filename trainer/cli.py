"""The command `jvpgraph`: COMMANDS lists what it does, commands/ has what each takes.

Nothing that takes long is imported before it is known which command is called.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jvpgraph


class Command(NamedTuple):
    """What it does, in a sentence; one that can be typed; and where more is said about it."""

    text: str
    example: str
    more: str


COMMANDS = {
    "prepare": Command(
        "Encode pictures, clips or prompts with a checkpoint's own VAE and text encoders.",
        "models/Wan2.1-T2V-1.3B-Diffusers clips --out data/clips --size 832x480 --frames 81 49",
        'docs/trainer.md, "Data from a folder"',
    ),
    "synthesize": Command(
        "Have a teacher make latents for the conditions of a run's data, once, as shards to train on.",
        "data/prompts/run.yaml --out data/made --count 20000",
        'docs/trainer.md, "Data that is not there"',
    ),
    "inspect": Command(
        "Show what was prepared: figures, and samples decoded again.",
        "data/clips --count 4 --check",
        'docs/trainer.md, "Data from a folder"',
    ),
    "plan": Command(
        "Say what a run will need: memory of each GPU, FLOPs, time.",
        "my_run.yaml --gpu h100 --gpus 8 parallel.dp_shard=-1",
        "docs/plan.md",
    ),
    "train": Command(
        "Distil a teacher; goes on by itself with a run that was stopped.",
        "digits_teacher out=out/teacher stages.0.steps=1000",
        "docs/trainer.md",
    ),
    "sample": Command(
        "Draw samples of a trained student.",
        "out/mine --steps 4 --count 16",
        'docs/trainer.md, "Out of the run"',
    ),
    "evaluate": Command(
        "Measure a student against its teacher and real data.",
        "out/mine --steps 1 4 --seeds 0 1 2",
        "docs/trainer.md; what is measured is set under evaluation, see `jvpgraph train --help`",
    ),
    "diagnose": Command(
        "Show where a student's tangents lose their digits: module, op, line, and by how much.",
        "out/mine --times 0.02 0.8 1.56",
        "docs/diagnose.md",
    ),
    "export": Command(
        "Save a student for use elsewhere: as a pipeline, a LoRA or a single file.",
        "out/mine --out mine-4-steps --format diffusers",
        'docs/trainer.md, "Out of the run"',
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 done; 1 failed; 2 wrong usage or settings; 128 + N stopped by signal N, such as 143 by SIGTERM and 130 by SIGINT;
    75 stopped by --time-limit.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    command, failures = module_of(args.command), module_of("failures")
    logging.basicConfig(format="%(levelname)s: %(message)s")  # warnings, such as those of a skipped shard
    logging.getLogger("jvpgraph.trainer").setLevel(logging.INFO)  # and what computes the attention
    try:
        command.run(args)
    except failures.Stopped as stop:
        print(f"\njvpgraph train: {stop}. {failures.GOES_ON}", file=sys.stderr)
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"\nstopped. {failures.RESUMES}" if args.command == "train" else "\nstopped", file=sys.stderr)
        return 130
    except failures.EXPECTED as error:
        if args.traceback:
            traceback.print_exc()
        out = getattr(args, "out", None) or getattr(args, "folder", None)
        print(f"jvpgraph {args.command}{rank()}: {failures.explain(error, args.command, out)}", file=sys.stderr)
        return 2 if isinstance(error, failures.WRONG_USE) else 1
    except Exception as error:
        message = failures.explain_other(error, args.command)
        if message is None or args.traceback:
            raise
        print(f"jvpgraph {args.command}{rank()}: {message}", file=sys.stderr)
        return 1
    return 0


def rank() -> str:
    """Which of several processes says it."""
    return f", rank {os.environ.get('RANK', '?')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; leaves the process with status 2 if they are wrong."""
    parser = build_parser(argv)
    args, rest = parser.parse_known_args(argv)  # argparse leaves the overrides behind an option over
    stray = rest if not hasattr(args, "overrides") else [arg for arg in rest if arg.startswith("-")]
    if stray:
        parser.error(f"unknown arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """All commands, and the arguments of the one that is called."""
    parser = argparse.ArgumentParser(prog="jvpgraph", description="Distil diffusion models with exact tangents.")
    parser.add_argument("--version", action="version", version=f"jvpgraph {jvpgraph.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.text,
            description=command.text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in argv[:1]:
            sub.add_argument("--traceback", action="store_true", help="show where in the code a failure comes from")
            module_of(name).add_arguments(sub)
            parts = [f"example:\n  jvpgraph {name} {command.example}", sub.epilog, f"more: {command.more}"]
            sub.epilog = "\n\n".join(part.strip("\n") for part in parts if part)
    return parser


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f"jvpgraph.trainer.commands.{command}")


if __name__ == "__main__":
    sys.exit(main())
