"""Discrete consistency's variants: other grids and steps of the teacher, other targets and losses, segments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from jvpgraph.trainer.objectives import DCM
from jvpgraph.trainer.objectives.dcm import dcm_loss, euler_step, stochastic_step, teacher_step
from jvpgraph.trainer.times import flow_time
from jvpgraph.trainer.trigflow import add_noise, expand_like
from tests.gaussian import (
    STD,
    Constant,
    GaussianConsistency,
    GaussianFlow,
    Shifted,
    gaussian_batch,
    images,
    seeded,
    variance,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def loss(model: nn.Module, config: DCM, size: int = 64) -> float:
    return dcm_loss(model, GaussianFlow(), gaussian_batch(size, seeded(1)), seeded(2), config)["loss"].mean().item()


def test_a_jittered_grid_has_all_times_and_neighbours_a_step_below() -> None:
    config = DCM(teacher_steps=8, shift=3.0, jitter=True)
    t, below, end = config.draw(4000, seeded(3))
    place = flow_time(t) / (3 - 2 * flow_time(t))  # the inverse of the shift
    assert place.std().item() == pytest.approx(12**-0.5, rel=0.03)
    lower = flow_time(below) / (3 - 2 * flow_time(below))
    torch.testing.assert_close(lower, (place - 1 / 8).clamp(min=0))
    assert not end.any()
    assert loss(GaussianConsistency(), DCM(teacher_steps=1000, jitter=True)) < 1e-9


def test_substeps_make_the_teachers_step_more_exact() -> None:
    config = DCM(teacher_steps=8)
    t, below, _ = config.draw(64, seeded(4))
    x = images(64, seeded(5))
    exact = x * expand_like((variance(below) / variance(t)).sqrt(), x)

    def error(substeps: int) -> float:
        found = teacher_step(GaussianFlow(), x, t, below, {}, seeded(6), DCM(teacher_steps=8, substeps=substeps))
        return (found - exact).abs().max().item()

    assert error(8) < error(1) / 6
    assert loss(GaussianConsistency(), DCM(teacher_steps=8, substeps=8)) < loss(GaussianConsistency(), config) / 30


def test_a_stochastic_step_keeps_the_distribution_of_noised_data() -> None:
    """Given x0, where F is the velocity of the sample itself; from one noise, so that what it varies by is fresh."""
    x0, eps = torch.full((20_000, 1, 1, 1), 0.7, dtype=torch.float64), torch.randn(1, generator=seeded(7)).double()
    t, below = torch.full((20_000,), 1.2, dtype=torch.float64), torch.full((20_000,), 0.9, dtype=torch.float64)
    x = add_noise(x0, eps.expand_as(x0), t)
    F = expand_like(t.cos(), x0) * eps - expand_like(t.sin(), x0) * x0
    fresh = torch.randn(x.shape, generator=seeded(8), dtype=torch.float64)
    torch.testing.assert_close(stochastic_step(F, x, t, below, fresh, 0.0), euler_step(F, x, t, below))
    noises = torch.randn(x.shape, generator=seeded(9), dtype=torch.float64)
    several = add_noise(x0, noises, t)
    F = expand_like(t.cos(), x0) * noises - expand_like(t.sin(), x0) * x0
    for share in (0.0, 0.5, 1.0):
        found = stochastic_step(F, several, t, below, fresh, share)
        assert found.mean().item() == pytest.approx(0.7 * below.cos()[0].item(), abs=0.02)
        assert found.std().item() == pytest.approx(below.sin()[0].item(), rel=0.02)
    correlation = [
        torch.corrcoef(torch.stack([fresh.flatten(), stochastic_step(F, several, t, below, fresh, s).flatten()]))[0, 1]
        for s in (0.0, 0.5, 1.0)
    ]
    assert abs(correlation[0]) < 0.02 < correlation[1] < correlation[2]


def test_the_target_can_be_the_averages() -> None:
    """The average is entered for the target alone, which is then its answer."""
    average, student = images(8, seeded(10)), Constant(images(8, seeded(11)))
    own, entered = student.x0.detach().clone(), []

    @contextmanager
    def averaged() -> Iterator[None]:
        entered.append(torch.is_grad_enabled())
        student.x0.data.copy_(average)
        yield
        student.x0.data.copy_(own)

    batch = gaussian_batch(8, seeded(12))
    terms = dcm_loss(student, GaussianFlow(), batch, seeded(13), DCM(target="ema"), averaged=averaged)
    assert entered == [False]
    torch.testing.assert_close(terms["loss"], (own - average).square().flatten(1).sum(1))
    own_target = dcm_loss(student, GaussianFlow(), batch, seeded(13), DCM(), averaged=averaged)
    assert own_target["loss"].max() < 1e-20


def test_huber_is_the_square_root_of_large_errors() -> None:
    batch, student = gaussian_batch(8, seeded(14)), GaussianFlow()
    squares, huber = (
        dcm_loss(student, GaussianFlow(), batch, seeded(15), DCM(teacher_steps=4, huber=c)) for c in (None, 0.1)
    )
    torch.testing.assert_close(huber["error"], squares["loss"])
    torch.testing.assert_close(huber["loss"], (squares["loss"] + 0.01).sqrt() - 0.1)


class ToEnds(nn.Module):
    """The F with which an Euler step from t lands on the trajectory's place at the end of t's segment."""

    def __init__(self, config: DCM) -> None:
        super().__init__()
        length = config.teacher_steps // config.segments
        self.ends = config.grid(CPU)[::length].contiguous()

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        end = self.ends[(torch.searchsorted(self.ends, t - 1e-9) - 1).clamp(min=0)]
        angle, ratio = t - end, (variance(end) / variance(t)).sqrt()
        still = angle.abs() < 1e-6
        return x * expand_like(torch.where(still, 0, (angle.cos() - ratio) / torch.where(still, 1, angle.sin())), x)


@pytest.mark.parametrize("jitter", [False, True])
def test_segments_have_ends_of_their_own(jitter: bool) -> None:
    config = DCM(teacher_steps=1000, segments=4, shift=2.0, jitter=jitter)
    assert loss(ToEnds(config), config) < 1e-9
    assert loss(GaussianConsistency(), config) > 1e-6
    t, below, end = config.draw(4000, seeded(16))
    ends = config.grid(CPU)[::250]
    assert torch.isin(end, ends).all()
    assert len(end.unique()) == 4
    assert (end <= below).all()
    assert (below < t).all()


def test_a_student_of_segments_is_sampled_by_as_many_euler_steps() -> None:
    config = DCM(segments=4, shift=2.0)
    assert (config.sampler, DCM().sampler) == ("flow", "consistency")
    config.check_sampling([4], 2.0)
    DCM().check_sampling([1, 2, 4], 1.0)
    for steps, shift in (([1, 4], 2.0), ([4], 1.0)):
        with pytest.raises(ValueError, match=r"set sampling.steps to \[4\] and sampling.shift to 2"):
            config.check_sampling(steps, shift)
    x = images(64, seeded(17))
    grid = config.grid(CPU)[::12].flip(0)
    student = ToEnds(config)
    for t, end in pairwise(grid):
        x = euler_step(student(x, t.expand(64), {}), x, t.expand(64), end.expand(64))
    torch.testing.assert_close(x, STD * images(64, seeded(17)))


def test_the_gradient_of_a_segment_is_that_of_its_end() -> None:
    batch, config = gaussian_batch(8, seeded(18)), DCM(segments=4)
    student = Shifted(GaussianFlow(), 8)
    terms = dcm_loss(student, GaussianFlow(), batch, seeded(19), config)
    terms["loss"].sum().backward()
    t, _, end = config.draw(8, seeded(19))
    gradient = student.shift.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(gradient, 2 * terms["loss"].detach().sqrt() * (t - end).sin())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"segments": 5}, "teacher_steps is 48 and must be a multiple of segments, 5"),
        ({"noise": 1.5}, r"noise is 1.5 and must be in \[0, 1\]"),
        ({"huber": 0.0}, "huber is 0.0 and must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DCM(**settings)
