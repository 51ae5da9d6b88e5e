"""Shards of encoded samples: whole or not there, so that a preparation that was killed goes on with the next one.

OUT/plan.json says what goes where, OUT/records/N.json what came of shard N, OUT/card.json and OUT/index.json what
there is in all. Process r of R (torchrun's RANK and WORLD_SIZE) writes every R-th shard; the bytes are the same for
any number of them, and every time. They talk through files alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm

from jvpgraph.trainer.data.prepared import CARD, INDEX, LATENTS
from jvpgraph.trainer.data.sample import shorten
from jvpgraph.trainer.files import draft_of, write_whole
from jvpgraph.trainer.prepare.buckets import Bucket
from jvpgraph.trainer.prepare.checkpoint import Encoder, read_checkpoint
from jvpgraph.trainer.prepare.media import BadFile, read
from jvpgraph.trainer.prepare.plan import Entry, Options, Plan, PlannedShard, make_plan, refuse_or_say, settings_of
from jvpgraph.trainer.prepare.start import write_settings

log = logging.getLogger("jvpgraph.trainer.prepare")

PLAN, RECORDS, NEGATIVE = "plan.json", "records", "negative.safetensors"
PATIENCE = 600.0  # seconds that other processes wait for the first one's plan


def prepare(checkpoint: Path, source: Path, out: Path, options: Options, device: torch.device) -> dict[str, Any]:
    """Writes OUT, or what is missing of it, and returns its card.

    Raises:
        ValueError: checkpoint, source, options and what is in OUT do not fit each other. Nothing was written.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    known = read_checkpoint(checkpoint)
    check_out(out, source)
    encoder = Encoder(known, device, getattr(torch, options.dtype), options.text_length)
    if rank == 0:
        plan = make_plan(source, encoder, options)
        begin(out, plan)
    else:
        plan = Plan.read(wait_for_plan(out, settings_of(source, encoder, options)))
    mine = plan.shards[rank::ranks]
    with tqdm(total=sum(len(shard.entries) for shard in mine), unit="sample", disable=rank > 0) as progress:
        for shard in mine:
            if read_record(out, shard) is None:
                write_shard(out, shard, encoder, source, plan, options.on_bad, progress.update)
            else:
                progress.update(len(shard.entries))
    if rank > 0:
        return {}
    save_negative(out, encoder, options.negative)
    records = wait_for_records(out, plan.shards)
    return write_card(out, plan, records, encoder, source, options)


def check_out(out: Path, source: Path) -> None:
    """ValueError for a folder that is something else, or that would be read as a source."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file. Choose another folder for --out.")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {out} is inside {source}, which is read. Choose a folder outside it.")
    if out.is_dir() and not (out / PLAN).is_file() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise ValueError(f"{out} is not empty, and not one of `jvpgraph prepare`. Choose another folder for --out.")


def begin(out: Path, plan: Plan) -> None:
    """Puts the plan on disk. Of an earlier one with the same settings, what is still planned stays.

    Raises:
        ValueError: the earlier one had other settings, or files that were encoded are gone.
    """
    if (out / PLAN).is_file():
        old = Plan.read((out / PLAN).read_text(encoding="utf-8"))
        if old.text() == plan.text():
            return
        check_change(out, old, plan)
        for name in (CARD, INDEX):  # it is not complete any more
            (out / name).unlink(missing_ok=True)
        planned = {shard.name for shard in plan.shards}
        for shard in old.shards:
            if shard.name not in planned:
                record_of(out, shard).unlink(missing_ok=True)
                (out / shard.name).unlink(missing_ok=True)
    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    write_whole(out / PLAN, plan.text())


def check_change(out: Path, old: Plan, new: Plan) -> None:
    """ValueError for changes that would throw away what was encoded."""
    changed = [
        f"{name} {old.settings.get(name)} then, {value} now"
        for name, value in new.settings.items()
        if old.settings.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{out} holds data that was prepared otherwise: {'; '.join(changed)}.\n"
            "Give the same options to go on with it, or another folder by --out."
        )
    still = {entry.file for shard in new.shards for entry in shard.entries}
    gone: list[str] = []
    for shard in old.shards:
        record = read_record(out, shard)
        encoded = {entry.file for entry in shard.entries} - still - set(record["skipped"]) if record else set()
        gone += sorted(encoded)
    if gone:
        raise ValueError(
            f"{len(gone)} files that {out} has encoded are not there any more: {shorten(gone)}.\n"
            "Put them back, or prepare the folder as it is into another one by --out."
        )


def wait_for_plan(out: Path, settings: dict[str, Any]) -> str:
    """The text of the first process's plan, once there is one of these settings."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (out / PLAN).is_file():
            text = (out / PLAN).read_text(encoding="utf-8")
            if json.loads(text)["settings"] == json.loads(json.dumps(settings)):
                return text
        time.sleep(0.1)
    raise ValueError(f"no {out / PLAN} of the first process after {PATIENCE:g} seconds. See what that one says.")


class Planned(Protocol):
    """A shard to be."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of everything that its bytes follow from."""
        ...


def read_record(out: Path, shard: Planned) -> dict[str, Any] | None:
    """What came of a shard, if it was written as planned and its file is whole."""
    path = record_of(out, shard)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    file = out / shard.name
    whole = not record["samples"] or (file.is_file() and file.stat().st_size == record["bytes"])
    return record if whole and record["planned"] == shard.fingerprint else None


def record_of(out: Path, shard: Planned) -> Path:
    return out / RECORDS / f"{Path(shard.name).stem}.json"


# ---------------------------------------------------------------- shards


def write_shard(
    out: Path,
    shard: PlannedShard,
    encoder: Encoder,
    source: Path,
    plan: Plan,
    on_bad: str,
    progress: Callable[[int], Any],
) -> None:
    """Encodes a shard's samples; first the file is put in place, then the record of it."""
    skipped: dict[str, str] = {}
    shapes: dict[str, list[Any]] = {}
    samples = 0
    path = out / shard.name
    with draft_of(path) as draft:
        with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
            for entry in shard.entries:
                try:
                    tensors = encode_entry(entry, shard.bucket, encoder, source, plan)
                except BadFile as error:
                    skipped[entry.file] = str(error)
                    refuse_or_say({entry.file: str(error)}, on_bad)
                    continue
                finally:
                    progress(1)
                found = {name: [list(t.shape), str(t.dtype)[6:]] for name, t in tensors.items()}
                if shapes and found != shapes:
                    raise ValueError(f"{entry.file or entry.caption}: {found}, and {shapes} before it in {shard.name}")
                shapes = found
                samples += 1
                for name, tensor in tensors.items():
                    add(tar, f"{entry.key}.{name}.safetensors", save({name: tensor}))
                about = {"caption": entry.caption, "file": entry.file}
                add(tar, f"{entry.key}.about.txt", json.dumps(about, ensure_ascii=False).encode())
        digest, size = sha256_of(draft), draft.stat().st_size
    if not samples:
        path.unlink()
    record = {
        "planned": shard.fingerprint,
        "samples": samples,
        "bytes": size,
        "sha256": digest,
        "shapes": shapes,
        "skipped": skipped,
    }
    if not plan.with_latents:
        bucket = shard.bucket
        record["latents"] = encoder.latent_shape(bucket.frames, bucket.height, bucket.width)
    write_whole(record_of(out, shard), json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def encode_entry(entry: Entry, bucket: Bucket, encoder: Encoder, source: Path, plan: Plan) -> dict[str, Tensor]:
    """A sample's tensors by field. Raises BadFile."""
    tensors = {}
    if plan.with_latents:
        frames = read(source / entry.file, bucket.width, bucket.height, bucket.frames, entry.start, plan.fps)
        tensors["latents"] = encoder.latents(frames)
        tensors |= encoder.first_frame(frames)
    elif entry.file:
        frames = read(source / entry.file, bucket.width, bucket.height, 1, 0, plan.fps)
        tensors |= encoder.first_frame(frames * bucket.frames)
    tensors |= encoder.prompt(entry.caption)
    for name, value in tensors.items():
        if not value.float().isfinite().all():
            raise BadFile(f"its {name} are not finite: the checkpoint's weights or --dtype do not suit it")
    return tensors


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member whose header says nothing of time or user."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_negative(out: Path, encoder: Encoder, negative: str) -> None:
    """For `guidance.negative_file`: what comes from the prompt, without a batch dim; all else is the sample's own."""
    with draft_of(out / NEGATIVE) as draft:
        save_file(encoder.negative(negative), draft)


# ---------------------------------------------------------------- the card


def wait_for_records(out: Path, shards: Sequence[Planned]) -> list[dict[str, Any]]:
    """Of every shard, in order; those of other processes as they come."""
    records: list[dict[str, Any]] = []
    for shard in shards:
        while (record := read_record(out, shard)) is None:
            time.sleep(0.2)
        records.append(record)
    return records


def write_card(
    out: Path, plan: Plan, records: list[dict[str, Any]], encoder: Encoder, source: Path, options: Options
) -> dict[str, Any]:
    """Index, card and settings to start from, of what was written."""
    skipped = dict(plan.skipped)
    for record in records:
        skipped |= record["skipped"]
    skipped = dict(sorted(skipped.items()))
    if skipped and options.on_bad == "fail":  # left out by an earlier call
        refuse_or_say(skipped, options.on_bad)
    full = [(shard, record) for shard, record in zip(plan.shards, records) if record["samples"]]
    if not full:
        raise ValueError(f"no file could be encoded, see {out / RECORDS}. The first: {next(iter(skipped.items()))}")
    index = [
        {"name": shard.name, "bucket": shard.bucket.name} | {k: record[k] for k in ("samples", "bytes", "sha256")}
        for shard, record in full
    ]
    buckets = []
    for bucket in sorted({shard.bucket for shard, _ in full}):
        of_it = [record for shard, record in full if shard.bucket == bucket]
        latents = of_it[0]["shapes"]["latents"][0] if plan.with_latents else of_it[0]["latents"]
        buckets.append(
            {
                "name": bucket.name,
                "width": bucket.width,
                "height": bucket.height,
                "frames": bucket.frames,
                "latents": latents,
                "samples": sum(record["samples"] for record in of_it),
                "sizes": encoder.checkpoint.sizes(bucket.height, bucket.width),
            }
        )
    conditions = {name: shape for name, shape in full[0][1]["shapes"].items() if name != "latents"}
    differ = ("latents", *encoder.checkpoint.first_frame)  # from bucket to bucket
    same = {name: shape for name, shape in conditions.items() if name not in differ}
    for shard, record in full:
        other = {name: shape for name, shape in record["shapes"].items() if name not in differ}
        if other != same:
            raise ValueError(f"{shard.name} has conditions {other}, and {full[0][0].name} {same}: no batch fits.")
    shift, scale = encoder.normalisation
    card = {
        "format": 1,
        "checkpoint": {
            "path": str(encoder.checkpoint.path),
            "pipeline": encoder.checkpoint.pipeline,
            "network": encoder.family.network,
            "files": encoder.checkpoint.hashes(),
        },
        "source": str(source),
        "samples": sum(record["samples"] for _, record in full),
        "bytes": sum(record["bytes"] for _, record in full),
        "shards": len(full),
        "buckets": buckets,
        "latents": {"field": LATENTS if plan.with_latents else None, "shift": shift, "scale": scale},
        "conditions": conditions,
        "constants": encoder.constants(options.guidance, plan.fps),
        "guidance_scale": encoder.family.guidance_scale,
        "fps": plan.fps if encoder.family.video else None,
        "negative": {"file": NEGATIVE, "prompt": options.negative},
        "skipped": {"count": len(skipped), "reasons": reasons(skipped), "files": skipped},
        "ignored": plan.ignored,
        "settings": plan.settings,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    write_settings(out, encoder, card, out / NEGATIVE, options.dtype)
    write_whole(out / INDEX, json.dumps({"shards": index}, indent=1) + "\n")
    write_whole(out / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return card


def reasons(skipped: dict[str, str]) -> dict[str, int]:
    """How many for each reason, without the figures of single files."""
    return dict(Counter("".join("#" if c.isdigit() else c for c in reason) for reason in skipped.values()))
