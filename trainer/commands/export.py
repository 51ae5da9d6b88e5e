"""jvpgraph export"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import add_guidance, add_pipeline, add_run, positive
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer import export
else:
    export = later("jvpgraph.trainer.export")

FORMATS = ("diffusers", "lora", "comfyui")  # those of export.FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder (default: RUN/export-FORMAT)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="diffusers: the network or its whole pipeline (default); lora: what it adds to its teacher, for "
        "load_lora_weights; comfyui: one safetensors file",
    )
    add_pipeline(parser)
    parser.add_argument(
        "--steps", type=positive, help="that the pipeline samples in (default: the most of sampling.steps)"
    )
    add_guidance(parser)
    parser.add_argument(
        "--keep-scale",
        action="store_true",
        help="leave the scale that student.embed_scale gave a student an input, which diffusers itself does not know "
        "(default: it is in the weights)",
    )
    parser.add_argument("--rank", type=positive, help="of a LoRA that comes close to whole weights")
    parser.add_argument("--step", type=positive, help="checkpoint to take (default: the last)")


def run(args: argparse.Namespace) -> None:
    print(
        export.export_run(
            args.folder,
            args.out or args.folder / f"export-{args.format}",
            format=args.format,
            ema=args.ema,
            step=args.step,
            pipeline=args.pipeline,
            steps=args.steps,
            own_times=args.times == "run",
            rank=args.rank,
            guidance=args.guidance,
            keep_scale=args.keep_scale,
        )
    )
