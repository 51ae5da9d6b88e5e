"""Objectives of a network with two times: which pairs t >= r it is trained on."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from jvpgraph.trainer.noise import Random, uniform
from jvpgraph.trainer.objectives.objective import Objective, listed
from jvpgraph.trainer.ranges import not_negative
from jvpgraph.trainer.times import LogitNormal, Times, equal_steps, flow_time, from_flow_time, shifted


@dataclass(frozen=True)
class TwoTimes(Objective):
    """Some samples have an empty interval, r = t, some go all the way to the data, r = 0, the others any interval."""

    sampler: ClassVar[str] = "mean_flow"
    second_time: ClassVar[bool] = True
    times: Times = field(default_factory=LogitNormal)  # of both ends
    instant_share: float = 0.5  # samples with r = t, where the network is the velocity; AnyFlow
    clean_share: float = 0.25  # samples with r = 0, where it is the clean image; AnyFlow
    longest: float = 1.0  # t - r at most, in rectified-flow time: all intervals shrink; restricted MeanFlow

    def __post_init__(self) -> None:
        not_negative(self, "instant_share", "clean_share")
        if self.instant_share > 1:
            raise ValueError(f"instant_share is {self.instant_share} and must be in [0, 1]")
        if self.instant_share + self.clean_share > 1:
            raise ValueError(
                f"instant_share is {self.instant_share} and clean_share {self.clean_share}: together at most 1"
            )
        if not 0 < self.longest <= 1:
            raise ValueError(f"longest is {self.longest} and must be above 0, and at most 1")
        if self.longest < 1 and self.clean_share:
            raise ValueError(
                f"clean_share is {self.clean_share}, of intervals that reach to the data, and longest {self.longest}: "
                "set clean_share to 0, or longest to 1"
            )

    def check_sampling(self, steps: Collection[int], shift: float, gamma: float = 0.0) -> None:
        trained = "none" if self.instant_share == 1 else "those to r = 0 alone"
        whole = set(steps) == {1} or gamma == 1  # all jumps are to r = 0
        if self.instant_share + self.clean_share == 1 and not (whole and self.clean_share):
            raise ValueError(
                f"instant_share is {self.instant_share:g} and clean_share {self.clean_share:g}, so that of all jumps "
                f"{trained} are trained, and samples in {listed(steps)} steps make others: leave a share for these"
            )
        grids = {count: equal_steps(count, shift) for count in steps}
        lengths = [float((s[1:] - shifted(s[:-1], math.sqrt(1 - gamma**2))).max()) for s in grids.values()]
        short = [count for count, length in zip(steps, lengths) if length > self.longest + 1e-6]
        if short:
            raise ValueError(
                f"longest is {self.longest:g}, and samples in {listed(short)} steps jump {max(lengths):.3g} of "
                "rectified-flow time at once: take more steps (sampling.steps), or train a stage with longest 1 after "
                "it"
            )


def ordered_times(size: int, config: TwoTimes, rng: Random) -> tuple[Tensor, Tensor]:
    """t >= r, both [B] radians; equal for a share of the samples, and r = 0 for another."""
    first, second = config.times.draw(size, rng), config.times.draw(size, rng)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    if config.longest < 1:
        r = from_flow_time(torch.lerp(flow_time(t), flow_time(r), config.longest))
    kind = uniform(size, rng, torch.float32)
    r = torch.where(kind < config.instant_share, t, r)
    return t, torch.where(kind >= 1 - config.clean_share, 0, r)
