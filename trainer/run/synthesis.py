"""`jvpgraph synthesize`: what a teacher makes of a run's conditions, once, as shards to train on.

OUT/plan.json says what goes where, OUT/records/N.json what came of shard N; OUT/card.json and OUT/index.json are those
of `jvpgraph prepare`, so that `prepared` reads the folder and `jvpgraph inspect` shows it. Process r of R (torchrun's
RANK and WORLD_SIZE) makes every R-th shard. The noise of a shard follows from the seed and its name: the latents are
the same after any kill, for any number of processes. They talk through files alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.prepared import CAPTIONS, CARD, INDEX, LATENTS
from jvpgraph.trainer.data.sample import Dataset, collate, first_samples, read_sample, shorten
from jvpgraph.trainer.evaluation.samplers import Sampler, sampler_of
from jvpgraph.trainer.files import draft_of, write_whole
from jvpgraph.trainer.model.networks import build_guided, build_teacher, check_teacher, device_of
from jvpgraph.trainer.model.offload import Traffic, rest
from jvpgraph.trainer.model.quantize import quantize
from jvpgraph.trainer.prepare.write import (
    PLAN,
    RECORDS,
    add,
    read_record,
    record_of,
    sha256_of,
    wait_for_plan,
    wait_for_records,
)
from jvpgraph.trainer.run.beforehand import data_of
from jvpgraph.trainer.run.origin import digest_of, what_teaches
from jvpgraph.trainer.trigflow import Guided

log = logging.getLogger(__name__)

SETTINGS = "settings.yaml"


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    count: int | None = None  # samples; None: one for each of the data's
    steps: int | None = None  # of the teacher; None: sampling.teacher_steps
    seed: int = 0  # of the noise
    shard_size: int = 128  # samples; what a kill costs


@dataclass(frozen=True)
class Part:
    """A shard to be: samples of one shape by their numbers. Number n has the conditions of the data's n-th, again from
    the first after the last."""

    name: str
    bucket: str
    numbers: tuple[int, ...]
    made_by: str  # digest of everything that the latents follow from
    seed: int

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @property
    def seed_of_noise(self) -> int:
        return int(hashlib.sha256(f"{self.seed} {self.name}".encode()).hexdigest()[:15], 16)


def synthesize(config: RunConfig, out: Path, options: Options) -> dict[str, Any]:
    """Writes OUT, or what is missing of it, and returns its card; other processes than the first an empty one.

    Raises:
        ValueError: settings, data and what is in OUT do not fit each other. Nothing was written.
    """
    rank, ranks = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if out.exists() and not (out / PLAN).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty, and not one of `jvpgraph synthesize`. Choose another folder for --out.")
    dataset = data_of(config)
    device = device_of(config, int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else None)
    guided, digest = teacher_of(config, device)
    check_teacher(config, guided, first_samples(dataset, 1).to(device))
    made_by = asked(config, options, what_teaches(config, digest, guided.negative), dataset)
    parts = parts_of(dataset, made_by)
    begin(out, made_by) if rank == 0 else wait_for_plan(out, made_by)
    steps = options.steps or config.sampling.teacher_steps
    sample = sampler_of("flow", guided, steps, config.sampling)
    mine = parts[rank::ranks]
    with tqdm(total=sum(len(part.numbers) for part in mine), unit="sample", disable=rank > 0) as progress:
        for part in mine:
            if read_record(out, part) is None:
                write_part(out, part, dataset, sample, config.sampling.batch, device)
            progress.update(len(part.numbers))
    return {} if rank else finish(out, parts, dataset, config, made_by)


def teacher_of(config: RunConfig, device: torch.device) -> tuple[Guided, str]:
    """The teacher with guidance, kept as the settings say, whole in this process; and the digest of its values."""
    kept = config.teacher
    teacher = build_teacher(config, torch.device("cpu") if kept.offload else device)
    digest = digest_of(teacher)
    if kept.quantization is not None:
        teacher = quantize(teacher, kept.quantization)
    teacher = rest(teacher, device, Traffic()) if kept.offload else teacher.to(device)
    return build_guided(teacher, config.guidance, device, scale=config.told_scale), digest


def asked(config: RunConfig, options: Options, teacher: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Everything that the latents follow from, by the names that the user knows."""
    return {
        **teacher,
        "sampling.shift": config.sampling.shift,
        "sampling.batch": config.sampling.batch,
        "data.source": [len(dataset), getattr(dataset, "fingerprint", ""), getattr(dataset, "meaning", "")],
        "--count": options.count or len(dataset),
        "--steps": options.steps or config.sampling.teacher_steps,
        "--seed": options.seed,
        "--shard-size": options.shard_size,
    }


def parts_of(dataset: Dataset, made_by: dict[str, Any]) -> list[Part]:
    count, size = made_by["--count"], made_by["--shard-size"]
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    buckets: Sequence[Sequence[int]] = getattr(dataset, "buckets", [range(len(dataset))])
    turns, rest = divmod(count, len(dataset))
    last = {i * len(dataset) // rest for i in range(rest)}  # as the samples are sorted by shape: some of each
    parts: list[Part] = []
    for bucket, members in zip(names_of(dataset), buckets, strict=True):
        numbers = [turn * len(dataset) + index for turn in range(turns) for index in members]
        numbers += [turns * len(dataset) + index for index in members if index in last]
        parts += [
            Part(f"{bucket}-{i // size:06d}.tar", bucket, tuple(numbers[i : i + size]), digest, made_by["--seed"])
            for i in range(0, len(numbers), size)
        ]
    return parts


def names_of(dataset: Any) -> list[str]:
    """Of the shapes."""
    if (card := getattr(dataset, "card", None)) is not None and len(card["buckets"]) == len(dataset.buckets):
        return [bucket["name"] for bucket in card["buckets"]]
    return [f"shape{i}" for i in range(len(getattr(dataset, "buckets", [None])))]


def begin(out: Path, made_by: dict[str, Any]) -> None:
    """Puts the plan on disk. Raises ValueError if there is another one."""
    made_by = json.loads(json.dumps(made_by))
    if (out / PLAN).is_file():
        old = json.loads((out / PLAN).read_text(encoding="utf-8"))["settings"]
        if changed := [name for name in made_by if old.get(name) != made_by[name]]:
            lines = [f"{name}: {old.get(name)} then, {made_by[name]} now" for name in changed]
            raise ValueError(
                f"{out} holds latents that were made otherwise:\n  " + "\n  ".join(lines) + "\n"
                "Give the same to go on with it, or another folder by --out."
            )
        return
    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    write_whole(out / PLAN, json.dumps({"settings": made_by}, indent=1, ensure_ascii=False) + "\n")


def key_of(number: int) -> str:
    return f"{number:08d}"


@torch.no_grad()
def write_part(out: Path, part: Part, dataset: Dataset, sample: Sampler, size: int, device: torch.device) -> None:
    """Makes a shard's latents, `size` at a time; first the file is put in place, then the record of it.

    Raises:
        FloatingPointError: the teacher gives NaN.
    """
    rng = torch.Generator(device).manual_seed(part.seed_of_noise)
    known = {number: read_sample(dataset, number % len(dataset)) for number in part.numbers}
    there = [(number, one) for number, one in known.items() if one is not None]
    told = fields_of(dataset)
    shapes: dict[str, list[Any]] = {}
    with draft_of(out / part.name) as draft:
        with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
            for start in range(0, len(there), size):
                some = there[start : start + size]
                latents = sample(collate([one for _, one in some]).to(device), rng).float().cpu()
                for (number, one), x0 in zip(some, latents, strict=True):
                    if not x0.isfinite().all():
                        raise FloatingPointError(
                            f"the teacher's sample for {one.key} is not finite. Look whether its weights are whole, "
                            "its dtype suits it, and guidance.scale is not too large"
                        )
                    tensors = {"latents": x0} | {name: x for name, x in one.cond.items() if name in (told or one.cond)}
                    shapes = {name: [list(x.shape), str(x.dtype)[6:]] for name, x in tensors.items()}
                    for name, tensor in tensors.items():
                        add(tar, f"{key_of(number)}.{name}.safetensors", save({name: tensor.contiguous()}))
        digest, bytes_ = sha256_of(draft), draft.stat().st_size
    if not there:
        (out / part.name).unlink()
    skipped = {key_of(number): "the data's sample cannot be read" for number, one in known.items() if one is None}
    record = {
        "planned": part.fingerprint,
        "samples": len(there),
        "bytes": bytes_,
        "sha256": digest,
        "shapes": shapes,
        "skipped": skipped,
        "keys": {key_of(number): one.key for number, one in there},  # of the data
    }
    write_whole(record_of(out, part), json.dumps(record, indent=1) + "\n")


def constants_of(dataset: Any) -> dict[str, Any]:
    """Conditions that are the same for all samples of prepared data, as the teacher was told them."""
    return {name: value.tolist() for name, value in dataset.constants.items()}


def fields_of(dataset: Any) -> list[str]:
    """Conditions that are a sample's own, where the data's card has the others: constants and sizes. Empty: all."""
    return list(getattr(dataset, "card", {}).get("conditions", {}))


def finish(
    out: Path, parts: Sequence[Part], dataset: Any, config: RunConfig, made_by: dict[str, Any]
) -> dict[str, Any]:
    """Index, card, and settings to be named as a `base`, once all shards are there."""
    records = wait_for_records(out, parts)
    full = [(part, record) for part, record in zip(parts, records, strict=True) if record["samples"]]
    if not full:
        raise ValueError(f"no sample of the data can be read, see {out / RECORDS}. Put its shards back.")
    old = getattr(dataset, "card", None)
    conditions = {name: shape for name, shape in full[0][1]["shapes"].items() if name != "latents"}
    buckets = []
    for name in dict.fromkeys(part.bucket for part, _ in full):
        of_it = [record for part, record in full if part.bucket == name]
        before: dict[str, Any] = next((b for b in old["buckets"] if b["name"] == name), {}) if old else {}
        samples, latents = sum(record["samples"] for record in of_it), of_it[0]["shapes"]["latents"][0]
        buckets.append({"sizes": {}, **before, "name": name, "latents": latents, "samples": samples})
    skipped = {key: why for record in records for key, why in record["skipped"].items()}
    plug = config.network(config.teacher_key)
    checkpoint = {"path": str(plug.options.get("path", plug.load)), "pipeline": plug.load}
    card = {
        "format": 1,
        "checkpoint": old["checkpoint"] if old else checkpoint,
        "made_by": made_by,
        "samples": sum(record["samples"] for _, record in full),
        "bytes": sum(record["bytes"] for _, record in full),
        "shards": len(full),
        "buckets": buckets,
        "latents": {"field": LATENTS, "shift": 0.0, "scale": 1.0},  # as they are trained on
        "conditions": conditions,
        "constants": constants_of(dataset) if old else {},  # as they were told
        "guidance_scale": old["guidance_scale"] if old else 1.0,
        "fps": old["fps"] if old else None,
        "negative": {"file": str(config.guidance.negative_file), "prompt": old["negative"]["prompt"] if old else ""},
        "skipped": {"count": len(skipped), "files": skipped},
        "ignored": {},
    }
    plain = settings.to_dict(config)
    kept = {name: plain[name] for name in ("model", "conditions", "guidance", "sampling")}
    kept["teacher"] = {name: plain["teacher"][name] for name in ("model", "conditions")}
    source = {"load": "jvpgraph.trainer.prepare:prepared", "options": {"path": str(out.resolve())}}
    tree = {**kept, "data": {"source": source}}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in tree.items()]  # JSON is YAML
    head = "# Written by jvpgraph synthesize. In your settings: base: and the path of this file."
    write_whole(out / SETTINGS, "\n".join([head, *lines, ""]))
    keep = ("samples", "bytes", "sha256")
    index = [{"name": part.name, "bucket": part.bucket} | {k: record[k] for k in keep} for part, record in full]
    captions = dataset.captions() if hasattr(dataset, "captions") else {}
    keys = {key: own for record in records for key, own in record["keys"].items() if own in captions}
    named = {key: captions[own] for key, own in keys.items()}
    write_whole(out / CAPTIONS, json.dumps(named, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / INDEX, json.dumps({"shards": index}, indent=1) + "\n")
    write_whole(out / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    if skipped:
        log.warning("%d samples of the data cannot be read, and are left out: %s", len(skipped), shorten([*skipped]))
    return card
