"""MeanFlow's variants against the average velocity of Gaussian data: no teacher, guidance, differences first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.objectives import MeanFlow
from jvpgraph.trainer.objectives.mean_flow import Curriculum, mean_flow_loss, ordered_times
from jvpgraph.trainer.times import ShiftedUniform, flow_time
from jvpgraph.trainer.trigflow import Guided, expand_like
from tests.gaussian import STD, ExactDual, GaussianAverage, GaussianFlow, gaussian_batch, seeded, variance

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ShiftedUniform(shift=1.0)


class Scaled(nn.Module):
    """A model times a parameter, in whose gradient the errors of all samples come together."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, *args: Tensor) -> Tensor:
        return self.factor * self.model(*args)


class Velocity(GaussianFlow):
    """What a student is at first: the teacher, whatever r."""

    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args[:3])


def slope(model: nn.Module, factor: float, config: MeanFlow, batch: Batch, teacher: nn.Module) -> float:
    student = Scaled(model, factor)
    mean_flow_loss(ExactDual(student), teacher, batch, seeded(2), config)["loss"].mean().backward()
    return student.factor.grad.item()


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_without_a_teacher_the_average_velocity_is_stationary(own: float) -> None:
    """u_target is linear in eps - x0, whose mean given z is the velocity."""
    config = MeanFlow(velocity="data", own_direction=own, times=PLAIN, instant_share=0.25, power=0.0)
    batch = gaussian_batch(10_000, seeded(1))
    exact, wrong = (slope(GaussianAverage(), factor, config, batch, nn.Identity()) for factor in (1.0, 1.5))
    assert abs(exact) < 0.02 * abs(wrong)


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_the_noise_of_the_target_is_what_the_direction_makes_it(own: float) -> None:
    """Of v + n the tangent has (1 - own) n: left is n - (1 - own) (s - r) du/dz n, with (s - r) du/dz = 1 - z_r / z.

    n is what eps - x0 varies by, given z: STD^2 / ((1 - s)^2 STD^2 + s^2) of each of 16 numbers.
    """
    config = MeanFlow(velocity="data", own_direction=own, times=PLAIN, instant_share=0.0, power=0.0)
    batch = gaussian_batch(10_000, seeded(3))
    terms = mean_flow_loss(ExactDual(GaussianAverage()), nn.Identity(), batch, seeded(4), config)
    t, r = ordered_times(10_000, config, seeded(4))
    s = flow_time(t)
    ratio = (variance(r) / variance(t)).sqrt() * (t.cos() + t.sin()) / (r.cos() + r.sin())
    of_velocity = STD**2 / ((1 - s) ** 2 * STD**2 + s**2)
    expected = 16 * (1 - (1 - own) * (1 - ratio)) ** 2 * of_velocity
    assert terms["error"].mean().item() == pytest.approx(expected.mean().item(), rel=0.02)


OMEGA, KAPPA, BROAD = 1.5, 0.4, 1.3


class GuidedFlow(nn.Module):
    """The fixed point of omega v + kappa u + (1 - omega - kappa) u_negative, and u_negative for label 10."""

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], r: Tensor) -> Tensor:
        given, without = GaussianFlow()(x, t, {}), GaussianFlow(BROAD)(x, t, {})
        scale = torch.where(cond["labels"] == 10, 0.0, OMEGA / (1 - KAPPA))
        return without + expand_like(scale, x) * (given - without)


def test_guidance_is_inside_of_the_target() -> None:
    config = MeanFlow(velocity="data", guidance=OMEGA, guidance_mix=KAPPA, instant_share=1.0, power=0.0, times=PLAIN)
    assert config.needs_negative
    batch = Batch(gaussian_batch(20_000, seeded(5)).x0, {"labels": torch.zeros(20_000, dtype=torch.long)})
    teacher = Guided(nn.Identity(), 1.0, {"labels": torch.tensor([10])})

    class Learns(nn.Module):
        """Only what is asked with the label is scaled."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], r: Tensor) -> Tensor:
            F = GuidedFlow()(x, t, cond, r)
            return torch.where(expand_like(cond["labels"] == 10, F), F, self.factor * F)

    def gradient(factor: float) -> float:
        student = Learns(factor)
        mean_flow_loss(ExactDual(student), teacher, batch, seeded(6), config)["loss"].mean().backward()
        return student.factor.grad.item()

    assert abs(gradient(1.0)) < 0.03 * abs(gradient(1.1))


def test_samples_count_alike_beside_a_teacher() -> None:
    """By default: those with r = t, where a student begins with next to no error, do not outweigh the others."""
    batch, teacher = gaussian_batch(256, seeded(11)), GaussianFlow()

    def share(power: float | None) -> float:
        """Of the samples with r = t in what pulls on the student."""
        config = MeanFlow(times=PLAIN, instant_share=0.25, power=power, floor=1e-9)
        student = Scaled(Velocity(), 1.001)
        error = mean_flow_loss(ExactDual(student), teacher, batch, seeded(12), config)["error"]
        t, r = ordered_times(len(batch), config, seeded(12))
        pulls = error.sqrt() * (error + config.floor) ** -config.exponent
        return (pulls[t == r].sum() / pulls.sum()).item()

    assert share(None) == pytest.approx(0.25, abs=0.05)
    assert share(1.0) > 0.9
    assert MeanFlow(velocity="data").exponent == 1


def test_differences_become_the_derivative() -> None:
    """AlphaFlow's target of the exact average velocity is off by O(alpha), and for alpha = 1 it is the velocity."""
    batch = gaussian_batch(64, seeded(7))

    def error(alpha: float, model: nn.Module) -> float:
        config = MeanFlow(times=PLAIN, instant_share=0.0, discrete=Curriculum(first=alpha, end=10))
        terms = mean_flow_loss(ExactDual(model), GaussianFlow(), batch, seeded(8), config, iteration=10)
        return terms["error"].mean().item()

    exact = GaussianAverage()
    assert error(1e-2, exact) / error(1e-3, exact) == pytest.approx(100, rel=0.1)
    assert error(1e-3, exact) < 1e-4 * error(1e-3, Scaled(exact, 1.1))
    assert error(1.0, Velocity()) < 1e-20
    assert error(1.0, exact) > 0.1


def test_after_its_end_the_curriculum_is_mean_flow() -> None:
    config, batch = MeanFlow(times=PLAIN, discrete=Curriculum(first=0.5, end=10)), gaussian_batch(16, seeded(9))
    model = Scaled(GaussianAverage(), 1.1)
    losses = {
        iteration: mean_flow_loss(ExactDual(model), GaussianFlow(), batch, seeded(10), config, iteration=iteration)
        for iteration in (10, 11)
    }
    plain = mean_flow_loss(ExactDual(model), GaussianFlow(), batch, seeded(10), MeanFlow(times=PLAIN))
    assert torch.equal(losses[11]["error"], plain["error"])
    assert not torch.equal(losses[10]["error"], plain["error"])


def test_the_curriculum_falls_from_one_to_zero() -> None:
    curriculum = Curriculum(begin=100, end=300)
    alphas = [curriculum.alpha(i) for i in (1, 100, 150, 200, 250, 300, 301)]
    assert alphas[0] == alphas[1] == 1
    assert alphas[-2:] == [0, 0]
    assert alphas[3] == 0.5
    assert alphas == sorted(alphas, reverse=True)
    assert [Curriculum(first=0.1, end=5).alpha(i) for i in (1, 5, 6)] == [0.1, 0.1, 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"own_direction": 1.0}, "are of velocity: data"),
        ({"guidance": 2.0}, "its guidance is set under guidance"),
        ({"velocity": "data", "own_direction": 1.5}, "own_direction is 1.5"),
        ({"velocity": "data", "guidance_mix": 1.0}, "guidance_mix 1.0: at most 1, and below 1"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MeanFlow(**settings)
    with pytest.raises(ValueError, match="begin is 5 and must be below end, 5"):
        Curriculum(begin=5, end=5)
