"""jvpgraph inspect"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jvpgraph.trainer.commands.arguments import device_named, positive
from jvpgraph.trainer.later import later

if TYPE_CHECKING:
    from jvpgraph.trainer.data import prepared
    from jvpgraph.trainer.prepare import look
else:
    prepared, look = later("jvpgraph.trainer.data.prepared"), later("jvpgraph.trainer.prepare.look")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DATA", help="folder that `jvpgraph prepare` wrote")
    parser.add_argument(
        "--count", type=positive, default=8, help="samples to decode, of all shapes in turn (default: 8)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the pictures (default: DATA/inspect)")
    parser.add_argument("--checkpoint", type=Path, help="if it is not any more where the card says")
    parser.add_argument("--check", action="store_true", help="read all shards and compare them with the index")
    parser.add_argument("--device", default="auto", help="default: cuda if there is one")


def run(args: argparse.Namespace) -> None:
    card = prepared.read_card(args.folder)
    print(look.describe(card))
    if args.check:
        look.check(args.folder)
        print("all shards are as the index says")
    if args.checkpoint is None and look.of_own_network(card):
        print(
            f"no pictures: {card['checkpoint']['path']} has no VAE; if its latents are of one, name it by --checkpoint"
        )
    out = args.out or args.folder / "inspect"
    device = device_named(args.device)
    for path, caption in look.decode_some(args.folder, out, args.count, checkpoint=args.checkpoint, device=device):
        print(f"{path}  {caption}")
