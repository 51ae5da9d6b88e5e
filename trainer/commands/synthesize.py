"""jvpgraph synthesize"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import positive
from jvpgraph.trainer.commands.train import settings_file
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer import config, settings
    from jvpgraph.trainer.prepare import look
    from jvpgraph.trainer.run import synthesis
else:
    config, settings = later("jvpgraph.trainer.config"), later("jvpgraph.trainer.settings")
    look, synthesis = later("jvpgraph.trainer.prepare.look"), later("jvpgraph.trainer.run.synthesis")

EPILOG = """\
The conditions are those of data.source, which may have no latents: prompts that `jvpgraph prepare` encoded, or shards
of yours by jvpgraph.trainer.data.prompts:prompts. Training then reads DATA, by `base: DATA/settings.yaml`, or by
data.source={load: "jvpgraph.trainer.prepare:prepared", options: {path: DATA}}.

  torchrun --nproc-per-node 8 -m jvpgraph.trainer.cli synthesize data/prompts/run.yaml --out data/made

After a stop the same command goes on. What comes out is the same for any number of processes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "config",
        type=Path,
        metavar="RUN|SETTINGS",
        help="folder of a run, or a YAML file of settings or the name of ready ones: its teacher, guidance and data",
    )
    add("overrides", nargs="*", metavar="key=value", help="settings that replace those, as for `jvpgraph train`")
    add("--out", type=Path, required=True, metavar="DATA", help="folder of the shards")
    add(
        "--count",
        type=positive,
        metavar="N",
        help="samples (default: one for each of the data's conditions; fewer: spread over them)",
    )
    add("--steps", type=positive, metavar="N", help="Euler steps of the teacher (default: sampling.teacher_steps)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    add("--shard-size", type=positive, default=128, metavar="N", help="samples in a shard (default: 128)")


def run(args: argparse.Namespace) -> None:
    of_run = args.config / "config.yaml"
    file = of_run if of_run.is_file() else settings_file(args.config)
    run_config = settings.load(config.RunConfig, file, args.overrides)
    options = synthesis.Options(args.count, args.steps, args.seed, args.shard_size)
    card = synthesis.synthesize(run_config, args.out, options)
    if card:
        print(f"{look.describe(card)}\nIn your settings: base: {args.out / synthesis.SETTINGS}")
