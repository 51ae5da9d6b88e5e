"""jvpgraph train"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.configs import names, ready
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer import config, settings
    from jvpgraph.trainer import train as trainer
    from jvpgraph.trainer.run import changes, stopping
else:
    config, settings = later("jvpgraph.trainer.config"), later("jvpgraph.trainer.settings")
    changes, stopping = later("jvpgraph.trainer.run.changes"), later("jvpgraph.trainer.run.stopping")
    trainer = later("jvpgraph.trainer.train")

TABLE = Path(__file__).with_name("settings.txt")
STATUS = """exit status: 0 done; 1 failed; 2 wrong usage or settings; 143, 130 or 75 stopped by SIGTERM, by SIGINT
(Ctrl-C) or by --time-limit. Before it leaves with one of these three, a run ends its update and writes a
checkpoint, and the same command goes on from there: a scheduler may start it again. A second signal ends it at
once, and then it goes on from the last checkpoint before.

settings that may change between a stop and going on:
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{STATUS}{TABLE.read_text(encoding='utf-8')}"
    add_settings(parser)
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on with a run although this setting, or one below it, is another now; may be given more than once",
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="RUN|EXPORT",
        help="start the student of a new run from the weights of another run, or of an exported network",
    )
    parser.add_argument("--fresh", action="store_true", help="move an earlier run in the same folder aside, start anew")
    parser.add_argument(
        "--time-limit",
        type=time,
        metavar="TIME",
        help="stop before so much time has passed since the start: 90s, 30m, 3.5h, or [days-][hours:]minutes:seconds",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A file and what replaces its settings."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help=f"YAML file of settings, or ready ones: {', '.join(names())}"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, such as stages.0.steps=100; the value is YAML",
    )


def run(args: argparse.Namespace) -> None:
    run_config = settings.load(config.RunConfig, settings_file(args.config), args.overrides)
    trainer.train(run_config, fresh=args.fresh, change=args.change, start=args.start, time_limit=args.time_limit)


def time(text: str) -> float:
    """Seconds."""
    try:
        return stopping.seconds_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def settings_file(config: Path) -> Path:
    """The file itself, or the one of ready settings that have this name."""
    if config.is_file() or config.suffix in (".yaml", ".yml"):
        return config
    if str(config) not in names():
        message = f"no such file, and no ready settings: those are {', '.join(names())}"
        raise settings.SettingsError([settings.Problem(str(config), "", message)])
    return ready(str(config))


def table() -> str:
    """What `train --help` says of every setting; TABLE has it, as its sources import torch."""
    every = settings.describe(config.RunConfig)
    return f"{changes.table()}\n\nsettings, as keys of CONFIG or as key=value:\n\n{every}\n"


if __name__ == "__main__":  # python -m jvpgraph.trainer.commands.train
    TABLE.write_text(table(), encoding="utf-8", newline="\n")
