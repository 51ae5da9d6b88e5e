"""Flow matching (Lipman et al. 2023): trains a teacher, or continues one, on data alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random
from jvpgraph.trainer.objectives.dmd import velocity_error
from jvpgraph.trainer.objectives.objective import Objective, Terms, objective
from jvpgraph.trainer.times import LogitNormal, Times


@dataclass(frozen=True)
class FlowMatching(Objective):
    """The velocity of the data, without a teacher."""

    name: ClassVar[str] = "flow_matching"
    takes_tangent: ClassVar[bool] = False
    sampler: ClassVar[str] = "flow"
    times: Times = field(default_factory=LogitNormal)  # SD3

    @property
    def knows_second_time(self) -> bool:
        return True  # r = t is what its sampler takes

    @property
    def asks_teacher(self) -> bool:
        return False


@objective
def flow_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: FlowMatching,
) -> Terms:
    """Sum over the latent of (F - v)^2, float64; the teacher is not used."""
    return {"loss": velocity_error(student, batch, config.times, rng)}
