"""The command `jvpgraph`: train, sample, evaluate, export."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jvpgraph.errors import JvpgraphError
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import names, ready
from jvpgraph.trainer.plug import PlugError
from jvpgraph.trainer.run import finished
from jvpgraph.trainer.run.checkpoint import CheckpointError
from jvpgraph.trainer.settings import Problem, SettingsError, describe, load
from jvpgraph.trainer.train import train

EXPECTED = (JvpgraphError, ValueError, OSError, FloatingPointError, ImportError, torch.OutOfMemoryError)
"""Failures with a message that says what to do; anything else is a bug and keeps its traceback."""

RESUMES = "The same command resumes from the last checkpoint."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 stopped."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")  # warnings, such as those of a skipped shard
    logging.getLogger("jvpgraph.trainer").setLevel(logging.INFO)  # and what computes the attention
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(f"\nstopped. {RESUMES}" if args.command == "train" else "\nstopped", file=sys.stderr)
        return 130
    except EXPECTED as error:
        if args.traceback:
            traceback.print_exc()
        rank = f", rank {os.environ.get('RANK', '?')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"jvpgraph {args.command}{rank}: {explain(error, args.command)}", file=sys.stderr)
        return 2 if isinstance(error, (SettingsError, PlugError)) else 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; leaves the process with status 2 if they are wrong."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)  # argparse leaves the overrides behind an option over
    stray = rest if args.command != "train" else [arg for arg in rest if arg.startswith("-")]
    if stray:
        parser.error(f"unknown arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jvpgraph", description="Distil diffusion models with exact tangents.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        sub.set_defaults(run=function)
        sub.add_argument("--traceback", action="store_true", help="show where in the code a failure comes from")
        return sub

    sub = command("train", train_command, "Distil a teacher; goes on by itself with a run that was stopped.")
    sub.epilog = f"settings, as keys of CONFIG or as key=value:\n\n{describe(RunConfig)}"
    sub.add_argument(
        "config", type=Path, metavar="CONFIG", help=f"YAML file of settings, or ready ones: {', '.join(names())}"
    )
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, such as stages.0.steps=100; the value is YAML",
    )
    sub.add_argument("--fresh", action="store_true", help="move an earlier run in the same folder aside, start anew")

    sub = command("sample", sample_command, "Draw samples of a trained student.")
    add_run(sub)
    sub.add_argument("--steps", type=positive, default=4, help="network passes per sample (default: 4)")
    sub.add_argument("--count", type=positive, default=16, help="samples (default: 16)")
    sub.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    sub.add_argument("--out", type=Path, metavar="FILE", help="PNG file (default: RUN/samples-STEPS.png)")

    sub = command("evaluate", evaluate_command, "Measure a student against its teacher and real data.")
    add_run(sub)
    sub.add_argument(
        "--steps", type=positive, nargs="+", default=(), help="network passes per sample (default: sampling.steps)"
    )
    sub.add_argument("--seeds", type=int, nargs="+", default=(), help="of the noise (default: evaluation.seeds)")

    sub = command("export", export_command, "Save a student's averaged weights as a plain folder.")
    add_run(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    sub.add_argument("--step", type=positive, help="checkpoint to take (default: the last)")
    return parser


def add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a run: the `out` of its settings")
    sub.add_argument(
        "--ema",
        type=float,
        metavar="SIGMA_REL",
        help="relative width of the average of the weights (default: the first of ema.sigma_rel)",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def train_command(args: argparse.Namespace) -> None:
    train(load(RunConfig, settings_file(args.config), args.overrides), fresh=args.fresh)


def settings_file(config: Path) -> Path:
    """The file itself, or the one of ready settings that have this name."""
    if config.is_file() or config.suffix in (".yaml", ".yml"):
        return config
    if str(config) not in names():
        message = f"no such file, and no ready settings: those are {', '.join(names())}"
        raise SettingsError([Problem(str(config), "", message)])
    return ready(str(config))


def sample_command(args: argparse.Namespace) -> None:
    out = args.out or args.folder / f"samples-{args.steps}.png"
    print(finished.sample_run(args.folder, steps=args.steps, count=args.count, ema=args.ema, seed=args.seed, out=out))


def evaluate_command(args: argparse.Namespace) -> None:
    print(finished.evaluate_run(args.folder, steps=tuple(args.steps), seeds=tuple(args.seeds), ema=args.ema))


def export_command(args: argparse.Namespace) -> None:
    print(finished.export_run(args.folder, args.out, ema=args.ema, step=args.step))


def explain(error: Exception, command: str) -> str:
    """The message of a failure, and what to do about it where the message cannot know."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        advice = f"Free some space. {RESUMES}" if command == "train" else "Free some space and try again."
        return f"the disk is full{where}: {error.strerror}\n{advice}"
    if isinstance(error, torch.OutOfMemoryError) and command == "train":
        advice = (
            "a smaller stages.N.batch with more stages.N.accumulate, student.checkpoint_blocks=true or student.lora"
        )
        return f"{error}\nTry {advice}."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, CheckpointError) and command == "train":
        return f"{error}\n{RESUMES}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
