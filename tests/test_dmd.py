"""DMD's variants and sums of terms, against what is known of Gaussian data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.objectives import DMD, RCM, SCM, Data, Term, WeightedTerms, loss_of
from jvpgraph.trainer.objectives.data import data_loss
from jvpgraph.trainer.objectives.dmd import (
    dmd_loss,
    fake_score_error,
    image_at,
    score_gradient,
    velocity_error,
    velocity_error_from,
)
from jvpgraph.trainer.objectives.simulation import Simulation, noise_from, simulate_backward
from jvpgraph.trainer.objectives.terms import terms_loss
from jvpgraph.trainer.times import ShiftedUniform, flow_time
from jvpgraph.trainer.trigflow import HALF_PI, expand_like
from tests.gaussian import (
    STD,
    Constant,
    ExactDual,
    GaussianAverage,
    GaussianConsistency,
    GaussianFlow,
    gaussian_batch,
    images,
    seeded,
    variance,
)
from tests.tiny_runs import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ShiftedUniform(shift=1.0)
OF_RCM = (1.5042, 1.3734, 1.0304)  # radians of rectified-flow times 15/16, 5/6 and 5/8


class Watched(nn.Module):
    """A model and the times that it was asked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        self.times.append(t)
        return self.model(x, t, *rest)


class GuidedTo(nn.Module):
    """A teacher with guidance: it and its `model` imply one clean image each."""

    def __init__(self, guided: Tensor, plain: Tensor) -> None:
        super().__init__()
        self.guided, self.model = Watched(Constant(guided)), Watched(Constant(plain))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.guided(x, t, cond)


# ---------------------------------------------------------------- simulation


def test_jumps_of_the_exact_average_velocity_land_on_the_flow_map() -> None:
    batch = gaussian_batch(16, seeded(1))
    for steps in (1, 2, 4):
        found = simulate_backward(GaussianAverage(), batch, steps, seeded(2), Simulation(PLAIN, rollout="jumps"))
        torch.testing.assert_close(found.x, STD * images(16, seeded(2)))


def test_a_simulation_stops_at_its_fixed_times_which_are_those_of_rcm() -> None:
    student, batch = Watched(GaussianConsistency()), gaussian_batch(2048, seeded(3))
    found = simulate_backward(student, batch, 4, seeded(4), Simulation(PLAIN, fixed_times=OF_RCM))
    assert [t.unique().item() for t in student.times] == [HALF_PI, *OF_RCM]
    assert found.x.std().item() == pytest.approx(STD, rel=0.02)
    assert (found.t == OF_RCM[-1]).all()
    s = flow_time(torch.tensor(OF_RCM, dtype=torch.float64))
    torch.testing.assert_close(s, torch.tensor([15 / 16, 5 / 6, 5 / 8]).double(), atol=1e-4, rtol=0)


def test_a_phase_ends_where_it_should_with_the_variance_of_that_time() -> None:
    batch = gaussian_batch(2048, seeded(5))
    first = simulate_backward(GaussianConsistency(), batch, 3, seeded(6), Simulation(PLAIN, end=0.9))
    assert first.x.std().item() == pytest.approx(variance(torch.tensor(0.9)).sqrt().item(), rel=0.02)
    student = Watched(GaussianConsistency())
    second = simulate_backward(student, batch, 3, seeded(6), Simulation(PLAIN, start=0.9))
    assert second.x.std().item() == pytest.approx(STD, rel=0.02)
    assert max(t.max().item() for t in student.times) == 0.9


# ---------------------------------------------------------------- re-noising


def test_guidance_and_matching_have_times_of_their_own() -> None:
    student, fake = Constant(images(6, seeded(7))), Constant(images(6, seeded(8)))
    teacher = GuidedTo(images(6, seeded(9)), images(6, seeded(10)))
    config = DMD(times=PLAIN, guidance_times=PLAIN, fixed_times=OF_RCM)
    terms = dmd_loss(student, teacher, gaussian_batch(6, seeded(11)), seeded(12), config, iteration=3, fake=fake)
    terms["loss"].sum().backward()
    x, plain, guided = student.x0, teacher.model.model.x0, teacher.guided.model.x0
    expected = score_gradient(x, fake.x0, plain) + score_gradient(x, plain, guided)
    torch.testing.assert_close(student.x0.grad, 2 * expected.detach())
    matching, guidance = teacher.model.times
    assert not torch.equal(matching, guidance)
    assert torch.equal(guidance, teacher.guided.times[0])
    assert guidance.max() < OF_RCM[-1]  # where the last of four steps began


def test_missing_noise_gives_the_variance_of_the_later_time() -> None:
    t = torch.linspace(0.9, HALF_PI, 9, dtype=torch.float64)
    x, eps = torch.ones(9, 1, dtype=torch.float64), torch.ones(9, 1, dtype=torch.float64)
    a, b = noise_from(x, 0.9, 0 * eps, t), noise_from(0 * x, 0.9, eps, t)
    at_low = variance(torch.tensor(0.9, dtype=torch.float64))
    torch.testing.assert_close((a**2 * at_low + b**2).flatten(), variance(t))


def test_images_at_the_end_of_a_phase_differ_as_the_scores_do() -> None:
    """By sin(t - end) tan(t) (score_fake - score_teacher), and score = -x / V for a Gaussian."""
    t, x = torch.linspace(0.95, 1.5, 8, dtype=torch.float64), images(8, seeded(13))
    at_end = [image_at(0.9, GaussianFlow(std)(x, t, {}), x, t) for std in (1.3, 0.6)]
    scores = [-x / expand_like(variance(t, std), x) for std in (1.3, 0.6)]
    factor = expand_like((t - 0.9).sin() * t.tan(), x)
    torch.testing.assert_close(at_end[0] - at_end[1], factor * (scores[0] - scores[1]))


@pytest.mark.parametrize("end", [0.4, 1.2])
def test_score_matching_within_a_sub_interval_finds_the_velocity_of_the_whole(end: float) -> None:
    """The factor of the exact velocity that fits best, by least squares: the loss is a parabola in it."""
    batch = gaussian_batch(8192, seeded(14), variance(torch.tensor(end)).sqrt().item())

    class Fake(GaussianFlow):
        factor = 1.0

        def forward(self, *args: Any) -> Tensor:
            return self.factor * super().forward(*args)

    fake, losses = Fake(), []
    for fake.factor in (0.0, 1.0, 2.0):
        losses.append(velocity_error_from(end, fake, batch, PLAIN, seeded(15)).mean().item())
    low, middle, high = losses
    best = (3 * low - 4 * middle + high) / (2 * (low - 2 * middle + high))
    assert best == pytest.approx(1.0, abs=0.02)


def test_the_sub_interval_that_is_everything_is_flow_matching() -> None:
    batch = gaussian_batch(64, seeded(16))
    whole = velocity_error(GaussianFlow(), batch, PLAIN, seeded(17))
    torch.testing.assert_close(velocity_error_from(1e-10, GaussianFlow(), batch, PLAIN, seeded(17)), whole)


@pytest.mark.parametrize("std", [0.3, 0.8])
def test_a_phase_pulls_samples_towards_the_variance_of_its_end(std: float) -> None:
    """A student whose data are narrower or wider than the teacher's, beside a fake score that is exact for it."""
    config = DMD(times=PLAIN, end=0.9)
    batch, rng = gaussian_batch(512, seeded(18)), seeded(19)
    student = Constant(std * images(512, seeded(20)))
    terms = dmd_loss(student, GaussianFlow(), batch, rng, config, iteration=0, fake=GaussianFlow(std))
    terms["loss"].sum().backward()
    stretched = (student.x0.grad * student.x0).sum()  # above 0: the step makes them smaller
    assert stretched > 0 if std > STD else stretched < 0
    loss = fake_score_error(GaussianFlow(std), student, batch, seeded(21), config, 0)
    other = fake_score_error(GaussianFlow(), student, batch, seeded(21), config, 0)
    assert loss.mean() < other.mean()


# ---------------------------------------------------------------- terms

SUM = WeightedTerms((Term(SCM(tangent_warmup=4)), Term(DMD(times=PLAIN), weight=0.25, after=4)))


@pytest.mark.parametrize("iteration", [3, 5])
def test_scm_and_dmd_as_terms_are_rcm_to_the_bit(iteration: int) -> None:
    rcm = RCM(weight=0.25, scm=SCM(tangent_warmup=4), dmd=DMD(times=PLAIN))
    batch, student, fake = gaussian_batch(8, seeded(21)), ExactDual(GaussianConsistency()), GaussianFlow(0.7)
    one, other = (
        loss_of(config)(student, GaussianFlow(), batch, seeded(22), config, iteration=iteration, fake=fake, critic=None)
        for config in (rcm, SUM)
    )
    assert torch.equal(one["loss"], other["loss"])
    assert set(other) == set(one) | {"scm"}
    assert SUM.fake_updates(iteration) == rcm.fake_updates(iteration)
    assert SUM.fake_score == rcm.fake_score
    assert SUM.needs_data


def test_terms_share_a_simulation_and_have_names_of_their_own() -> None:
    both = WeightedTerms((Term(DMD(times=PLAIN)), Term(DMD(times=PLAIN, guidance_times=PLAIN), weight=0.5)))
    student, fake = Watched(Constant(images(4, seeded(23)))), GaussianFlow(0.7)
    teacher = GuidedTo(images(4, seeded(24)), images(4, seeded(25)))
    terms = terms_loss(student, teacher, gaussian_batch(4, seeded(26)), seeded(27), both, iteration=4, fake=fake)
    assert len(student.times) == 1
    logged = ("score_gap", "score_error", "score_error_teacher")
    assert set(terms) == {"loss", "dmd_1", "dmd_2", *(f"{name}_{i}" for name in logged for i in (1, 2))}
    torch.testing.assert_close(terms["loss"], terms["dmd_1"] + 0.5 * terms["dmd_2"])
    assert not both.needs_data


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"name": "terms", "terms": []}, "nothing trains the student"),
        ({"name": "terms", "terms": [{"objective": "scm", "after": 50}]}, "in the first updates"),
        ({"name": "terms", "terms": [{"objective": "scm"}, {"objective": "mean_flow"}]}, "Take scm out"),
        ({"name": "terms", "terms": [{"objective": {"name": "terms", "terms": [{"objective": "scm"}]}}]}, "inside of"),
        (
            {
                "name": "terms",
                "terms": [{"objective": "dmd"}, {"objective": {"name": "dmd", "simulation_steps": 2}}],
            },
            "give both the same settings",
        ),
        ({"name": "dmd", "fixed_times": [1.0]}, "give more times, or fewer steps"),
        ({"name": "dmd", "fixed_times": [1.0, 1.2, 0.4]}, "radians that fall"),
        ({"name": "dmd", "start": 0.9, "end": 0.9}, "0 <= end < start"),
        ({"name": "rcm", "dmd": {"rollout": "jumps"}}, "set it to renoise"),
    ],
)
def test_what_does_not_go_together_is_refused_as_it_is_read(objective: dict[str, Any], says: str) -> None:
    with pytest.raises(settings.SettingsError, match=says):
        settings.from_dict(RunConfig, {**TINY, "stages": [{"steps": 1, "objective": objective}]})


def phases(*ends: tuple[float, float]) -> RunConfig:
    stages = [{"steps": 1, "objective": {"name": "dmd", "start": start, "end": end}} for start, end in ends]
    return settings.from_dict(RunConfig, {**TINY, "stages": stages})


def test_phases_that_leave_a_gap_are_refused() -> None:
    assert len(phases((HALF_PI, 1.03), (1.03, 0.0)).stages) == 2
    assert len(phases((HALF_PI, 1.03), (HALF_PI, 0.0)).stages) == 2
    with pytest.raises(settings.SettingsError, match=r"stages\.1\.objective starts at 0\.6 radians"):
        phases((HALF_PI, 1.03), (0.6, 0.0))


def test_the_data_term_is_least_at_the_mean_of_the_data() -> None:
    batch = gaussian_batch(4096, seeded(30))

    def loss(factor: float) -> float:
        class Student(GaussianFlow):
            def forward(self, *args: Any) -> Tensor:
                return factor * super().forward(*args)

        return data_loss(Student(), GaussianFlow(), batch, seeded(31), Data(times=PLAIN))["loss"].mean().item()

    assert loss(1.0) < min(loss(0.9), loss(1.1))
