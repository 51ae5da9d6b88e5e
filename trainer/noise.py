"""Random numbers of a batch: one per sample, or of its shape, the same whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankNoise:
    """A generator for processes that each hold a part of a batch: all draw for the whole batch and keep their part.

    So the generators of all processes stay in step, and a batch gets the same noise as in one process.
    It is not a torch.Generator, so that drawing from it without the functions below raises an error, instead of giving
    the same numbers in every process.
    """

    generator: torch.Generator
    rank: int  # which part is this process's
    ranks: int  # how many parts there are

    @property
    def device(self) -> torch.device:
        return self.generator.device


Random = torch.Generator | RankNoise
"""What objectives draw from, by the functions below."""


def normal(size: int, rng: Random) -> Tensor:
    """Standard normal [size], float64, on the generator's device."""
    return _draw(torch.randn, (size,), rng, dtype=torch.float64)


def uniform(size: int, rng: Random, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform in [0, 1), [size], on the generator's device."""
    return _draw(torch.rand, (size,), rng, dtype=dtype)


def integers(low: int, high: int, size: int, rng: Random) -> Tensor:
    """Uniform in low..high - 1, [size], int64, on the generator's device."""
    return _draw(lambda shape, **more: torch.randint(low, high, shape, **more), (size,), rng)


def noise_like(x: Tensor, rng: Random) -> Tensor:
    """Standard normal, float64, of the shape of x, on the generator's device."""
    return _draw(torch.randn, x.shape, rng, dtype=torch.float64)


def _draw(draw: Callable[..., Tensor], shape: Sequence[int], rng: Random, dtype: torch.dtype | None = None) -> Tensor:
    more = {} if dtype is None else {"dtype": dtype}
    if isinstance(rng, torch.Generator):
        return draw(tuple(shape), generator=rng, device=rng.device, **more)
    size = shape[0]
    whole = draw((size * rng.ranks, *shape[1:]), generator=rng.generator, device=rng.device, **more)
    return whole[rng.rank * size : (rng.rank + 1) * size].clone()  # a view would keep the others' part
