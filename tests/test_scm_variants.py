"""sCM in other coordinates, without a teacher, and at points of the teacher's own trajectories."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jvpgraph.trainer.objectives import RCM, SCM
from jvpgraph.trainer.objectives.dcm import walked
from jvpgraph.trainer.objectives.mean_flow import to_flow
from jvpgraph.trainer.objectives.scm import scm_loss
from jvpgraph.trainer.times import ShiftedUniform, flow_time, from_flow_time
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like
from tests.gaussian import (
    ExactDual,
    GaussianConsistency,
    GaussianFlow,
    Shifted,
    gaussian_batch,
    images,
    seeded,
    variance,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ShiftedUniform(shift=1.0)


def norms(model: nn.Module, config: SCM) -> Tensor:
    batch = gaussian_batch(32, seeded(1))
    return scm_loss(ExactDual(model), GaussianFlow(), batch, seeded(2), config, iteration=1)["target_norm"]


@pytest.mark.parametrize("settings", [{"coordinates": "rf"}, {"points": "trajectory"}])
def test_the_exact_consistency_function_is_the_fixed_point(settings: dict) -> None:
    config = SCM(times=PLAIN, **settings)
    assert norms(GaussianConsistency(), config).max() < 1e-9
    assert norms(GaussianFlow(), config).max() > 0.1


def test_in_rectified_flow_the_average_velocity_to_the_data_moves() -> None:
    """By df/ds, f = z - s u along the trajectory, which scales z like sqrt(V(t)) / (cos(t) + sin(t))."""
    batch, config, h, model = gaussian_batch(16, seeded(3)), SCM(times=PLAIN, coordinates="rf"), 1e-6, GaussianFlow()
    student = Shifted(model, 16)
    terms = scm_loss(ExactDual(student), GaussianFlow(), batch, seeded(4), config, iteration=1)
    terms["loss"].sum().backward()

    rng = seeded(4)
    t = PLAIN.draw(16, rng)
    x = add_noise(batch.x0, images(16, rng), t)

    def f(step: float) -> Tensor:
        then = from_flow_time(flow_time(t) + step)
        moved = x * expand_like((variance(then) / variance(t)).sqrt(), x)
        return clean_image(model(moved, then, {}), moved, then)

    g = (f(h) - f(-h)) / (2 * h)
    norm = g.flatten(1).norm(dim=1)
    torch.testing.assert_close(terms["target_norm"], norm, rtol=1e-6, atol=1e-7)
    # u = a x + k F, so that the gradient in F is k times the one in u
    k = expand_like(t.cos() + t.sin(), x)
    torch.testing.assert_close(student.shift.grad, -2 * k * g / expand_like(norm + 0.1, x), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(to_flow(x, clean_image(x, x, t), t)[0] * k, x)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, *args: Tensor) -> Tensor:
        return self.factor * GaussianConsistency()(*args)


def test_without_a_teacher_the_consistency_function_is_stationary() -> None:
    """g is linear in a sample's velocity, whose mean given x_t is the flow's; with a large floor the loss is so too."""
    config = SCM(times=PLAIN, velocity="data", tangent_floor=1e6)

    def slope(factor: float) -> float:
        student = Scaled(factor)
        batch = gaussian_batch(20_000, seeded(5))
        scm_loss(ExactDual(student), nn.Identity(), batch, seeded(6), config, iteration=1)["loss"].mean().backward()
        return student.factor.grad.item()

    assert abs(slope(1.0)) < 0.03 * abs(slope(1.5))


def test_points_of_the_trajectory_are_distributed_as_noised_data() -> None:
    t = torch.linspace(0.1, 1.5, 8, dtype=torch.float64)
    noise = images(8, seeded(7))
    exact = noise * expand_like(variance(t).sqrt(), noise)  # from t = pi/2, where V = 1
    start = torch.full_like(t, torch.pi / 2)
    few, many = (walked(GaussianFlow(), noise, start, t, {}, steps) for steps in (8, 800))
    assert (many - exact).abs().max() < 0.01
    assert (few - exact).abs().max() > 0.02
    assert torch.equal(walked(GaussianFlow(), noise, start, start, {}, 4), noise)


def test_points_of_the_trajectory_need_no_data() -> None:
    assert SCM().needs_data
    assert not SCM(points="trajectory").needs_data
    assert not RCM(scm=SCM(points="trajectory")).needs_data
    batch = gaussian_batch(4, seeded(8))
    losses = []
    for factor in (1.0, 100.0):  # of latents that only lend their shape
        other = type(batch)(factor * batch.x0, {})
        config = SCM(points="trajectory")
        losses.append(scm_loss(ExactDual(GaussianFlow()), GaussianFlow(), other, seeded(9), config, iteration=1))
    assert torch.equal(losses[0]["target_norm"], losses[1]["target_norm"])
    with pytest.raises(ValueError, match="set points to data"):
        SCM(points="trajectory", velocity="data")
