"""The trainer against closed forms: TrigFlow, objectives on Gaussian data, samplers, metrics, the demo."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer import demo
from jvpgraph.trainer.config import DemoConfig, DistillConfig, DiTConfig, FewStepConfig
from jvpgraph.trainer.data import Batch, Digits, digits
from jvpgraph.trainer.dit import DiT
from jvpgraph.trainer.evaluate import frechet_distance, precision_recall
from jvpgraph.trainer.objectives.dmd import (
    dmd_loss,
    draw_dmd_times,
    fake_score_loss,
    score_gradient,
    simulate_backward,
)
from jvpgraph.trainer.objectives.rcm import rcm_loss
from jvpgraph.trainer.objectives.scm import draw_scm_times, scm_loss, tangent_target
from jvpgraph.trainer.sample import few_step_times, sample_euler, sample_few_steps
from jvpgraph.trainer.train import LossLog, PowerEMA, descend, power_ema_gamma, train_teacher
from jvpgraph.trainer.trigflow import (
    COSINE,
    EDM,
    RECTIFIED_FLOW,
    Guided,
    Schedule,
    TrigFlow,
    add_noise,
    clean_image,
    expand_like,
    s,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int, rng: torch.Generator) -> Tensor:
    return torch.randn(size, 1, 8, 8, generator=rng, dtype=torch.float64)


def inner_times(size: int) -> Tensor:
    """Times strictly inside (0, pi / 2), both ends nearly reached."""
    return torch.linspace(1e-5, math.pi / 2 - 1e-5, size, dtype=torch.float64)


# ---------------------------------------------------------------- TrigFlow coordinates

CLOSED_FORMS = {
    RECTIFIED_FLOW: {
        "time": lambda t: t.sin() / (t.sin() + t.cos()),
        "c_in": lambda t: 1 / (t.sin() + t.cos()),
        "c_skip": lambda t: 1 / (t.sin() + t.cos()),
        "c_out": lambda t: -t.sin() / (t.sin() + t.cos()),
    },
    COSINE: {
        "time": lambda t: 2 * t / math.pi,
        "c_in": torch.ones_like,
        "c_skip": torch.cos,
        "c_out": lambda t: -2 / math.pi * t.sin(),
    },
    EDM: {
        "time": torch.tan,
        "c_in": lambda t: 1 / t.cos(),
        "c_skip": lambda t: 1 / t.cos(),
        "c_out": lambda t: -t.tan(),
    },
}
SCHEDULES = pytest.mark.parametrize("schedule", CLOSED_FORMS, ids=lambda schedule: schedule.name)


@SCHEDULES
def test_coefficients_equal_their_closed_forms(schedule: Schedule) -> None:
    t = inner_times(101)
    for name, closed_form in CLOSED_FORMS[schedule].items():
        torch.testing.assert_close(schedule.coefficient(name)(t), closed_form(t), rtol=1e-10, atol=1e-10)


@SCHEDULES
def test_matched_times_have_the_same_noise_to_signal_ratio(schedule: Schedule) -> None:
    t = inner_times(101)[1:-1]
    alpha, sigma = (
        sympy.lambdify(s, f + 0 * s, modules=[{"cos": torch.cos, "sin": torch.sin}])
        for f in (schedule.alpha, schedule.sigma)
    )
    time = schedule.coefficient("time")(t)
    torch.testing.assert_close(sigma(time) / alpha(time), t.tan(), rtol=1e-9, atol=0)


@SCHEDULES
def test_a_velocity_is_the_derivative_of_the_path(schedule: Schedule) -> None:
    h = 1e-5
    for path, derivative in ((schedule.alpha, schedule.on_data), (schedule.sigma, schedule.on_noise)):
        for time in (0.1, 0.5, 0.9):
            difference = float(path.subs(s, time + h) - path.subs(s, time - h)) / (2 * h)
            assert float(derivative.subs(s, time)) == pytest.approx(difference, abs=1e-9)


class Oracle(nn.Module):
    """A network in float64 that knows x0 and eps, and predicts what `schedule` asks of it."""

    def __init__(self, schedule: Schedule, x0: Tensor, eps: Tensor) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.schedule, self.x0, self.eps = schedule, x0, eps

    def forward(self, x_s: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        self.x_s, self.time = x_s, time
        a, b = (
            torch.tensor([float(f.subs(s, v)) for v in time.tolist()], dtype=torch.float64)
            for f in (self.schedule.on_data, self.schedule.on_noise)
        )
        return expand_like(a, x_s) * self.x0 + expand_like(b, x_s) * self.eps


@SCHEDULES
def test_the_wrapper_turns_a_perfect_network_into_the_velocity(schedule: Schedule) -> None:
    t = torch.tensor([0.02, 0.3, 0.8, 1.2, 1.55], dtype=torch.float64)
    x0, eps = images(5, seeded(1)), images(5, seeded(2))
    net = Oracle(schedule, x0, eps)
    x = add_noise(x0, eps, t)
    F = TrigFlow(net, schedule)(x, t, torch.zeros(5, dtype=torch.long))
    velocity = expand_like(t.cos(), x) * eps - expand_like(t.sin(), x) * x0
    # COSINE's derivatives are taken at a time that was rounded to float32
    torch.testing.assert_close(F, velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clean_image(F, x, t), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.time, schedule.coefficient("time")(t).float())


def test_the_wrapper_is_the_direct_formula_for_rectified_flow() -> None:
    net = DiT(DiTConfig(width=16, depth=1, heads=2)).double()
    nn.init.normal_(net.patch_out.weight)
    t, x = torch.linspace(0.05, 1.5, 6, dtype=torch.float64), images(6, seeded(3))
    labels = torch.arange(6)
    time = t.sin() / (t.sin() + t.cos())
    x_s = x / expand_like(t.sin() + t.cos(), x)
    x0 = x_s - expand_like(time, x) * net(x_s, time.float(), labels)
    F = (expand_like(t.cos(), x) * x - x0) / expand_like(t.sin(), x)
    torch.testing.assert_close(TrigFlow(net)(x, t, labels), F)
    torch.testing.assert_close(clean_image(TrigFlow(net)(x, t, labels), x, t), x0)


def test_the_consistency_function_is_the_identity_at_time_zero() -> None:
    model = TrigFlow(DiT(DiTConfig(width=16, depth=1, heads=2)))
    x, t = images(4, seeded(4)), torch.zeros(4, dtype=torch.float64)
    assert torch.equal(clean_image(model(x, t, torch.arange(4)), x, t), x)


def test_guidance_extrapolates_from_the_unlabelled_prediction() -> None:
    class ByLabel(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return x * expand_like(labels, x)

    x, t = images(3, seeded(5)), torch.ones(3, dtype=torch.float64)
    F = Guided(ByLabel(), scale=1.5, no_label=10)(x, t, torch.tensor([1, 2, 3]))
    expected = x * expand_like(10 + 1.5 * (torch.tensor([1.0, 2.0, 3.0]) - 10), x)
    torch.testing.assert_close(F, expected.double())


# ---------------------------------------------------------------- objectives, on data ~ N(0, STD^2)

STD = 0.5


def variance(t: Tensor) -> Tensor:
    """Of x_t: STD^2 cos^2(t) + sin^2(t)."""
    return STD**2 * t.cos() ** 2 + t.sin() ** 2


class GaussianFlow(nn.Module):
    """E[v | x_t] = x_t V'(t) / (2 V(t)), the velocity of the probability flow; it scales x_t like sqrt(V)."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x * expand_like((1 - STD**2) * t.sin() * t.cos() / variance(t), x)


class GaussianConsistency(nn.Module):
    """The F of the exact consistency function f(x_t, t) = STD x_t / sqrt(V(t))."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x * expand_like((t.cos() - STD / variance(t).sqrt()) / t.sin(), x)


class ExactDual(nn.Module):
    """F and F_dot of a small model by torch.func.jvp, the reference for the library's dual."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, tangents: dict[str, Tensor] | None = None):
        if tangents is None:
            return self.model(x, t, labels)
        _, F_dot = torch.func.jvp(lambda x, t: self.model(x, t, labels), (x, t), (tangents["x"], tangents["t"]))
        return self.model(x, t, labels), F_dot.detach()


def gaussian_batch(size: int, rng: torch.Generator) -> Batch:
    return Batch(STD * images(size, rng), torch.zeros(size, dtype=torch.long))


def target_of(model: nn.Module, r: float = 1.0) -> Tensor:
    """sCM's g for a Gaussian teacher at times in the interior."""
    t = torch.linspace(0.05, 1.5, 8, dtype=torch.float64)
    x, labels = images(8, seeded(6)), torch.zeros(8, dtype=torch.long)
    F_teacher = GaussianFlow()(x, t, labels)
    speed = t.cos() * t.sin()
    tangents = {"x": expand_like(speed, x) * F_teacher, "t": speed}
    F, F_dot = ExactDual(model)(x, t, labels, tangents=tangents)
    return tangent_target(F.detach(), F_dot, F_teacher, x, t, r)


def test_the_tangent_target_vanishes_at_the_exact_consistency_function() -> None:
    assert target_of(GaussianConsistency()).abs().max() < 1e-12


def test_the_tangent_target_does_not_vanish_elsewhere() -> None:
    assert target_of(GaussianFlow()).abs().max() > 1e-2


def test_the_tangent_target_is_the_derivative_of_f_along_the_trajectory() -> None:
    """g = cos(t) df/dt; the trajectory through x_t is x_t sqrt(V(t + h) / V(t))."""
    t, h = torch.linspace(0.05, 1.5, 8, dtype=torch.float64), 1e-6
    x, labels = images(8, seeded(6)), torch.zeros(8, dtype=torch.long)
    model = GaussianFlow()  # any smooth F but the exact one

    def f(step: float) -> Tensor:
        moved = x * expand_like((variance(t + step) / variance(t)).sqrt(), x)
        return clean_image(model(moved, t + step, labels), moved, t + step)

    difference = expand_like(t.cos(), x) * (f(h) - f(-h)) / (2 * h)
    torch.testing.assert_close(target_of(model), difference, rtol=1e-7, atol=1e-8)


def test_without_the_tangent_the_target_pulls_towards_the_teacher() -> None:
    t = torch.linspace(0.05, 1.5, 8, dtype=torch.float64)
    x, labels = images(8, seeded(6)), torch.zeros(8, dtype=torch.long)
    gap = GaussianConsistency()(x, t, labels) - GaussianFlow()(x, t, labels)
    expected = -expand_like(t.cos() ** 2, x) * gap.detach()
    torch.testing.assert_close(target_of(GaussianConsistency(), r=0.0), expected)


def test_scm_loss_is_zero_only_at_the_exact_consistency_function() -> None:
    config, batch = DistillConfig(), gaussian_batch(16, seeded(7))
    exact = scm_loss(ExactDual(GaussianConsistency()), GaussianFlow(), batch, seeded(8), config=config)
    wrong = scm_loss(ExactDual(GaussianFlow()), GaussianFlow(), batch, seeded(8), config=config)
    assert exact.dtype == torch.float64
    assert exact < 1e-12
    assert 0.01 < wrong <= 1  # a sum of squares of targets that are normalised to less than one


def test_scm_gradient_is_the_normalised_target() -> None:
    """d loss / d F = -2 g / B, with g normalised per image."""
    config, batch, size = DistillConfig(), gaussian_batch(8, seeded(9)), 8

    class Shifted(GaussianFlow):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(size, 1, 8, 8, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, t, labels) + self.shift

    student, teacher = Shifted(), GaussianFlow()
    scm_loss(ExactDual(student), teacher, batch, seeded(10), config=config, warmup=0.7).backward()

    rng = seeded(10)
    t = draw_scm_times(size, config, rng)
    x = add_noise(batch.x0, images(size, rng), t)
    F_teacher, speed = teacher(x, t, batch.labels), t.cos() * t.sin()
    tangents = {"x": expand_like(speed, x) * F_teacher, "t": speed}
    F, F_dot = ExactDual(student)(x, t, batch.labels, tangents=tangents)
    g = tangent_target(F.detach(), F_dot, F_teacher, x, t, 0.7)
    g = g / (g.square().sum(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)
    torch.testing.assert_close(student.shift.grad, -2 * g / size)


class Constant(nn.Module):
    """A velocity that implies the clean image `x0` from everywhere: F = (cos(t) x_t - x0) / sin(t)."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = nn.Parameter(x0)
        self.had_gradient: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.had_gradient.append(torch.is_grad_enabled())
        return (expand_like(t.cos(), x) * x - self.x0) / expand_like(t.sin(), x)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_dmd_gradient_is_the_normalised_difference_of_the_scores(steps: int) -> None:
    batch = Batch(images(5, seeded(11)), torch.arange(5))
    student, fake, teacher = (Constant(images(5, seeded(seed))) for seed in (12, 13, 14))
    loss = dmd_loss(student, teacher, batch, seeded(15), fake=fake, config=DistillConfig(), steps=steps)
    loss.backward()
    mean = (student.x0 - teacher.x0).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(student.x0.grad, (2 / 5 * (fake.x0 - teacher.x0) / mean).detach())
    assert student.had_gradient == [False] * (steps - 1) + [True]
    assert fake.x0.grad is None
    assert teacher.x0.grad is None


def test_the_normaliser_of_the_score_difference_is_bounded_below() -> None:
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(score_gradient(x, x + 1e-5, x), torch.ones_like(x))


def test_fake_score_loss_is_minimal_at_the_score_of_the_student() -> None:
    """The student's one-step samples are N(0, STD^2), whose score GaussianFlow has."""
    batch, config = gaussian_batch(256, seeded(16)), DistillConfig()

    def loss(factor: float) -> Tensor:
        class Fake(GaussianFlow):
            def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
                return factor * super().forward(x, t, labels)

        return fake_score_loss(Fake(), GaussianConsistency(), batch, seeded(17), config=config, steps=1)

    assert loss(1.0) < loss(0.8)
    assert loss(1.0) < loss(1.2)


def test_backward_simulation_samples_the_data_at_any_number_of_steps() -> None:
    batch = gaussian_batch(512, seeded(18))
    for steps in (1, 2, 4):
        x0 = simulate_backward(GaussianConsistency(), batch, steps, seeded(19), config=DistillConfig())
        assert x0.std().item() == pytest.approx(STD, rel=0.02)


def test_rcm_is_scm_during_warm_up_and_adds_the_weighted_score_term_afterwards() -> None:
    config = DistillConfig(tangent_warmup=4, dmd_weight=0.25)
    student, teacher = ExactDual(GaussianConsistency()), GaussianFlow()
    fake, batch = Constant(images(8, seeded(20))), gaussian_batch(8, seeded(21))
    rng = seeded(22)
    scm = scm_loss(student, teacher, batch, rng, config=config, warmup=0.75)
    rcm = rcm_loss(student, teacher, batch, seeded(22), fake=fake, config=config, iteration=3)
    assert rcm == scm
    assert not fake.had_gradient

    rng = seeded(22)
    scm = scm_loss(student, teacher, batch, rng, config=config)
    dmd = dmd_loss(student, teacher, batch, rng, fake=fake, config=config, steps=2)
    rcm = rcm_loss(student, teacher, batch, seeded(22), fake=fake, config=config, iteration=5)
    torch.testing.assert_close(rcm, scm + 0.25 * dmd)


def test_time_distributions() -> None:
    config = DistillConfig(scm_log_sigma_mean=-0.4, scm_log_sigma_std=1.6, dmd_time_shift=5.0)
    log_sigma = draw_scm_times(20000, config, seeded(23)).tan().log()
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.05)
    t = draw_dmd_times(20000, config, seeded(24))
    shifted = t.sin() / (t.sin() + t.cos())
    uniform = shifted / (5 - 4 * shifted)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.005)


# ---------------------------------------------------------------- samplers


def test_few_step_times_follow_the_paper() -> None:
    assert few_step_times(4, FewStepConfig()) == [math.atan(80.0), 1.3, 1.0, 0.6]
    assert few_step_times(1, FewStepConfig()) == [math.atan(80.0)]
    with pytest.raises(ValueError, match="5 steps need 4 middle times"):
        few_step_times(5, FewStepConfig())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_step_sampling_is_exact_for_the_exact_consistency_function(steps: int) -> None:
    labels = torch.zeros(512, dtype=torch.long)
    times = few_step_times(steps, FewStepConfig())
    x0 = sample_few_steps(GaussianConsistency(), labels, times, seeded(25), image_size=8)
    assert x0.std().item() == pytest.approx(STD, rel=0.02)


def test_few_step_sampling_is_reproducible() -> None:
    labels, times = torch.arange(6), few_step_times(2, FewStepConfig())
    model = TrigFlow(DiT(DiTConfig(width=16, depth=1, heads=2)))
    first, again, other = (sample_few_steps(model, labels, times, seeded(seed), image_size=8) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_euler_sampling_converges_to_the_data() -> None:
    labels = torch.zeros(256, dtype=torch.long)
    error = [
        abs(sample_euler(GaussianFlow(), labels, steps, seeded(26), image_size=8).std().item() - STD)
        for steps in (10, 100)
    ]
    assert error[1] < 0.02
    assert error[1] < error[0] / 5


# ---------------------------------------------------------------- metrics


def with_moments(mean: Tensor, std: Tensor, size: int = 400) -> Tensor:
    """Points whose sample mean and covariance are exactly `mean` and diag(std^2)."""
    x = torch.randn(size, len(mean), generator=seeded(27), dtype=torch.float64)
    x = x - x.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))
    return (x @ whitening.T) * std + mean


def test_frechet_distance_of_known_gaussians() -> None:
    mean_a, mean_b = torch.tensor([[0.0, 1.0, -2.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]], dtype=torch.float64)
    a, b = with_moments(mean_a, std_a), with_moments(mean_b, std_b)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)

    rotation = torch.linalg.qr(torch.randn(3, 3, generator=seeded(28), dtype=torch.float64)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected.item(), rel=1e-9)


def test_precision_and_recall_tell_poor_quality_from_poor_coverage() -> None:
    rng = seeded(29)
    left = torch.randn(200, 4, generator=rng, dtype=torch.float64)
    right = torch.randn(200, 4, generator=rng, dtype=torch.float64) + 100
    assert precision_recall(left, left, 3) == (1.0, 1.0)
    assert precision_recall(left, right, 3) == (0.0, 0.0)
    precision, recall = precision_recall(torch.cat([left, right]), left, 3)
    assert (precision, recall) == (1.0, 0.5)
    precision, recall = precision_recall(left, torch.cat([left, right]), 3)
    assert (precision, recall) == (0.5, 1.0)


# ---------------------------------------------------------------- training


def test_the_digits_are_real_and_normalised() -> None:
    data = digits()
    assert data.x0.shape == (1797, 1, 8, 8)
    assert data.x0.mean().abs() < 1e-5
    assert data.x0.std().item() == pytest.approx(1, abs=1e-5)
    assert sorted(set(data.grey(data.x0).round().flatten().tolist())) == list(range(17))


def test_the_network_starts_at_zero_and_counts_its_parameters() -> None:
    net = DiT(DiTConfig())
    assert 0.65e6 < sum(p.numel() for p in net.parameters()) < 0.75e6
    x = images(2, seeded(30)).float()
    assert torch.equal(net.unpatchify(net.patchify(x)), x)
    assert torch.equal(net(x, torch.rand(2), torch.arange(2)), torch.zeros_like(x))


def test_power_ema_has_the_published_exponents_and_profile() -> None:
    assert power_ema_gamma(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_ema_gamma(0.10) == pytest.approx(6.94, abs=0.01)
    model = nn.Linear(1, 1, bias=False).double()
    ema = PowerEMA(model, 0.1)
    for k in range(1, 1001):
        nn.init.constant_(model.weight, float(k))
        ema.update(model)
    # the mean of k under the density proportional to k^gamma
    assert ema.model.weight.item() == pytest.approx(1000 * (ema.gamma + 1) / (ema.gamma + 2), rel=1e-3)


def test_clipping_bounds_the_gradient_and_off_means_off() -> None:
    for clip_norm, expected in ((0.5, 0.5), (None, 30.0)):
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        descend(model, optimizer, 30 * model.weight.sum(), clip_norm)
        assert model.weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_step() -> None:
    log = LossLog("student loss")
    log.add(1, torch.tensor(1.0))
    assert log.check() == "1.000"
    for step, loss in ((2, 1.0), (3, math.nan), (4, math.nan)):
        log.add(step, torch.tensor(loss))
    with pytest.raises(FloatingPointError, match="student loss is nan at step 3"):
        log.check()

    data = digits()
    broken = Digits(data.x0 * math.inf, data.labels, data.mean, data.std)
    with pytest.raises(FloatingPointError, match="teacher loss is nan at step 1"):
        train_teacher(broken, DemoConfig().quick(), seeded())


def test_the_dual_student_gives_the_tangent_of_the_trigflow_model() -> None:
    model = TrigFlow(DiT(DiTConfig(width=16, depth=1, heads=2)))
    nn.init.normal_(model.net.patch_out.weight, generator=seeded(31))
    x, t, labels = images(4, seeded(32)), torch.linspace(0.2, 1.4, 4).double(), torch.arange(4)
    tangents = {"x": images(4, seeded(33)), "t": torch.ones(4, dtype=torch.float64)}
    F, F_dot = jvpgraph.transform(model, backend="eager")(x, t, labels, tangents=tangents)

    def at(h: float) -> Tensor:
        return model(x + h * tangents["x"], t + h * tangents["t"], labels)

    with torch.no_grad():
        torch.testing.assert_close(F, at(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(F_dot, (at(1e-2) - at(-1e-2)) / 2e-2, rtol=1e-2, atol=1e-2)
    assert F.requires_grad
    assert not F_dot.requires_grad


@pytest.mark.slow
def test_the_quick_demo_writes_its_picture_and_figures(tmp_path, capsys) -> None:
    config = replace(DemoConfig(out=tmp_path).quick(), seed=1)
    results = demo.run(config)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = [row["name"] for row in metrics["samplers"]]
    assert names == [r.name for r in results]
    assert [n.split(",")[0] for n in names] == ["real", "teacher", "teacher", "student", "student", "student"]
    for row in metrics["samplers"]:
        assert math.isfinite(row["frechet_distance"])
        assert 0 <= row["precision"] <= 1
        assert 0 <= row["recall"] <= 1
    assert metrics["settings"]["seed"] == 1
    assert set(metrics["phase_seconds"]) == {"classifier", "teacher", "student", "sampling and metrics"}
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in capsys.readouterr().out
