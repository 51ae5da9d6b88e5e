"""Conditions without latents, for what looks at no data: dmd and others, and `jvpgraph synthesize`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jvpgraph.trainer.data.sample import Sample
from jvpgraph.trainer.data.shards import OnBadShard, Shards, safetensors_folder, webdataset


def prompts(
    urls: list[str] | str, *, conditions: dict[str, str], shape: Sequence[int], on_bad_shard: OnBadShard = "stop"
) -> Shards:
    """The conditions of shards, with x0 of zeros that only lend their shape.

    Args:
        urls: tar files, as `webdataset` takes them; or a folder of safetensors, as `safetensors_folder` does.
        conditions: fields of a sample by argument of the network, as there.
        shape: of a latent, such as [16, 21, 60, 104].
        on_bad_shard: as there.
    """
    more: dict[str, Any] = {"conditions": conditions, "shape": shape, "on_bad_shard": on_bad_shard}
    if isinstance(urls, str) and Path(urls).is_dir():
        return safetensors_folder(urls, latents=None, **more)
    return webdataset(urls, latents=None, **more)


class Listed:
    """Samples whose conditions stand in the settings."""

    has_latents = False

    def __init__(self, shape: Sequence[int], values: dict[str, list[Any]]) -> None:
        self.shape = tuple(shape)
        self.values = {name: torch.tensor(value) for name, value in values.items()}
        lengths = {name: len(value) for name, value in values.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"values: {lengths} samples; give each condition one value a sample, at least one")
        self.length = next(iter(lengths.values()))
        named = json.dumps([self.shape, values], sort_keys=True)
        self.fingerprint = self.meaning = hashlib.sha256(named.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        cond = {name: value[index] for name, value in self.values.items()}
        return Sample(f"{index:06d}", torch.zeros(self.shape), cond)


def listed(shape: Sequence[int], values: dict[str, list[Any]]) -> Listed:
    """A sample for each value of the conditions: `values: {labels: [0, 1, 2]}`.

    Args:
        shape: of a latent, such as [1, 8, 8].
        values: by argument of the network, as many of each.

    Raises:
        ValueError: they are not as many, or none.
    """
    return Listed(shape, values)
