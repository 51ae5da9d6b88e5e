"""jvpgraph train"""

from __future__ import annotations

import argparse
from pathlib import Path

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import names, ready
from jvpgraph.trainer.settings import Problem, SettingsError, describe, load
from jvpgraph.trainer.train import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"settings, as keys of CONFIG or as key=value:\n\n{describe(RunConfig)}"
    add_settings(parser)
    parser.add_argument("--fresh", action="store_true", help="move an earlier run in the same folder aside, start anew")


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
    train(load(RunConfig, settings_file(args.config), args.overrides), fresh=args.fresh)


def settings_file(config: Path) -> Path:
    """The file itself, or the one of ready settings that have this name."""
    if config.is_file() or config.suffix in (".yaml", ".yml"):
        return config
    if str(config) not in names():
        message = f"no such file, and no ready settings: those are {', '.join(names())}"
        raise SettingsError([Problem(str(config), "", message)])
    return ready(str(config))
