"""What a data set is to the loader: samples by number, and the error for those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jvpgraph.trainer.batch import Batch

SHOWN = 5  # items that an error lists before it says how many more there are


@dataclass(frozen=True)
class Sample:
    """One clean latent x0 [...] of about unit variance, the network's arguments for it [...], and its name."""

    key: str
    x0: Tensor
    cond: dict[str, Tensor]


class Dataset(Protocol):
    """Samples 0 to len - 1, in any order, from any process.

    Some attributes are optional:
      fingerprint: str                     equal as long as every number still means the same sample
      on_bad_shard: "stop" | "skip"        whether BadShard from `dataset[index]` ends the run ("stop" if absent)
      batch(index: Tensor [B]) -> Batch    instead of `len(index)` samples and `collate`, where that is slow
      buckets: Sequence[Sequence[int]]     the samples of each shape, every number once: a batch has one shape
      meaning: str                         equal as long as what is on disk gives the same numbers: its normalisation
      captions() -> Mapping[str, str]      of samples by key, for measures of pictures and their texts
      has_latents: bool                    False: x0 is zeros that only lend their shape (prompts without pictures)
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class BadShard(ValueError):
    """A shard or one of its samples cannot be used; the message says which, why, and what to do.

    Made from its message alone, because a DataLoader rebuilds an error of its workers from type and text.
    """


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> Batch of len(samples).  ValueError if their shapes or conditions differ, with the samples' keys."""
    keys = tuple(sample.key for sample in samples)
    names = [tuple(sorted(sample.cond)) for sample in samples]
    if len(set(names)) > 1:
        raise ValueError(f"the samples of a batch have different conditions: {_list_groups(keys, names)}")
    cond = {name: _stack(f"condition {name!r}", keys, [s.cond[name] for s in samples]) for name in samples[0].cond}
    return Batch(_stack("x0", keys, [sample.x0 for sample in samples]), cond, keys)


def first_samples(dataset: Dataset, count: int, among: Sequence[int] | None = None) -> Batch:
    """The first `count` samples of a data set; those that cannot be read are stepped over where it skips them.

    Where it has several shapes: those of the commonest one, and at most as many as it has. Or those with the numbers
    `among`, which have one shape.

    Raises:
        ValueError: it has not that many.
        BadShard: a sample cannot be read, and the data set says to stop then.
    """
    members = among
    if members is None:
        members, buckets = commonest(dataset), getattr(dataset, "buckets", [])
        count = min(count, len(members)) if len(buckets) > 1 else count
    samples = _readable(dataset, members, count)
    if len(samples) < count:
        raise ValueError(f"{count} samples asked for, and the data set has {len(samples)} that can be read")
    return collate(samples)


def some_samples(dataset: Dataset, count: int) -> Batch:
    """As `first_samples`, but as many as can be read, if those are fewer.

    Raises:
        BadShard: none can; or one cannot, and the data set says to stop then.
    """
    samples = _readable(dataset, commonest(dataset), count)
    if not samples:
        raise BadShard(f"none of {len(commonest(dataset))} samples can be read: put the shards back")
    return collate(samples)


def commonest(dataset: Dataset) -> Sequence[int]:
    """The samples of the commonest shape."""
    buckets: Sequence[Sequence[int]] = getattr(dataset, "buckets", [range(len(dataset))])
    return max(buckets, key=len)


def read_sample(dataset: Dataset, index: int) -> Sample | None:
    """A sample; None for one that cannot be read, where the data set steps over those.

    Raises:
        BadShard: it says to stop then.
    """
    try:
        return dataset[index]
    except BadShard:
        if getattr(dataset, "on_bad_shard", "stop") != "skip":
            raise
        return None


def _readable(dataset: Dataset, members: Sequence[int], count: int) -> list[Sample]:
    """The first ones; those that cannot be read are stepped over where the data set skips them."""
    samples: list[Sample] = []
    for index in members:
        if len(samples) == count:
            break
        if (sample := read_sample(dataset, index)) is not None:
            samples.append(sample)
    return samples


def _stack(name: str, keys: Sequence[str], values: list[Tensor]) -> Tensor:
    """Tensors [...] -> [B, ...]."""
    shapes = [(tuple(value.shape), value.dtype) for value in values]
    if len(set(shapes)) > 1:
        groups = _list_groups(keys, [f"{list(shape)} {str(dtype)[6:]}" for shape, dtype in shapes])
        raise ValueError(
            f"{name} differs within a batch: {groups}. Pad it to one shape (with a mask as a condition of its own) "
            "when the shards are written, or keep samples of different shape in different data sets."
        )
    return torch.stack(values)


def _list_groups(keys: Sequence[str], values: Sequence[object]) -> str:
    """`[7, 16] float32 (a, b), [9, 16] float32 (c)`."""
    groups: dict[object, list[str]] = {}
    for key, value in zip(keys, values):
        groups.setdefault(value, []).append(key)
    return ", ".join(f"{value} ({shorten(members)})" for value, members in groups.items())


def shorten(items: Sequence[str], separator: str = ", ") -> str:
    """The first few items, and how many more there are."""
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])
