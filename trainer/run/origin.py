"""What a run was begun with, beyond its settings: the values of its teacher, its shards, the files with its code.

origin.json in the run's folder has them. A run that goes on with others would end as something that nobody can name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import BadShard, Dataset, Sample, shorten
from jvpgraph.trainer.files import write_whole
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.run.beforehand import paths_of
from jvpgraph.trainer.run.changes import covered, record_changes
from jvpgraph.trainer.run.ranks import Ranks

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
VALUES = 1024  # of each tensor that its digest looks at
BLOCKS, BLOCK = 8, 4096  # of each shard; bytes


class Digests(NamedTuple):
    """Of the values of a run's networks."""

    teacher: str
    base: str  # of what the student starts as


@dataclass(frozen=True)
class Origin:
    """What a run was begun with."""

    settings: dict[str, Any]
    teacher: str  # digest of its values
    code: dict[str, str]  # digests of the .py files and the negative condition, by the key that names them
    samples: int
    fingerprint: str  # the data set's own
    shards: list[tuple[str, int, str]]  # name, samples, digests of some of its blocks
    start: str | None = None  # --from
    buckets: list[int] | None = None  # samples of each, where the data set has several shapes; None: one, or unknown
    meaning: str | None = None  # the data set's own; None: unknown
    base: str | None = None  # digest of what the student started as, where that is not the teacher


def origin_of(config: RunConfig, digests: Digests, dataset: Dataset, start: Path | None) -> Origin:
    shards = shards_of(dataset)
    with ThreadPoolExecutor(16) as pool:
        of_files = list(pool.map(lambda shard: digest_of_file(shard.path), shards))
    return Origin(
        settings.to_dict(config),
        digests.teacher,
        code_of(config),
        len(dataset),
        getattr(dataset, "fingerprint", ""),
        [(shard.path.name, len(shard), digest) for shard, digest in zip(shards, of_files, strict=True)],
        None if start is None else str(start),
        sizes_of(dataset),
        getattr(dataset, "meaning", ""),
        None if config.teacher.model is None else digests.base,
    )


def resumed(
    config: RunConfig, digests: Digests, dataset: Dataset, start: Path | None, change: Sequence[str], ranks: Ranks
) -> tuple[Dataset, Origin, list[str]]:
    """The data set by the numbers of its beginning, the origin to write, and what of it was changed by --change.

    Args:
        config, digests, dataset: of the run that goes on.
        start: --from, if given.
        change: keys of --change.
        ranks: all of which call this; the first one looks at the files.

    Raises:
        ValueError: it would go on with other files than it was begun with.
    """
    then = ranks.on_first(lambda: read_origin(config.out))
    if then is not None and not covered("data.source", change):
        dataset = aligned(dataset, then)

    def look() -> tuple[Origin, list[str]]:
        now = origin_of(config, digests, dataset, start)
        if then is None:
            return now, []
        if start is not None and then.start != now.start:
            raise ValueError(
                f"--from {start}: the run in {config.out} has begun already, from {then.start or 'its teacher'}. Leave "
                "--from out to go on with it; or choose another `out`, or --fresh to move it aside."
            )
        changes = compare(then, now, change)
        if not any(line.startswith("data.source") for line in changes):
            now = replace(now, shards=then.shards, fingerprint=then.fingerprint, buckets=then.buckets or now.buckets)
        return replace(now, start=then.start), changes

    origin, changes = ranks.on_first(look)
    return dataset, origin, changes


def read_origin(folder: Path) -> Origin | None:
    """None: the run is older than origin.json.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / ORIGIN
    if not path.exists():
        return None
    try:
        found = Origin(**json.loads(path.read_text(encoding="utf-8")))
        return replace(found, shards=[(name, count, digest) for name, count, digest in found.shards])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove it to go on with what the settings name now, unchecked."
        ) from error


def write_origin(folder: Path, origin: Origin, step: int, changes: Sequence[str]) -> None:
    """With a line in changes.jsonl of what was changed at this step."""
    record_changes(folder, step, changes)
    write_whole(folder / ORIGIN, json.dumps(asdict(origin), indent=1) + "\n")


def compare(then: Origin, now: Origin, change: Sequence[str]) -> list[str]:
    """What is different, one line each, and was asked for by --change.

    Raises:
        ValueError: something is different that was not asked for.
    """
    found = [f"{key}: {what}" for key, what in differences(then, now).items()]
    refused = [line for line in found if not covered(line.partition(": ")[0], change)]
    if refused:
        keys = " ".join(f"--change {line.partition(': ')[0]}" for line in refused)
        raise ValueError(
            "the run was begun with other files:\n  " + "\n  ".join(refused) + "\n"
            f"Put the old ones back; or add {keys} to go on with the new ones; or choose another `out`."
        )
    return found


def differences(then: Origin, now: Origin) -> dict[str, str]:
    found: dict[str, str] = {}
    weights = "weights are others than when the run began"
    if then.base is None and now.base is None:
        of_networks = {"model": ("the teacher's", then.teacher, now.teacher)}
    else:
        of_networks = {
            "model": ("the student's first", then.base or then.teacher, now.base or now.teacher),
            "teacher.model": ("the teacher's", then.teacher, now.teacher),
        }
    found |= {key: f"{whose} {weights}" for key, (whose, before, after) in of_networks.items() if before != after}
    for key in then.code.keys() & now.code.keys():
        if then.code[key] != now.code[key]:
            found.setdefault(key, "the file that it names was edited since the run began")
    before, after = ({name: (count, digest) for name, count, digest in origin.shards} for origin in (then, now))
    both = before.keys() & after.keys()
    if replaced := [n for n in both if before[n][0] != after[n][0] or is_other(before[n][1], after[n][1])]:
        found["data.source"] = f"another content than when the run began: {shorten(sorted(replaced))}"
    elif then.meaning not in (None, now.meaning):
        found["data.source"] = "its card.json has another normalisation, or other conditions, than when the run began"
    elif (then.samples, then.fingerprint) != (now.samples, now.fingerprint):
        found["data.source"] = (
            f"the data set had {then.samples} samples and has {now.samples}, or other names; with --change it is read "
            "from its beginning"
        )
    return found


# ---------------------------------------------------------------- digests


def digest_of(model: nn.Module) -> str:
    """Of parameters and buffers."""
    return digest_of_values(model.state_dict())


@torch.no_grad()
def digest_of_values(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes, dtypes and VALUES values of each tensor; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // VALUES)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """Of some of its blocks: shards are too large to be read at every start. Empty if it cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digests = []
            for i in range(BLOCKS):
                file.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                digests.append(hashlib.sha256(file.read(BLOCK)).hexdigest()[:8])
        return " ".join(digests)
    except OSError:
        return ""


def is_other(then: str, now: str) -> bool:
    """Whether more than half of the blocks of a file differ: fewer do where damage was repaired."""
    return sum(a != b for a, b in zip(then.split(), now.split(), strict=False)) > BLOCKS // 2


def code_of(config: RunConfig) -> dict[str, str]:
    """Digests of the user's files that training calls or reads whole, by the key of the setting."""
    files = {"model": config.model.file, "data.source": config.data.source.file}
    if config.teacher.model is not None:
        files["teacher.model"] = config.teacher.model.file
    files |= {"guidance.negative_file": config.guidance.negative_file}
    files |= {f"imports.{i}": Plug(f"{name}:").file for i, name in enumerate(config.imports)}
    return digests_of(files)


def what_teaches(config: RunConfig, teacher: str, negative: Condition) -> dict[str, Any]:
    """Everything that a guided teacher's answers follow from, by the names that the user knows.

    Args:
        teacher: digest of its values.
        negative: the negative condition.
    """
    key = config.teacher_key
    plug, plain = config.network(key), settings.to_dict(config)
    moved = dict(paths_of(plug))  # whose content is in the values
    code = {name: digest for name, digest in code_of(config).items() if name == key or name.startswith("imports")}
    return {
        "teacher": teacher,
        f"{key}.load": plug.load,
        f"{key}.options": {name: value for name, value in plug.options.items() if name not in moved},
        "files": code,
        "teacher.quantization": plain["teacher"]["quantization"],
        "conditions": config.conditions_of(key),
        "guidance": plain["guidance"],
        "guidance.negative": digest_of_values(negative),
        "sampling.guidance": config.told_scale,
    }


def digests_of(files: Mapping[str, Path | None]) -> dict[str, str]:
    """Of the whole of those that there are."""
    there = {key: file for key, file in files.items() if file is not None and file.is_file()}
    return {key: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for key, file in there.items()}


# ---------------------------------------------------------------- shards that come and go


def shards_of(dataset: Any) -> list[Any]:
    """The files of a data set that says which it has, in the order of its samples."""
    parts = getattr(dataset, "parts", None)
    return list(getattr(dataset, "shards", ())) if parts is None else [s for part in parts for s in shards_of(part)]


def sizes_of(dataset: Any) -> list[int] | None:
    """How many samples each shape has, one after the other; None for data of one shape."""
    buckets = getattr(dataset, "buckets", None)
    return None if buckets is None else [len(bucket) for bucket in buckets]


def aligned(dataset: Dataset, then: Origin) -> Dataset:
    """The data set with the numbers that its samples had when the run began.

    Where bad shards are skipped, one may have gone bad since, or be whole again. Its samples then count as bad ones,
    or stay out.

    Raises:
        ValueError: a shape has no sample left.
    """
    shards = shards_of(dataset)
    names = {shard.path.name: len(shard) for shard in shards}
    before = {name: count for name, count, _ in then.shards}
    same = list(names.items()) == list(before.items())
    skips = getattr(dataset, "on_bad_shard", "stop") == "skip"
    if same or not skips or not names or not before or (sizes_of(dataset) is None) != (then.buckets is None):
        return dataset
    if not any(names.get(name) == count for name, count in before.items()):
        return dataset
    if lost := [name for name in before if name not in names]:
        log.warning("bad since the run began, and left out: %s", shorten(lost))
    if new := [name for name in names if name not in before]:
        log.warning("not there when the run began, and left out: %s; --change data.source takes them", shorten(new))
    found = Aligned(dataset, then)
    if gone := [i for i, bucket in enumerate(found.buckets) if all(found.places[n][1] is None for n in bucket)]:
        shards = sorted({found.places[n][0] for i in gone for n in found.buckets[i]})
        raise ValueError(
            f"data.source: all shards of {len(gone)} of {len(found.buckets)} shapes are bad: {shorten(shards)}. "
            "Put them back; or add --change data.source to read the others from their beginning."
        )
    return found


class Aligned:
    """Samples of a data set by the numbers they had before; those of shards that are gone are BadShard.

    The shards are those of all shapes, which lie one after the other.
    """

    on_bad_shard = "skip"

    def __init__(self, dataset: Any, then: Origin) -> None:
        self.dataset, self.fingerprint = dataset, then.fingerprint
        self.has_latents, self.meaning = getattr(dataset, "has_latents", True), getattr(dataset, "meaning", "")
        if hasattr(dataset, "captions"):
            self.captions = dataset.captions
        self.shards = shards_of(dataset)
        ends = list(accumulate(len(shard) for shard in self.shards))
        starts = {s.path.name: end - len(s) for s, end in zip(self.shards, ends, strict=True)}
        counts = {s.path.name: len(s) for s in self.shards}
        self.places: list[tuple[str, int | None]] = []
        for name, count, _ in then.shards:
            here = counts.get(name) == count
            self.places += [(name, starts[name] + i if here else None) for i in range(count)]
        ends = list(accumulate(then.buckets or [len(self.places)]))
        self.buckets = [range(start, end) for start, end in pairwise([0, *ends])]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        name, place = self.places[index]
        if place is None:
            raise BadShard(f"{name}: the shard went bad after the run began")
        return self.dataset[place]


class Position:
    """The loader's place in a checkpoint; with other data, asked for by --change, it stays at the beginning."""

    def __init__(self, loader: Any, change: Sequence[str]) -> None:
        self.loader, self.may_change = loader, covered("data.source", change)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        here = self.loader.state_dict()
        if self.may_change and any(state.get(name) != here[name] for name in ("samples", "fingerprint")):
            log.warning("the data is another one: it is read from its beginning")
            return
        self.loader.load_state_dict(state)
