"""Shards of latents on disk: tar files named as WebDataset names them, or safetensors files of stacked tensors.

Both are read with random access.  A tar is indexed once, by one pass over its headers; a sample is then read at its
offset.  A file is open only while a sample is read: nothing is shared between processes, forked or spawned.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import safetensors.torch
import torch
from braceexpand import braceexpand
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jvpgraph.trainer.data.sample import BadShard, Sample, shorten

log = logging.getLogger("jvpgraph.trainer.data")

OnBadShard = Literal["stop", "skip"]
PerChannel = float | list[float] | list[list[float]]
INDEX_THREADS = 16  # indexing waits for the disk, not for the processor
TAR_BLOCK = 512  # bytes: members start at multiples, two blocks of zeros end the file (POSIX ustar)
ADVICE = "Write the shard again, or set data.source.options.on_bad_shard=skip to leave out what is bad."


def webdataset(
    urls: list[str] | str,
    *,
    latents: str | None,
    conditions: dict[str, str],
    scale: PerChannel = 1.0,
    shift: PerChannel = 0.0,
    shape: Sequence[int] | None = None,
    on_bad_shard: OnBadShard = "stop",
) -> Shards:
    """Uncompressed tar files, by path, glob or braces (`data-{000..015}.tar`), in this order.

    A member `000001.latents.npy` is field `latents.npy` of sample `000001`: a name is cut at the first dot behind its
    last slash.  A field is a tensor by its last extension: `npy`; `pt` or `pth` (one tensor, loaded with
    weights_only); `safetensors` (one tensor); `cls` (an integer); `json` (a number or nested lists of them).

    `latents` is the field of the clean latents, `conditions` maps fields to arguments of the network:
    `webdataset("data-{000..015}.tar", latents="latents.npy", conditions={"t5.npy": "text", "cls": "labels"})`.
    x0 = (latents - shift) * scale in float32; lists hold one number per channel (dim 0 of a sample), or
    lists of one per frame (dim 1). Without latents (None) x0 is zeros of `shape`.

    A shard is bad if it is missing, truncated, without end, or if a sample lacks a field; a sample, if a field cannot
    be decoded, differs in shape or dtype from the first sample (dim 0 of conditions is free), or if its values are
    not finite.  With "stop" either is a BadShard; with "skip" it is left out, with a warning in the log.  BadShard
    also if nothing is left; ValueError for arguments that fit no shard.
    """
    fields = fields_of(latents, conditions, shape)
    for field in fields:
        if field.rpartition(".")[2] not in DECODERS:
            known = ", ".join(DECODERS)
            raise ValueError(f"field {field!r} has no known extension: {known}. Fields are named like 'latents.npy'.")
    indexed = _index(_list_files([urls] if isinstance(urls, str) else urls), fields, _index_tar, on_bad_shard)
    return Shards(indexed, latents, conditions, scale, shift, on_bad_shard, shape)


def safetensors_folder(
    path: str | Path,
    *,
    latents: str | None,
    conditions: dict[str, str],
    scale: PerChannel = 1.0,
    shift: PerChannel = 0.0,
    shape: Sequence[int] | None = None,
    on_bad_shard: OnBadShard = "stop",
) -> Shards:
    """All `*.safetensors` of a folder in the order of their names, each with tensors [N, ...] of its N samples.

    Sample n of `a.safetensors` has the key `a/n`.  `latents` and `conditions` name tensors of the files; all else is
    as in `webdataset`.  Whole shards of another shape or dtype than the first are bad.  Only the slices that a sample
    needs are read.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a folder")
    fields = fields_of(latents, conditions, shape)
    index_one = partial(_index_rows, latents=latents)
    indexed = _index(sorted(Path(path).glob("*.safetensors")), fields, index_one, on_bad_shard)
    return Shards(indexed, latents, conditions, scale, shift, on_bad_shard, shape)


def fields_of(latents: str | None, conditions: Mapping[str, str], shape: Sequence[int] | None) -> tuple[str, ...]:
    """What is read of a sample. Raises ValueError for neither latents nor a shape, or for nothing to read."""
    if (latents is None) == (shape is None):
        raise ValueError("give either the field of the latents, or without any their shape")
    if latents is None and not conditions:
        raise ValueError("conditions is empty, and there are no latents: name the fields of at least one condition")
    return (*([] if latents is None else [latents]), *conditions)


# ---------------------------------------------------------------- the data set


class Shard(Protocol):
    """One indexed file: `fields` of samples 0 to len - 1."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def key(self, row: int) -> str: ...

    def read(self, row: int) -> dict[str, Tensor]:
        """Field -> tensor.  BadShard for what cannot be read."""
        ...


class Shards:
    """The samples of all shards, one shard after the other; a sample is read from disk each time it is asked for."""

    def __init__(
        self,
        shards: Sequence[Shard],
        latents: str | None,
        conditions: Mapping[str, str],
        scale: PerChannel,
        shift: PerChannel,
        on_bad_shard: OnBadShard,
        shape: Sequence[int] | None = None,
    ) -> None:
        if len({*conditions.values()}) < len(conditions):
            raise ValueError(f"two fields for one argument of the network: {dict(conditions)}")
        self.shards, self.latents, self.conditions = list(shards), latents, dict(conditions)
        self.on_bad_shard = on_bad_shard
        self._ends = list(accumulate(len(shard) for shard in shards))
        names = "\n".join(f"{len(shard)} {shard.path.name}" for shard in shards)
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()[:16]
        self._first, first = self._find_first()
        self._shapes = {field: (value.dtype, tuple(value.shape)) for field, value in first.items()}
        self.has_latents = latents is not None
        self._shape = tuple(first[latents].shape) if latents is not None else tuple(shape or ())
        self._scale = per_channel("scale", scale, self._shape)
        self._shift = per_channel("shift", shift, self._shape)
        if not (self._scale != 0).all() or not (self._scale.isfinite().all() and self._shift.isfinite().all()):
            raise ValueError(f"scale is {scale} and shift {shift}: x0 = (latents - shift) * scale needs other numbers")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`.  BadShard if it cannot be used, whatever `on_bad_shard` says: the loader skips."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            name, key, tensors = self._read(index)
            self._check(name, tensors)
        except BadShard as error:
            raise _with_advice(error, self.on_bad_shard) from error.__cause__
        x0 = torch.zeros(self._shape)
        if self.latents is not None:
            x0 = (tensors[self.latents].float() - self._shift) * self._scale
        return Sample(key, x0, {argument: tensors[field] for field, argument in self.conditions.items()})

    def _read(self, index: int) -> tuple[str, str, dict[str, Tensor]]:
        """The sample's name for errors, its key, and its tensors as they are on disk; the latents are finite."""
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        row = index - (self._ends[number] - len(shard))
        name = f"{shard.path}, key {shard.key(row)}"
        tensors = shard.read(row)
        for field, tensor in tensors.items():
            if broken := (~tensor.float().isfinite()).sum().item():
                total = tensor.numel()
                raise BadShard(f"{name}: {field}: {broken} of {total} values are NaN or infinite in float32")
        return name, shard.key(row), tensors

    def _find_first(self) -> tuple[str, dict[str, Tensor]]:
        """Name and tensors of the first sample that can be read."""
        for index in range(len(self)):
            try:
                name, _, tensors = self._read(index)
                return name, tensors
            except BadShard as error:
                last = error
                if self.on_bad_shard == "stop":
                    raise _with_advice(error, self.on_bad_shard) from error.__cause__
        raise BadShard(f"all {len(self)} samples are bad, the last one:\n{last}") from last

    def _check(self, name: str, tensors: dict[str, Tensor]) -> None:
        """BadShard for a shape or dtype other than the first sample's."""
        for field, (dtype, shape) in self._shapes.items():
            value = tensors[field]
            free = 0 if field == self.latents else 1
            same = value.dim() == len(shape) and tuple(value.shape[free:]) == shape[free:]
            if value.dtype != dtype or not same:
                raise BadShard(
                    f"{name}: {field} is {list(value.shape)} {str(value.dtype)[6:]}, "
                    f"but {list(shape)} {str(dtype)[6:]} in the first sample ({self._first})"
                )


def per_channel(name: str, value: PerChannel, shape: Sequence[int]) -> Tensor:
    """A number [], one per channel [C, 1, ...], or per channel and frame [C, T, 1, ...]; float32.

    Args:
        name: for the error.
        value: a number, a list, or lists that may be for more frames than there are.
        shape: of the latents [C, ...] that it is for. ValueError if it does not fit them.
    """
    tensor = torch.tensor(value, dtype=torch.float32)
    if tensor.dim() == 0:
        return tensor
    depth = tensor.dim()
    fits = depth <= min(2, len(shape)) and len(tensor) == shape[0] and (depth == 1 or tensor.shape[1] >= shape[1])
    if not fits:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, latents {list(shape)}: give one number, or one per channel"
        )
    tensor = tensor if depth == 1 else tensor[:, : shape[1]]
    return tensor.reshape(*tensor.shape, *[1] * (len(shape) - depth))


def _with_advice(error: BadShard, on_bad_shard: OnBadShard) -> BadShard:
    return BadShard(f"{error}\n  {ADVICE}") if on_bad_shard == "stop" else error


# ---------------------------------------------------------------- finding and indexing the files


def _list_files(patterns: Sequence[str]) -> list[Path]:
    """Braces and globs expanded; a pattern that matches nothing stays, as a file that is missing."""
    names: list[str] = []
    for pattern in patterns:
        if re.match(r"[a-z]\w+:", pattern):
            raise ValueError(f"{pattern}: only local files have random access. Mount the store, or copy the shards.")
        for name in [pattern] if Path(pattern).exists() else braceexpand(pattern, escape=False):
            if "{" in name and not Path(name).exists():
                raise ValueError(f"{pattern}: write {{000..015}} or {{a,b}}; {name} is not a file")
            names += [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True)) or [name]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"listed more than once: {shorten(twice)}")
    return [Path(name) for name in names]


def _index(
    paths: Sequence[Path],
    fields: tuple[str, ...],
    index_one: Callable[[Path, tuple[str, ...]], Shard],
    on_bad_shard: OnBadShard,
) -> list[Shard]:
    """The good shards, in order.  BadShard for all bad ones at once, or if there is no good one."""
    if on_bad_shard not in ("stop", "skip"):
        raise ValueError(f'on_bad_shard={on_bad_shard!r}: "stop" or "skip"')
    if len(set(fields)) < len(fields):
        raise ValueError(f"a field is named twice: {', '.join(fields)}")
    if not paths:
        raise BadShard("no shards: the list or the folder is empty")

    def attempt(path: Path) -> Shard | BadShard:
        try:
            return index_one(path, fields)
        except BadShard as error:
            return error

    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        results = list(pool.map(attempt, paths))
    results = _refuse_other_layouts(results)
    good = [result for result in results if not isinstance(result, BadShard)]
    bad = [str(result) for result in results if isinstance(result, BadShard)]
    if bad and (on_bad_shard == "stop" or not good):
        advice = f"\n  {ADVICE}" if good else ""
        raise BadShard(f"{len(bad)} of {len(paths)} shards are bad\n  {shorten(bad, chr(10) + '  ')}{advice}")
    for count, problem in enumerate(bad, 1):
        log.warning("%s\n  left out: shard %d that is bad, of %d", problem, count, len(paths))
    return good


# ---------------------------------------------------------------- tar files


@dataclass(frozen=True)
class TarShard:
    path: Path
    fields: tuple[str, ...]
    keys: list[str]
    spans: np.ndarray  # [samples, fields, 2], int64: offset and size in bytes

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return self.keys[row]

    def read(self, row: int) -> dict[str, Tensor]:
        tensors = {}
        for field, data in zip(self.fields, self._read_bytes(row)):
            try:
                tensors[field] = DECODERS[field.rpartition(".")[2]](data)
            except Exception as error:  # a decoder may raise anything on damaged bytes
                problem = f"{field} cannot be decoded ({type(error).__name__}: {error})"
                raise BadShard(f"{self.path}, key {self.keys[row]}: {problem}") from error
        return tensors

    def _read_bytes(self, row: int) -> list[bytes]:
        parts = []
        try:
            with open(self.path, "rb") as file:
                for offset, size in self.spans[row].tolist():
                    file.seek(offset)
                    parts.append(file.read(size))
        except OSError as error:
            raise BadShard(f"{self.path}, key {self.keys[row]}: {error}") from error
        if [len(part) for part in parts] != self.spans[row, :, 1].tolist():
            raise BadShard(f"{self.path}, key {self.keys[row]}: the file became shorter since it was indexed")
        return parts


def _index_tar(path: Path, fields: tuple[str, ...]) -> TarShard:
    """One pass over the headers, which seeks over the data."""
    spans: dict[str, dict[str, tuple[int, int]]] = {}
    seen: set[str] = set()
    end, last = 0, "before the first member"
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                last = f"behind {member.name}"
                end = member.offset_data + (-(-member.size // TAR_BLOCK) * TAR_BLOCK if member.isreg() else 0)
                key, field = _split_name(member.name)
                if member.isdir() or not field:
                    continue
                if not member.isreg() or member.issparse():
                    raise BadShard(f"{path}, key {key}: {member.name} is a link or sparse, not a plain file")
                if end > size:
                    raise BadShard(
                        f"{path}, key {key}: truncated: {field} ends at byte {member.offset_data + member.size}, "
                        f"its padding at {end}, the file at {size}"
                    )
                seen.add(field)
                sample = spans.setdefault(key, {})
                if field in sample:
                    raise BadShard(f"{path}, key {key}: {field} is there twice")
                if field in fields:
                    sample[field] = (member.offset_data, member.size)
        with open(path, "rb") as file:
            file.seek(end)
            trailer = file.read(2 * TAR_BLOCK)
    except BadShard:
        raise
    except (OSError, tarfile.TarError, ValueError) as error:
        hint = " (a compressed tar has no random access: unpack it)" if isinstance(error, tarfile.ReadError) else ""
        raise BadShard(f"{path}: {last}: not readable as a tar file: {error}{hint}") from error
    if trailer.strip(b"\0"):
        raise BadShard(f"{path}: {last}: neither a header nor the end of a tar file at byte {end}")
    if len(trailer) < 2 * TAR_BLOCK:
        raise BadShard(f"{path}: {last}: truncated: the two blocks of zeros that end a tar file are missing")
    if not spans:
        raise BadShard(f"{path}: no samples")
    for key, sample in spans.items():
        if missing := [field for field in fields if field not in sample]:
            raise BadShard(f"{path}, key {key}: no {', '.join(missing)} (fields of the shard: {shorten(sorted(seen))})")
    table = np.array([[sample[field] for field in fields] for sample in spans.values()], dtype=np.int64)
    return TarShard(path, fields, list(spans), table)


def _split_name(name: str) -> tuple[str, str]:
    """`train/000001.latents.npy` -> (`train/000001`, `latents.npy`); no field for metadata and names without a dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return folder + slash + stem, "" if base.startswith("__") or not stem else field


def _decode_npy(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))


def _decode_pt(data: bytes) -> Tensor:
    value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__}, not a tensor")
    return value.detach()


def _decode_safetensors(data: bytes) -> Tensor:
    tensors = safetensors.torch.load(data)
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors ({shorten(sorted(tensors))}), not one")
    return next(iter(tensors.values()))


def _decode_cls(data: bytes) -> Tensor:
    return torch.tensor(int(data), dtype=torch.int64)


def _decode_json(data: bytes) -> Tensor:
    """Whole numbers int64, others float32."""
    value = torch.tensor(json.loads(data))
    return value.float() if value.is_floating_point() else value


DECODERS: dict[str, Callable[[bytes], Tensor]] = {
    "npy": _decode_npy,
    "pt": _decode_pt,
    "pth": _decode_pt,
    "safetensors": _decode_safetensors,
    "cls": _decode_cls,
    "json": _decode_json,
}


# ---------------------------------------------------------------- safetensors files


@dataclass(frozen=True)
class RowShard:
    path: Path
    latents: str | None
    layout: dict[str, tuple[str, tuple[int, ...]]]  # field -> dtype as the file names it, shape [samples, ...]

    def __len__(self) -> int:
        return next(iter(self.layout.values()))[1][0]

    def key(self, row: int) -> str:
        return f"{self.path.stem}/{row}"

    def read(self, row: int) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                return {field: file.get_slice(field)[row : row + 1][0] for field in self.layout}
        except (OSError, SafetensorError, IndexError) as error:
            raise BadShard(f"{self.path}, key {self.key(row)}: {error}") from error


def _index_rows(path: Path, fields: tuple[str, ...], latents: str | None) -> RowShard:
    """The header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if missing := [field for field in fields if field not in names]:
                raise BadShard(f"{path}: no {', '.join(missing)} (tensors of the shard: {shorten(names)})")
            slices = {field: file.get_slice(field) for field in fields}
            layout = {field: (part.get_dtype(), tuple(part.get_shape())) for field, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise BadShard(f"{path}: truncated, or not a safetensors file: {error}") from error
    shapes = ", ".join(f"{field} {list(shape)}" for field, (_, shape) in layout.items())
    if len({shape[:1] for _, shape in layout.values()}) > 1 or () in [shape for _, shape in layout.values()]:
        raise BadShard(f"{path}: the tensors do not have one length along dim 0: {shapes}")
    if not next(iter(layout.values()))[1][0]:
        raise BadShard(f"{path}: no samples: {shapes}")
    return RowShard(path, latents, layout)


def _refuse_other_layouts(results: Sequence[Shard | BadShard]) -> list[Shard | BadShard]:
    """BadShard in place of each RowShard whose samples have another shape or dtype than the first one's."""
    first = next((result for result in results if isinstance(result, RowShard)), None)
    return [_compare_layout(first, result) if first and isinstance(result, RowShard) else result for result in results]


def _compare_layout(first: RowShard, shard: RowShard) -> RowShard | BadShard:
    # Dim 1 of conditions, dim 0 of a sample, may differ from shard to shard.
    for field, (dtype, shape) in shard.layout.items():
        free = 1 if field == shard.latents else 2
        expected_dtype, expected = first.layout[field]
        if (dtype, len(shape), shape[free:]) != (expected_dtype, len(expected), expected[free:]):
            return BadShard(
                f"{shard.path}: {field} is {list(shape)} {dtype}, but {list(expected)} {expected_dtype} in {first.path}"
            )
    return shard
