"""What goes into which shard: decided from headers before anything is encoded, and the same every time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jvpgraph.trainer.data.sample import shorten
from jvpgraph.trainer.prepare.buckets import ASPECTS, Bucket, check_lengths, nearest, resolutions
from jvpgraph.trainer.prepare.captions import Found, find, prompts_of
from jvpgraph.trainer.prepare.checkpoint import Encoder
from jvpgraph.trainer.prepare.media import VIDEOS, BadFile, Media, look_at

log = logging.getLogger("jvpgraph.trainer.prepare")

THREADS = 16  # reading headers waits for the disk, not for the processor


@dataclass(frozen=True)
class Options:
    """What is asked for; None: what the checkpoint's pipeline does by default."""

    size: tuple[int, int] | None = None  # width and height, in pixels
    aspects: tuple[str, ...] | None = None  # width:height, of further sizes of the same area
    frames: tuple[int, ...] | None = None  # lengths of clips
    fps: float | None = None  # frames per second that clips are brought to
    caption: str | None = None  # of files that have none
    negative: str = ""  # the prompt of classifier-free guidance
    guidance: float | None = None  # the scale that a guidance-distilled network is told
    text_length: int | None = None  # tokens
    limit: int | None = None  # samples
    max_enlarge: float = 2.0  # a picture that had to be enlarged more is left out
    shard_size: int = 128  # samples; what a kill costs
    dtype: str = "float32"  # of the text encoders
    on_bad: str = "skip"  # or fail


@dataclass(frozen=True)
class Entry:
    """A sample to be: a file, or a prompt alone."""

    key: str
    caption: str
    file: str = ""
    bytes: int = 0
    start: int = 0  # the first frame, at the plan's frame rate


@dataclass(frozen=True)
class PlannedShard:
    name: str
    bucket: Bucket
    entries: tuple[Entry, ...]

    @property
    def fingerprint(self) -> str:
        """Of its files and captions: what has another one is encoded again."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass
class Plan:
    """Everything that the bytes of the shards follow from."""

    settings: dict[str, Any]
    fps: float
    shards: list[PlannedShard] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, text: str) -> Plan:
        tree = json.loads(text)
        shards = [
            PlannedShard(s["name"], Bucket(**s["bucket"]), tuple(Entry(**e) for e in s["entries"]))
            for s in tree.pop("shards")
        ]
        return cls(shards=shards, **tree)

    @property
    def with_latents(self) -> bool:
        return bool(self.settings["latents"])


def make_plan(source: Path, encoder: Encoder, options: Options) -> Plan:
    """What to write for a folder of pictures and clips, or for a file of prompts.

    Raises:
        ValueError: the options do not fit the checkpoint, or nothing can be used, or something cannot and
            `options.on_bad` says to stop then.
    """
    sizes, lengths = shapes(encoder, options)
    sizes = with_positions(sizes, lengths, encoder, options)
    if source.is_file() and encoder.family.first_frame:
        raise ValueError(
            f"{source}: a {encoder.checkpoint.pipeline} begins with a picture.\nGive a folder of clips with captions; "
            "or, for objectives that need no data (dmd), one of pictures with captions alone."
        )
    found = read_source(source, options)
    fps = options.fps or encoder.family.fps or 1.0
    if source.is_file():
        bucket = Bucket(*sizes[0], lengths[0])
        placed = [(bucket, Entry(f"{i:08d}", text)) for i, text in enumerate(found.captions.values())]
    else:
        length = 1 if learns_latents(source, encoder) else lengths[0]
        placed = sort_into(found, source, partial(place, sizes, lengths, fps, encoder.family.video, length, options))
    if found.skipped:
        refuse_or_say(found.skipped, options.on_bad)
    buckets: dict[Bucket, list[Entry]] = {}
    for bucket, entry in placed[: options.limit]:
        buckets.setdefault(bucket, []).append(entry)
    if not buckets:
        reasons = Counter(found.skipped.values()).most_common(1)
        why = f": all {len(found.skipped)} are left out, most of them for: {reasons[0][0]}" if reasons else ""
        raise ValueError(
            f"{source} holds nothing to prepare{why}.\n"
            "Give a folder of pictures or clips with captions (.jpg .png .webp .mp4 .webm), --caption TEXT for files "
            "without one, or a .txt file with a prompt a line."
        )
    plan = Plan(settings_of(source, encoder, options), fps, skipped=found.skipped)
    plan.ignored = dict(sorted(found.ignored.items()))
    for bucket in sorted(buckets):
        members = buckets[bucket]
        for i in range(0, len(members), options.shard_size):
            part = tuple(members[i : i + options.shard_size])
            plan.shards.append(PlannedShard(f"{len(plan.shards):06d}.tar", bucket, part))
    return plan


def learns_latents(source: Path, encoder: Encoder) -> bool:
    """Not of prompts; nor of pictures alone where a clip begins with one: there is no clip to learn."""
    if source.is_file():
        return False
    return not encoder.family.first_frame or any(path.suffix.lower() in VIDEOS for path in source.rglob("*"))


def read_source(source: Path, options: Options) -> Found:
    if source.is_dir():
        return find(source, options.caption)
    if source.suffix.lower() != ".txt" or not source.is_file():
        what = "does not exist" if not source.exists() else "is neither a folder nor a .txt file"
        raise ValueError(f"{source} {what}. Give a folder of pictures or clips, or a .txt file with a prompt a line.")
    return Found(captions={f"line {i}": prompt for i, prompt in enumerate(prompts_of(source), 1)})


def shapes(encoder: Encoder, options: Options) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes (width, height), the first the one asked for, and lengths, falling. ValueError if they do not fit."""
    height, width = encoder.default_size
    width, height = options.size or (width, height)
    if encoder.one_size and ((height, width) != encoder.default_size or options.aspects):
        height, width = encoder.default_size
        raise ValueError(
            f"a {encoder.checkpoint.pipeline} makes {width}x{height} pixels, and nothing else. Leave out --size and "
            "--aspects."
        )
    usual = () if encoder.one_size else ASPECTS
    sizes = resolutions(width, height, encoder.multiple, usual if options.aspects is None else options.aspects)
    if not encoder.family.video and options.frames not in (None, (1,)):
        raise ValueError(f"--frames: a {encoder.checkpoint.pipeline} makes pictures. Leave it out.")
    return sizes, check_lengths(options.frames or (encoder.default_frames,), encoder.period)


def with_positions(
    sizes: list[tuple[int, int]], lengths: list[int], encoder: Encoder, options: Options
) -> list[tuple[int, int]]:
    """The sizes that the network has positions for. ValueError if it lacks those of one that was asked for."""
    network, most = encoder.family.network, encoder.positions
    if most.text is not None and encoder.length > most.text:
        raise ValueError(
            f"--text-length {encoder.length}: this {network} has positions for {most.text} tokens. Take {most.text} or "
            "fewer."
        )
    fit = []
    for width, height in sizes:
        lacks = next(filter(None, (most.lacks(*encoder.tokens(width, height, n)) for n in lengths)), "")
        if lacks and ((width, height) == sizes[0] or options.aspects is not None):
            raise ValueError(
                f"{width}x{height} pixels, {max(lengths)} frames: this {network} has too few positions: {lacks}. "
                "Choose a smaller --size or --frames, or other --aspects."
            )
        if lacks:
            log.warning("no %dx%d: this %s has too few positions: %s", width, height, network, lacks)
        else:
            fit.append((width, height))
    return fit


def sort_into(found: Found, folder: Path, place: Callable[[Media], tuple[Bucket, int]]) -> list[tuple[Bucket, Entry]]:
    """The bucket of every file that has one, in the order of their names; the others go to `found.skipped`."""

    def attempt(name: str) -> tuple[Bucket, int] | BadFile:
        try:
            return place(look_at(folder / name))
        except BadFile as error:
            return error

    names = list(found.captions)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(attempt, names))
    placed: list[tuple[Bucket, Entry]] = []
    for name, result in zip(names, results):
        if isinstance(result, BadFile):
            found.skipped[name] = str(result)
            continue
        bucket, start = result
        key = f"{len(placed):08d}"
        size = (folder / name).stat().st_size
        placed.append((bucket, Entry(key, found.captions[name], name, size, start)))
    found.skipped = dict(sorted(found.skipped.items()))
    return placed


def place(
    sizes: list[tuple[int, int]],
    lengths: list[int],
    fps: float,
    video: bool,
    of_picture: int,
    options: Options,
    media: Media,
) -> tuple[Bucket, int]:
    """The bucket of a file and the first frame taken, which is such that the middle of the clip is. Raises BadFile.

    Args:
        of_picture: frames of what a picture stands for.
    """
    width, height = nearest(media.width, media.height, sizes)
    enlarged = max(width / media.width, height / media.height)
    if enlarged > options.max_enlarge:
        raise BadFile(
            f"{media.width}x{media.height} pixels would be enlarged {enlarged:.1f} times for {width}x{height}, "
            f"and --max-enlarge is {options.max_enlarge:g}"
        )
    if not media.times:
        return Bucket(width, height, of_picture), 0
    if not video:
        raise BadFile("a clip, and this checkpoint makes pictures")
    frames = media.frames_at(fps)
    length = next((length for length in lengths if length <= frames), None)
    if length is None:
        raise BadFile(f"{frames} frames at {fps:g} per second, and --frames asks for {lengths[-1]} or more")
    return Bucket(width, height, length), (frames - length) // 2


def refuse_or_say(skipped: Mapping[str, str], on_bad: str) -> None:
    lines = [f"{name}: {reason}" for name, reason in skipped.items()]
    if on_bad == "fail":
        raise ValueError(
            f"{len(lines)} files cannot be used\n  {shorten(lines, chr(10) + '  ')}\n"
            "Mend them or take them away, or leave out what is bad: --on-bad skip."
        )
    for line in lines:
        log.warning("left out: %s", line)


def settings_of(source: Path, encoder: Encoder, options: Options) -> dict[str, Any]:
    """What has to be the same when an interrupted preparation goes on; no paths, since folders may be moved."""
    sizes, lengths = shapes(encoder, options)
    settings = asdict(options)
    del settings["on_bad"]  # which stops it, and may then be changed
    hashes = json.dumps(encoder.checkpoint.hashes()).encode()
    return {
        **settings,
        "checkpoint": hashlib.sha256(hashes).hexdigest()[:16],
        "size": list(sizes[0]),
        "aspects": None if options.aspects is None else list(options.aspects),
        "frames": lengths,
        "text_length": encoder.length,
        "latents": learns_latents(source, encoder),
    }
