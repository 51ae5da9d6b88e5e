"""Objectives against what is known of Gaussian data, times against their densities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer.batch import Batch, drop_condition, expand_condition
from jvpgraph.trainer.objectives import (
    DCM,
    DMD,
    LOSSES,
    RCM,
    SCM,
    FlowMatching,
    MeanFlow,
    Objective,
    Term,
    WeightedTerms,
    loss_of,
    objective,
)
from jvpgraph.trainer.objectives.dcm import dcm_loss, euler_step
from jvpgraph.trainer.objectives.dmd import dmd_loss, fake_score_error, score_gradient
from jvpgraph.trainer.objectives.flow import flow_loss
from jvpgraph.trainer.objectives.mean_flow import mean_flow_loss, ordered_times, to_flow
from jvpgraph.trainer.objectives.rcm import rcm_loss
from jvpgraph.trainer.objectives.scm import scm_loss, tangent_target
from jvpgraph.trainer.objectives.simulation import Simulation, simulate_backward
from jvpgraph.trainer.times import LogitNormal, LogNormal, ShiftedUniform, flow_time, from_flow_time
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like
from tests.gaussian import (
    STD,
    Constant,
    ExactDual,
    GaussianAverage,
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


# ---------------------------------------------------------------- sCM


def target_of(model: nn.Module, r: float = 1.0) -> Tensor:
    """sCM's g for a Gaussian teacher at times in the interior."""
    t, x = torch.linspace(0.05, 1.5, 8, dtype=torch.float64), images(8, seeded(6))
    F_teacher = GaussianFlow()(x, t, {})
    speed = t.cos() * t.sin()
    F, F_dot = ExactDual(model)(x, t, {}, tangents={"x": expand_like(speed, x) * F_teacher, "t": speed})
    return tangent_target(F.detach(), F_dot, F_teacher, x, t, r)


def test_the_tangent_target_vanishes_at_the_exact_consistency_function() -> None:
    assert target_of(GaussianConsistency()).abs().max() < 1e-12


def test_the_tangent_target_does_not_vanish_elsewhere() -> None:
    assert target_of(GaussianFlow()).abs().max() > 1e-2


def test_the_tangent_target_is_the_derivative_of_f_along_the_trajectory() -> None:
    """g = cos(t) df/dt; the trajectory through x_t is x_t sqrt(V(t + h) / V(t))."""
    t, h = torch.linspace(0.05, 1.5, 8, dtype=torch.float64), 1e-6
    x, model = images(8, seeded(6)), GaussianFlow()  # any smooth F but the exact one

    def f(step: float) -> Tensor:
        moved = x * expand_like((variance(t + step) / variance(t)).sqrt(), x)
        return clean_image(model(moved, t + step, {}), moved, t + step)

    difference = expand_like(t.cos(), x) * (f(h) - f(-h)) / (2 * h)
    torch.testing.assert_close(target_of(model), difference, rtol=1e-7, atol=1e-8)


def test_without_the_tangent_the_target_pulls_towards_the_teacher() -> None:
    t, x = torch.linspace(0.05, 1.5, 8, dtype=torch.float64), images(8, seeded(6))
    gap = GaussianConsistency()(x, t, {}) - GaussianFlow()(x, t, {})
    torch.testing.assert_close(target_of(GaussianConsistency(), r=0.0), -expand_like(t.cos() ** 2, x) * gap)


def test_scm_loss_is_zero_only_at_the_exact_consistency_function() -> None:
    config, batch = SCM(), gaussian_batch(16, seeded(7))
    exact, wrong = (
        scm_loss(ExactDual(model), GaussianFlow(), batch, seeded(8), config, iteration=1)["loss"]
        for model in (GaussianConsistency(), GaussianFlow())
    )
    assert exact.dtype == torch.float64
    assert exact.shape == (16,)
    assert exact.max() < 1e-12
    assert wrong.max() <= 1  # a sum of squares of targets that are normalised to less than one
    assert wrong.mean() > 0.01


@pytest.mark.parametrize(("iteration", "warmup", "r"), [(7, 10, 0.7), (12, 10, 1.0), (1, 0, 1.0)])
def test_scm_gradient_is_the_normalised_target(iteration: int, warmup: int, r: float) -> None:
    """d loss / d F = -2 g, with g normalised per sample."""
    config, batch = SCM(tangent_warmup=warmup), gaussian_batch(8, seeded(9))
    student, teacher = Shifted(GaussianFlow(), 8), GaussianFlow()
    terms = scm_loss(ExactDual(student), teacher, batch, seeded(10), config, iteration=iteration)
    terms["loss"].sum().backward()

    rng = seeded(10)
    t = config.times.draw(8, rng)
    x = add_noise(batch.x0, images(8, rng), t)
    F_teacher, speed = teacher(x, t, {}), t.cos() * t.sin()
    F, F_dot = ExactDual(student)(x, t, {}, tangents={"x": expand_like(speed, x) * F_teacher, "t": speed})
    g = tangent_target(F.detach(), F_dot, F_teacher, x, t, r)
    norm = g.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(student.shift.grad, -2 * g / (norm + 0.1))
    torch.testing.assert_close(terms["target_norm"], norm.flatten())
    torch.testing.assert_close(terms["tangent_norm"], F_dot.square().sum(dim=(1, 2, 3)).sqrt())


class Mlp(nn.Module):
    """F(x, t) of single numbers x [B, 1]: the smallest network that can hold a consistency function."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        ).double()

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.layers(torch.cat([x, t.sin()[:, None], t.cos()[:, None]], dim=1))


@pytest.mark.long
def test_a_student_trained_on_a_gaussian_becomes_the_exact_consistency_function(record_property) -> None:
    """RMS distance of f to STD x_t / sqrt(V(t)) on the trajectories, beside the data's STD of 0.5."""
    student, rng, steps = Mlp(), seeded(11), 1500
    dual = jvpgraph.transform(student, backend="eager", dynamic=False)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    config = SCM(times=LogNormal(mean=0.0, std=1.2))

    def distance() -> float:
        t = torch.linspace(0.1, math.pi / 2, 64, dtype=torch.float64)
        x = torch.randn(64, 1, dtype=torch.float64, generator=seeded(12)) * variance(t).sqrt()[:, None]
        with torch.no_grad():
            f = clean_image(student(x, t, {}), x, t)
        return (f - STD * x / variance(t).sqrt()[:, None]).square().mean().sqrt().item()

    before = distance()
    for iteration in range(1, steps + 1):
        batch = Batch(STD * torch.randn(256, 1, dtype=torch.float64, generator=rng), {})
        loss = scm_loss(dual, GaussianFlow(), batch, rng, config, iteration=iteration)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    after = distance()
    record_property("rms_distance", {"before": before, "after": after})
    print(f"RMS distance to the exact consistency function: {before:.3f} before, {after:.4f} after")
    assert before > 0.15
    assert after < 0.03


# ---------------------------------------------------------------- DMD


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_dmd_gradient_is_the_normalised_difference_of_the_scores(steps: int) -> None:
    student, fake, teacher = (Constant(images(5, seeded(seed))) for seed in (12, 13, 14))
    config = DMD(times=PLAIN)
    terms = dmd_loss(
        student, teacher, gaussian_batch(5, seeded(11)), seeded(15), config, iteration=steps - 1 + 4, fake=fake
    )
    terms["loss"].sum().backward()
    mean = (student.x0 - teacher.x0).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(student.x0.grad, (2 * (fake.x0 - teacher.x0) / mean).detach())
    for name, model in (("score_error", fake), ("score_error_teacher", teacher)):
        torch.testing.assert_close(terms[name], (model.x0 - student.x0).detach().square().mean((1, 2, 3)))
    assert student.had_gradient == [False] * (steps - 1) + [True]
    assert fake.x0.grad is None
    assert teacher.x0.grad is None


def test_dmd_gradient_is_the_score_difference_of_two_gaussians() -> None:
    """x0_fake - x0_teacher = tan^2(t) cos(t) (score_fake - score_teacher), and score = -x / V for a Gaussian."""
    fake, teacher = GaussianFlow(std=1.3), GaussianFlow(std=0.6)
    t, x = torch.linspace(0.1, 1.5, 8, dtype=torch.float64), images(8, seeded(16))
    x0_student = images(8, seeded(17))
    x0_fake, x0_teacher = (clean_image(model(x, t, {}), x, t) for model in (fake, teacher))
    scores = [-x / expand_like(variance(t, std), x) for std in (1.3, 0.6)]
    difference = expand_like(t.sin() ** 2 / t.cos(), x) * (scores[0] - scores[1])
    mean = (x0_student - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(score_gradient(x0_student, x0_fake, x0_teacher), difference / mean)


def test_the_normaliser_of_the_score_difference_is_bounded_below() -> None:
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(score_gradient(x, x + 1e-5, x), torch.ones_like(x))


def test_fake_score_loss_is_minimal_at_the_score_of_the_student() -> None:
    """The student's one-step samples are N(0, STD^2), whose score GaussianFlow has."""
    batch = gaussian_batch(512, seeded(16))

    def loss(factor: float) -> Tensor:
        class Fake(GaussianFlow):
            def forward(self, *args: object) -> Tensor:
                return factor * super().forward(*args)

        return fake_score_error(Fake(), GaussianConsistency(), batch, seeded(17), DMD(times=PLAIN), 0).mean()

    assert loss(1.0) < loss(0.8)
    assert loss(1.0) < loss(1.2)


def test_the_gradient_of_the_fake_score_is_right_from_its_first_step() -> None:
    """d/dF of (F - v)^2 with v = cos(t) eps - sin(t) x0 of the student's own samples."""
    batch, config = gaussian_batch(6, seeded(18)), DMD(times=PLAIN)
    student, fake = GaussianConsistency(), Shifted(GaussianFlow(), 6)
    fake_score_error(fake, student, batch, seeded(19), config, 4).sum().backward()

    rng = seeded(19)
    x0 = simulate_backward(student, batch, 1, rng, Simulation(PLAIN)).x
    t, eps = PLAIN.draw(6, rng), images(6, rng)
    v = expand_like(t.cos(), x0) * eps - expand_like(t.sin(), x0) * x0
    F = GaussianFlow()(add_noise(x0, eps, t), t, {})
    torch.testing.assert_close(fake.shift.grad, 2 * (F - v))


def test_backward_simulation_samples_the_data_at_any_number_of_steps() -> None:
    batch = gaussian_batch(2048, seeded(18))
    for steps in (1, 2, 4):
        x0 = simulate_backward(GaussianConsistency(), batch, steps, seeded(19), Simulation(PLAIN)).x
        assert x0.std().item() == pytest.approx(STD, rel=0.02)


def test_the_simulation_cycles_through_its_numbers_of_steps() -> None:
    simulation = DMD(simulation_steps=4).simulation
    assert [simulation.steps_at(i) for i in range(8)] == [1, 2, 3, 4, 1, 2, 3, 4]


# ---------------------------------------------------------------- rCM


def rcm_terms(config: RCM, iteration: int) -> tuple[dict[str, Tensor], Constant]:
    fake = Constant(images(8, seeded(20)))
    batch = gaussian_batch(8, seeded(21))
    student = ExactDual(GaussianConsistency())
    return rcm_loss(student, GaussianFlow(), batch, seeded(22), config, iteration=iteration, fake=fake), fake


def test_rcm_is_scm_during_warm_up_and_adds_the_weighted_score_term_afterwards() -> None:
    config = RCM(weight=0.25, scm=SCM(tangent_warmup=4), dmd=DMD(times=PLAIN))
    student, teacher, batch = ExactDual(GaussianConsistency()), GaussianFlow(), gaussian_batch(8, seeded(21))
    terms, fake = rcm_terms(config, iteration=3)
    scm = scm_loss(student, teacher, batch, seeded(22), config.scm, iteration=3)
    assert torch.equal(terms["loss"], scm["loss"])
    assert not fake.had_gradient
    assert config.fake_updates(3) == 0

    terms, fake = rcm_terms(config, iteration=5)
    rng = seeded(22)
    scm = scm_loss(student, teacher, batch, rng, config.scm, iteration=5)
    dmd = dmd_loss(student, teacher, batch, rng, config.dmd, iteration=5, fake=fake)
    torch.testing.assert_close(terms["loss"], scm["loss"] + 0.25 * dmd["loss"])
    assert config.fake_updates(5) == config.dmd.fake_updates_per_step


def test_rcm_without_the_score_term_is_scm_exactly() -> None:
    config = RCM(weight=0.0)
    terms, fake = rcm_terms(config, iteration=5)
    batch, student = gaussian_batch(8, seeded(21)), ExactDual(GaussianConsistency())
    rng = seeded(22)
    assert torch.equal(terms["loss"], scm_loss(student, GaussianFlow(), batch, rng, config.scm, iteration=5)["loss"])
    assert not fake.had_gradient
    assert config.fake_score is None
    assert config.fake_updates(5) == 0


# ---------------------------------------------------------------- dCM


def test_an_euler_step_is_that_of_rectified_flow() -> None:
    t, t_next = torch.tensor([1.2, 0.9], dtype=torch.float64), torch.tensor([1.0, 0.1], dtype=torch.float64)
    x, F = images(2, seeded(23)), images(2, seeded(24))
    s, s_next = flow_time(t), flow_time(t_next)
    z, u = to_flow(x, F, t)
    z_next = z + expand_like(s_next - s, z) * u
    expected = z_next * expand_like(t_next.cos() + t_next.sin(), z)
    torch.testing.assert_close(euler_step(F, x, t, t_next), expected)


def test_dcm_vanishes_for_the_exact_consistency_function_as_the_grid_gets_finer() -> None:
    batch = gaussian_batch(64, seeded(25))

    def loss(steps: int) -> float:
        config = DCM(teacher_steps=steps)
        terms = dcm_loss(GaussianConsistency(), GaussianFlow(), batch, seeded(26), config)
        return terms["loss"].mean().item()

    # an Euler step is off by O(1 / steps^2), and so is f; the loss is its square
    assert loss(1000) < loss(100) * 2e-4
    assert loss(1000) < 1e-9


def test_dcm_moves_the_student_towards_its_answer_one_step_nearer_to_the_data() -> None:
    batch, config = gaussian_batch(8, seeded(27)), DCM(teacher_steps=48, shift=5.0)
    student = Shifted(GaussianFlow(), 8)
    dcm_loss(student, GaussianFlow(), batch, seeded(28), config)["loss"].sum().backward()

    rng = seeded(28)
    index = torch.randint(1, 49, (8,), generator=rng)
    grid = config.grid(torch.device("cpu"))
    t, t_next = grid[index], grid[index - 1]
    x = add_noise(batch.x0, images(8, rng), t)
    F = GaussianFlow()(x, t, {})
    x_next = euler_step(F, x, t, t_next)
    target = clean_image(GaussianFlow()(x_next, t_next, {}), x_next, t_next)
    expected = 2 * (clean_image(F, x, t) - target) * -expand_like(t.sin(), x)
    torch.testing.assert_close(student.shift.grad, expected)
    assert flow_time(grid[1]).item() == pytest.approx(5 / 48 / (1 + 4 / 48))
    assert (grid[0].item(), grid[-1].item()) == (0.0, math.pi / 2)


# ---------------------------------------------------------------- MeanFlow


class NearlyAverage(GaussianAverage):
    def forward(self, *args: Tensor) -> Tensor:
        return 1.05 * super().forward(*args)


def test_mean_flow_vanishes_only_at_the_exact_average_velocity() -> None:
    config, batch = MeanFlow(instant_share=0.5), gaussian_batch(64, seeded(29))
    exact, wrong = (
        mean_flow_loss(ExactDual(model), GaussianFlow(), batch, seeded(30), config)
        for model in (GaussianAverage(), NearlyAverage())
    )
    assert exact["error"].max() < 1e-20
    assert wrong["error"].max() > 1e-3


def test_mean_flow_is_flow_matching_to_the_teacher_where_the_interval_is_empty() -> None:
    config, batch = MeanFlow(instant_share=1.0, power=1.0), gaussian_batch(8, seeded(31))
    student = Shifted(GaussianAverage(), 8)
    terms = mean_flow_loss(ExactDual(student), GaussianFlow(), batch, seeded(32), config)
    assert terms["error"].max() < 1e-20
    with torch.no_grad():
        student.shift.fill_(0.1)
    terms = mean_flow_loss(ExactDual(student), GaussianFlow(), batch, seeded(32), config)
    t, _ = ordered_times(8, config, seeded(32))
    torch.testing.assert_close(terms["error"], 16 * 0.01 * (t.cos() + t.sin()) ** 2)
    torch.testing.assert_close(terms["loss"], terms["error"] / (terms["error"] + 1e-3))


def test_mean_flow_times_are_ordered_and_partly_equal() -> None:
    t, r = ordered_times(4000, MeanFlow(instant_share=0.75), seeded(33))
    assert (t >= r).all()
    assert (t == r).double().mean().item() == pytest.approx(0.75, abs=0.03)


# ---------------------------------------------------------------- flow matching, times, conditions


def test_flow_matching_is_minimal_at_the_velocity_of_the_data() -> None:
    batch = gaussian_batch(512, seeded(34))

    def loss(factor: float) -> Tensor:
        class Student(GaussianFlow):
            def forward(self, *args: object) -> Tensor:
                return factor * super().forward(*args)

        terms = flow_loss(Student(), GaussianFlow(), batch, seeded(35), FlowMatching())
        return terms["loss"].mean()

    assert loss(1.0) < min(loss(0.8), loss(1.2))


def test_time_distributions() -> None:
    log_sigma = LogNormal(mean=-0.4, std=1.6).draw(20000, seeded(23)).tan().log()
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.05)
    shifted = flow_time(ShiftedUniform(shift=5.0).draw(20000, seeded(24)))
    uniform = shifted / (5 - 4 * shifted)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.005)
    logit = flow_time(LogitNormal(mean=-0.4, std=1.0).draw(20000, seeded(25))).logit()
    assert logit.mean().item() == pytest.approx(-0.4, abs=0.03)
    assert logit.std().item() == pytest.approx(1.0, abs=0.03)
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(flow_time(from_flow_time(s)), s)


def test_conditions_are_dropped_for_a_share_of_the_samples() -> None:
    cond = {"labels": torch.arange(4000) % 10, "text": torch.ones(4000, 3, 2)}
    negative = {"labels": torch.tensor([10]), "text": torch.zeros(1, 3, 2)}
    dropped = drop_condition(cond, negative, 0.1, seeded(36))
    gone = dropped["labels"] == 10
    assert gone.double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped["text"][:, 0, 0] == 0, gone)
    assert torch.equal(dropped["labels"][~gone], cond["labels"][~gone])
    assert expand_condition(negative, 5)["text"].shape == (5, 3, 2)


def test_every_objective_has_a_name_settings_and_a_loss() -> None:
    for settings, loss in LOSSES.items():
        assert Objective.variants()[settings.name] is settings
        made = settings(terms=(Term(SCM()),)) if settings is WeightedTerms else settings()
        assert loss_of(made).__wrapped__ is loss
    with pytest.raises(ValueError, match="SCM has a loss already: scm_loss"):
        objective(scm_loss)
