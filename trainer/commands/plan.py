"""jvpgraph plan"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import positive
from jvpgraph.trainer.commands.train import add_settings, settings_file
from jvpgraph.trainer.later import later
from jvpgraph.trainer.plan.machines import GPUS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from jvpgraph.trainer import config, settings
    from jvpgraph.trainer.plan import plan, report
else:
    torch = later("torch")
    config, settings = later("jvpgraph.trainer.config"), later("jvpgraph.trainer.settings")
    plan, report = later("jvpgraph.trainer.plan.plan"), later("jvpgraph.trainer.plan.report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Nothing is trained or downloaded, and no weights are read. A minute or two, for the graph of the network "
        "is made."
    )
    add_settings(parser)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="of which kind (default: h100)")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="how many, a process each (default: 1)")
    parser.add_argument(
        "--mfu",
        type=share,
        default=0.4,
        metavar="SHARE",
        help="of the GPU's published FLOPs that the run will use (default: 0.4)",
    )
    parser.add_argument(
        "--latents", type=shape, metavar="CxTxHxW", help="shape of a sample's latents, if the data is not there yet"
    )
    parser.add_argument(
        "--condition",
        type=condition,
        action="append",
        default=[],
        metavar="NAME=LxD[:KIND]",
        help="and of its conditions. KIND: a dtype of torch (default: float32), int, bool, or a range of integers. "
        "A label: labels=:0..999; a mask: encoder_attention_mask=300:bool",
    )


def run(args: argparse.Namespace) -> None:
    run_config = settings.load(config.RunConfig, settings_file(args.config), args.overrides)
    shapes = {"latents": args.latents, "conditions": dict(args.condition)}
    for of_stage in plan.plan_run(run_config, processes=args.gpus, **shapes):
        print(report.report(of_stage, run_config, args.gpu, args.mfu), flush=True)


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share: above 0, and at most 1")
    return value


def shape(text: str) -> tuple[int, ...]:
    """16x21x60x104; an empty one is a number per sample."""
    return tuple(positive(size) for size in text.split("x") if size)


def condition(text: str) -> tuple[str, Tensor]:
    """encoder_hidden_states=512x4096, labels=:0..999, mask=300:bool -> the name, and one like it on the meta device."""
    name, equals, rest = text.partition("=")
    sizes, colon, kind = rest.partition(":")
    try:
        if not name or not equals:
            raise ValueError("no name")
        like = torch.empty(shape(sizes), dtype=dtype_of(kind) if colon else torch.float32, device="meta")
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} ({error}) is not NAME=LxD[:KIND], such as encoder_hidden_states=512x4096, labels=:0..999 or "
            "encoder_attention_mask=300:bool"
        ) from error
    return name, like


def dtype_of(kind: str) -> torch.dtype:
    """Of a range of whole numbers too. Raises ValueError."""
    if re.fullmatch(r"\d+\.\.\d+", kind):
        low, high = map(int, kind.split(".."))
        if low > high:
            raise ValueError(f"{kind} falls")
        return torch.int64
    dtype = {"int": torch.int64}.get(kind, getattr(torch, kind, None))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{kind!r} is no dtype and no range")
    return dtype
