"""jvpgraph export"""

from __future__ import annotations

import argparse
from pathlib import Path

from jvpgraph.trainer import export
from jvpgraph.trainer.commands.arguments import add_run, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--format",
        choices=export.FORMATS,
        default="diffusers",
        help="diffusers: the network or its whole pipeline (default); lora: what it adds to its teacher, for "
        "load_lora_weights; comfyui: one safetensors file",
    )
    parser.add_argument(
        "--pipeline",
        type=Path,
        metavar="FOLDER",
        help="pipeline of diffusers to put the student into (default: the one that the teacher came from)",
    )
    parser.add_argument(
        "--steps", type=positive, help="that the pipeline samples in (default: the most of sampling.steps)"
    )
    parser.add_argument(
        "--times",
        choices=("even", "run"),
        default="even",
        help="where diffusers' own scheduler cannot keep the run's times: even steps next to them (default), or the "
        "run's own by a class in the folder, which from_pretrained takes with trust_remote_code=True only",
    )
    parser.add_argument("--rank", type=positive, help="of a LoRA that comes close to whole weights")
    parser.add_argument("--step", type=positive, help="checkpoint to take (default: the last)")


def run(args: argparse.Namespace) -> None:
    print(
        export.export_run(
            args.folder,
            args.out,
            format=args.format,
            ema=args.ema,
            step=args.step,
            pipeline=args.pipeline,
            steps=args.steps,
            own_times=args.times == "run",
            rank=args.rank,
        )
    )
