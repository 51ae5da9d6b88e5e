"""What every part of the trainer hands to the next: clean latents with the conditions of their network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jvpgraph.trainer.noise import Random, uniform

Condition = Mapping[str, Tensor]
"""Keyword arguments of the network besides latents and time, each [B, ...]."""


@dataclass(frozen=True)
class Batch:
    """Clean latents x0 [B, ...] of about unit variance, their conditions [B, ...], and the samples' names."""

    x0: Tensor
    cond: Condition
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x0)

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device) for name, value in self.cond.items()}
        return Batch(self.x0.to(device), moved, self.keys)

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most `size` samples."""
        for i in range(0, len(self), size):
            part = slice(i, i + size)
            yield Batch(self.x0[part], {k: v[part] for k, v in self.cond.items()}, self.keys[part])


def expand_condition(cond: Condition, size: int) -> dict[str, Tensor]:
    """One condition [1, ...] (a negative prompt) for `size` samples, without a copy."""
    return {name: value.expand(size, *value.shape[1:]) for name, value in cond.items()}


def drop_condition(cond: Condition, negative: Condition, share: float, rng: Random) -> dict[str, Tensor]:
    """The condition, replaced by the negative one [1, ...], as far as that has it, for a random share of samples."""
    size = len(next(iter(cond.values())))
    drop = uniform(size, rng, torch.float32) < share
    dropped = {
        name: torch.where(drop.reshape(-1, *[1] * (cond[name].dim() - 1)), value.to(cond[name]), cond[name])
        for name, value in negative.items()
    }
    return {**cond, **dropped}
