"""What `jvpgraph prepare` wrote, for people: the card's figures, and samples decoded again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.data.prepared import INDEX, prepared, read_card
from jvpgraph.trainer.pictures import frames_of, save_frames
from jvpgraph.trainer.prepare.latents import decode, load_vae
from jvpgraph.trainer.prepare.write import sha256_of

SHOWN = 20  # files left out


def describe(card: dict[str, Any]) -> str:
    """The card as a few lines."""
    checkpoint, skipped = card["checkpoint"], card["skipped"]
    lines = [
        f"{card['samples']} samples in {card['shards']} shards, {card['bytes'] / 1e6:.1f} MB",
        f"checkpoint  {checkpoint['path']} ({checkpoint['pipeline']})",
    ]
    for bucket in card["buckets"]:
        lines.append(f"bucket      {bucket['name']}: {bucket['samples']} samples, latents {bucket['latents']}")
    if card["latents"]["field"] is None:
        lines.append("latents     none, prompts only: for objectives that need no data (dmd)")
    for name, (shape, dtype) in card["conditions"].items():
        lines.append(f"condition   {name} {shape} {dtype}")
    lines += [f"constant    {name} {value:g}" for name, value in card["constants"].items()]
    lines.append(f"negative    {card['negative']['prompt']!r}")
    lines.append(f"left out    {skipped['count']} files")
    lines += [f"  {name}: {reason}" for name, reason in list(skipped["files"].items())[:SHOWN]]
    if skipped["count"] > SHOWN:
        lines.append(f"  and {skipped['count'] - SHOWN} more, see card.json")
    if card["ignored"]:
        kinds = ", ".join(f"{count} {ending}" for ending, count in card["ignored"].items())
        lines.append(f"not looked at  {kinds}")
    return "\n".join(lines)


def check(folder: Path) -> None:
    """Compares every shard with the index. Raises ValueError for those that differ."""
    index = json.loads((folder / INDEX).read_text())["shards"]
    bad = [
        s["name"] for s in index if not (folder / s["name"]).is_file() or sha256_of(folder / s["name"]) != s["sha256"]
    ]
    if bad:
        records = ", ".join(f"records/{Path(name).stem}.json" for name in bad)
        raise ValueError(
            f"{folder}: {len(bad)} of {len(index)} shards are damaged or missing: {', '.join(bad)}\n"
            f"Delete {records} there and run the same `jvpgraph prepare` again: it writes these shards anew."
        )


def decode_some(
    folder: Path, out: Path, count: int, *, checkpoint: Path | None = None, device: torch.device
) -> Iterator[tuple[Path, str]]:
    """Decodes samples of all buckets in turn: the path of each picture or animation, and its caption.

    Args:
        folder: of prepared data.
        out: where pictures go, KEY.png or KEY.webp.
        count: of samples.
        checkpoint: if it is not where the card says.
        device: where the VAE runs.
    """
    card = read_card(folder)
    data = prepared(folder)
    captions = data.captions()
    turns = [index for turn in zip_longest_ranges(data.buckets) for index in turn][:count]
    if not data.has_latents or (checkpoint is None and of_own_network(card)):
        for index in turns:
            yield folder, captions.get(data[index].key, "")
        return
    vae = load_vae(checkpoint or Path(card["checkpoint"]["path"])).to(device)
    out.mkdir(parents=True, exist_ok=True)
    for index in turns:
        sample = data[index]
        pixels = decode(vae, sample.x0[None].to(device))[0].cpu()
        yield save_pixels(pixels, out / sample.key, card["fps"] or 1.0), captions.get(sample.key, "")


def of_own_network(card: dict[str, Any]) -> bool:
    """Whether its latents were made by a teacher of no pipeline, so that nothing is known that decodes them."""
    made_by = card["checkpoint"]
    return ":" in made_by["pipeline"] and not (Path(made_by["path"]) / "vae/config.json").is_file()


def zip_longest_ranges(ranges: list[range]) -> Iterator[list[int]]:
    """The first of each, the second of each, ..."""
    for turn in range(max(len(r) for r in ranges)):
        yield [r[turn] for r in ranges if turn < len(r)]


def save_pixels(pixels: Tensor, stem: Path, fps: float) -> Path:
    """[3, H, W] as STEM.png, [3, T, H, W] of several frames as an animated STEM.webp."""
    return save_frames(frames_of(pixels), stem, fps)
