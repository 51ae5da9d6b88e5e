"""Flow maps: where the teacher's trajectory through x_t is at another time r (Boffi et al. 2024).

The student's jump and its derivatives along the trajectory and along r are

    X(x_t, t, r) = cos(t - r) x_t - sin(t - r) F(x_t, t, r)
    dX/dt = -cos(t - r) (F - F_T(x_t, t)) - sin(t - r) (x_t + dF/dt),   dF/dt = (dF/dx) F_T + (partial dF/dt)
    dX/dr = sin(t - r) x_t + cos(t - r) F - sin(t - r) (partial dF/dr)

and each of two equations, with X = x_t at r = t, holds for the exact map alone:

    dX/dt = 0                     eulerian: the start may move along the trajectory (Align Your Flow, 2025: AYF-EMD)
    dX/dr = F_T(X, r)             lagrangian: the end moves with the teacher's velocity there

Both move F by a target that has no gradient, as sCM does, of which eulerian with r = 0 is a case. `terminal` takes the
square of lagrangian's residual, weighted to be as long, with the gradient of dX/dr (terminal velocity matching, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.objective import Terms, objective
from jvpgraph.trainer.objectives.scm import moved, tangent_target, warmed
from jvpgraph.trainer.objectives.two_times import TwoTimes, ordered_times
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import Ranges, ShiftedUniform, Times
from jvpgraph.trainer.trigflow import add_noise, along_trajectory, expand_like, velocity_of


@dataclass(frozen=True)
class FlowMap(TwoTimes):
    """Jumps from any time to any lower one; needs a network that takes a second time."""

    name: ClassVar[str] = "flow_map"
    trains_plainly: ClassVar[bool] = False
    times: Times = field(default_factory=lambda: ShiftedUniform(shift=1.0))  # of both ends; jumps begin at pure noise
    method: Literal["eulerian", "lagrangian", "terminal"] = "eulerian"  # terminal trains through the tangent
    velocity: Literal["teacher", "own"] = "teacher"  # own: no teacher, F at r = t and the data's there; Boffi 2025
    tangent_warmup: int = 0  # of eulerian: student updates until dF/dt counts in full; 0: none
    tangent_floor: float = 0.1  # c in g / (||g|| + c), and in terminal's weight 1 / (||residual|| + c); sCM

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "tangent_warmup")
        positive(self, "tangent_floor")
        if self.tangent_warmup and self.method != "eulerian":
            raise ValueError(f"tangent_warmup is of eulerian, and method is {self.method}: set it to 0")
        if self.velocity == "own" and not self.instant_share:
            raise ValueError("velocity: own is learned from the data where r = t: set instant_share above 0")

    @property
    def asked(self) -> Ranges:
        ((low, high),) = super().asked
        return ((0.0 if self.clean_share and self.method != "eulerian" else low, high),)

    @property
    def asks_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def through_tangent(self) -> bool:  # type: ignore[override]
        return self.method == "terminal"


@objective
def flow_map_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: FlowMap,
    *,
    iteration: int,
) -> Terms:
    """Sum over the latent of (F - F_sg - g)^2, or of terminal's weighted squared residual; float64.

    Args:
        student: the dual of a TrigFlow model whose network takes a second time.
        teacher: gives the velocity F_T, guidance included.
        batch: real latents and their conditions.
        rng: times and noise.
        iteration: of the student, from 1; what the tangent's warm-up goes by.
    """
    t, r = ordered_times(len(batch), config, rng)
    x0 = batch.x0.double()
    eps = noise_like(x0, rng)
    x = add_noise(x0, eps, t)

    @torch.no_grad()
    def velocity(x: Tensor, t_: Tensor) -> Tensor:
        if config.velocity == "teacher":
            return teacher(x, t_, batch.cond)
        return torch.where(expand_like(t == r, x0), velocity_of(x0, eps, t), student(x, t_, batch.cond, t_))

    if config.method == "eulerian":
        F_T = velocity(x, t)
        F, F_dot = student(x, t, batch.cond, r, tangents=along_trajectory(x, t - r, F_T))
        return moved(F, F_dot, tangent_target(F.detach(), F_dot, F_T, x, t - r, warmed(config, iteration)), config)
    F, F_r = student(x, t, batch.cond, r, tangents={"r": torch.ones_like(r)})
    residual = along_end(F, F_r, x, t - r) - velocity(euler_step(F.detach(), x, t, r), r)
    if config.method == "lagrangian":
        return moved(F, F_r, -residual, config)
    squares = residual.square().flatten(1).sum(1)
    norm = squares.detach().sqrt()
    return {
        "loss": squares / (norm + config.tangent_floor),
        "target_norm": norm,
        "tangent_norm": F_r.detach().flatten(1).norm(dim=1),
    }


def along_end(F: Tensor, F_r: Tensor, x: Tensor, angle: Tensor) -> Tensor:
    """dX/dr = sin(angle) x + cos(angle) F - sin(angle) F_r; latents [B, ...], angle t - r [B] in radians."""
    cos, sin = expand_like(angle.cos(), x), expand_like(angle.sin(), x)
    return sin * (x - F_r) + cos * F
