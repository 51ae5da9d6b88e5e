"""FreeFlow: the flow map from noise, without data (Tong et al. 2025, arXiv 2511.19428).

Where the student's jump from noise ends, and how that end moves with r, are

    X(eps, r) = sin(r) eps - cos(r) F(eps, pi/2, r),    dX/dr = F_T(X, r)

(flow_map.py with t = pi/2). What the trajectory passes through is predicted and never given: noise is all it takes. The
paper's correction of the errors that this adds up is `dmd` on the end of one jump: see docs/trainer.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.flow_map import along_end
from jvpgraph.trainer.objectives.objective import Objective, Terms, listed, objective
from jvpgraph.trainer.objectives.scm import moved
from jvpgraph.trainer.ranges import positive
from jvpgraph.trainer.times import ShiftedUniform, Times
from jvpgraph.trainer.trigflow import HALF_PI


@dataclass(frozen=True)
class FreeFlow(Objective):
    """Jumps from noise to any time; needs a network that takes a second time, and no data."""

    name: ClassVar[str] = "free_flow"
    trains_plainly: ClassVar[bool] = False
    sampler: ClassVar[str] = "mean_flow"
    second_time: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    times: Times = field(default_factory=lambda: ShiftedUniform(shift=1.0))  # of the end of the jump
    tangent_floor: float = 0.1  # c in g / (||g|| + c); sCM
    tangent_warmup: ClassVar[int] = 0

    def __post_init__(self) -> None:
        positive(self, "tangent_floor")

    @property
    def span(self) -> tuple[float, float]:
        return HALF_PI, super().span[1]

    def check_sampling(self, steps: Collection[int], shift: float, gamma: float = 0.0) -> None:
        if set(steps) != {1}:
            raise ValueError(
                f"free_flow trains jumps from noise alone, which samples are one of; not {listed(steps)}: set "
                "sampling.steps to [1], or take flow_map"
            )


@objective
def free_flow_loss(student: nn.Module, teacher: nn.Module, batch: Batch, rng: Random, config: FreeFlow) -> Terms:
    """Sum over the latent of (F - F_sg - g)^2, g = F_T(X, r) - dX/dr normalised; float64.

    Args:
        student: the dual of a TrigFlow model whose network takes a second time.
        teacher: gives the velocity F_T, guidance included.
        batch: conditions to sample; its latents only lend their shape.
        rng: times and noise.
    """
    x = noise_like(batch.x0, rng)
    r = config.times.draw(len(batch), rng)
    t = torch.full_like(r, math.pi / 2)
    F, F_r = student(x, t, batch.cond, r, tangents={"r": torch.ones_like(r)})
    with torch.no_grad():
        F_T = teacher(euler_step(F, x, t, r), r, batch.cond)
    return moved(F, F_r, F_T - along_end(F.detach(), F_r, x, t - r), config)
