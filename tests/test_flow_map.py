"""Flow maps against the one of Gaussian data, on which every trajectory is known; and students trained on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.objectives import DMD, FlowMap, FreeFlow, Term, WeightedTerms
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.flow_map import flow_map_loss
from jvpgraph.trainer.objectives.free_flow import free_flow_loss
from jvpgraph.trainer.objectives.mean_flow import average_velocity
from jvpgraph.trainer.objectives.terms import terms_loss
from jvpgraph.trainer.objectives.two_times import ordered_times
from jvpgraph.trainer.times import LogitNormal, ShiftedUniform, flow_time
from jvpgraph.trainer.trigflow import add_noise, expand_like
from tests.gaussian import (
    STD,
    ExactDual,
    GaussianAverage,
    GaussianFlow,
    Shifted,
    gaussian_batch,
    images,
    seeded,
    variance,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ShiftedUniform(shift=1.0)
METHODS = ["eulerian", "lagrangian", "terminal"]


class Nearly(nn.Module):
    """One per cent off."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = GaussianAverage()

    def forward(self, *args: Tensor) -> Tensor:
        return 1.01 * self.exact(*args)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, *args: Tensor) -> Tensor:
        return self.factor * GaussianAverage()(*args)


def residual(model: nn.Module, config: FlowMap, iteration: int = 1) -> float:
    """The largest norm of g, or of the residual of `terminal`, over samples."""
    terms = flow_map_loss(
        ExactDual(model), GaussianFlow(), gaussian_batch(64, seeded(1)), seeded(2), config, iteration=iteration
    )
    return terms["target_norm"].max().item()


def test_the_average_velocity_is_the_jump_of_the_flow_map() -> None:
    """x_r = cos(t - r) x_t - sin(t - r) F lands where the trajectory does, x_t sqrt(V(r) / V(t))."""
    t, r = ordered_times(64, FlowMap(times=PLAIN), seeded(3))
    x = images(64, seeded(4))
    landed = euler_step(GaussianAverage()(x, t, {}, r), x, t, r)
    torch.testing.assert_close(landed, x * expand_like((variance(r) / variance(t)).sqrt(), x))


@pytest.mark.parametrize("method", METHODS)
def test_the_exact_flow_map_is_the_fixed_point(method: str) -> None:
    config = FlowMap(method=method, times=PLAIN)
    assert residual(GaussianAverage(), config) < 1e-9
    assert residual(Nearly(), config) > 1e-3


def test_without_its_warmed_tangent_the_map_is_the_velocity() -> None:
    """At the start of a warm-up eulerian's target is cos^2(t - r) (F_T - F)."""
    config = FlowMap(times=PLAIN, tangent_warmup=10**9)
    assert residual(GaussianAverage(), config) > 0.1

    class Velocity(GaussianFlow):
        def forward(self, *args: Tensor) -> Tensor:
            return super().forward(*args[:3])

    assert residual(Velocity(), config) < 1e-6
    assert residual(Velocity(), FlowMap(times=PLAIN)) > 0.1


def trajectory(x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    return x * expand_like((variance(to) / variance(t)).sqrt(), x)


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_the_derivatives_of_the_jump(method: str) -> None:
    """g = cos(t - r) dX/dt along the trajectory, or F_T(X, r) - dX/dr, for a map that is not exact."""
    batch, h, config = gaussian_batch(16, seeded(5)), 1e-6, FlowMap(method=method, times=PLAIN, clean_share=0.0)
    model = Nearly()
    terms = flow_map_loss(ExactDual(model), GaussianFlow(), batch, seeded(6), config, iteration=1)
    rng = seeded(6)
    t, r = ordered_times(16, config, rng)
    x = add_noise(batch.x0, images(16, rng), t)

    def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return euler_step(model(x, t, {}, r), x, t, r)

    if method == "eulerian":
        g = jump(trajectory(x, t, t + h), t + h, r) - jump(trajectory(x, t, t - h), t - h, r)
        expected = expand_like((t - r).cos(), x) * g / (2 * h)
    else:
        # where r = t the map has another formula on either side
        expected = GaussianFlow()(jump(x, t, r), r, {}) - (jump(x, t, r + h) - jump(x, t, r - h)) / (2 * h)
    apart = t - r > 1e-3
    norm = expected.flatten(1).norm(dim=1)
    torch.testing.assert_close(terms["target_norm"][apart], norm[apart], rtol=1e-5, atol=1e-7)
    assert apart.sum() > 4


def test_the_gradient_moves_f_by_the_normalised_target() -> None:
    batch, config = gaussian_batch(8, seeded(7)), FlowMap(times=PLAIN)
    student = Shifted(GaussianAverage(), 8)
    with torch.no_grad():
        student.shift.copy_(0.1 * images(8, seeded(8)))
    terms = flow_map_loss(ExactDual(student), GaussianFlow(), batch, seeded(9), config, iteration=1)
    terms["loss"].sum().backward()
    norm = terms["target_norm"]
    torch.testing.assert_close(student.shift.grad.flatten(1).norm(dim=1), 2 * norm / (norm + 0.1))


def test_terminal_has_the_gradient_of_its_tangent() -> None:
    """Against differences of the loss in a factor of F, which changes dF/dr as well; its weight and end are held."""

    class Still(GaussianFlow):
        """So that nothing depends on where the jump lands."""

        def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return torch.zeros_like(x)

    student, config = Scaled(1.3), FlowMap(method="terminal", times=PLAIN, tangent_floor=1e9)

    def loss() -> Tensor:
        dual = ExactDual(student, differentiable_tangent=True)
        terms = flow_map_loss(dual, Still(), gaussian_batch(8, seeded(10)), seeded(11), config, iteration=1)
        return config.tangent_floor * terms["loss"].mean()

    loss().backward()
    with torch.no_grad():
        h, there = 1e-5, []
        for step in (h, -h):
            student.factor.add_(step)
            there.append(loss())
            student.factor.sub_(step)
    torch.testing.assert_close(student.factor.grad, (there[0] - there[1]) / (2 * h), rtol=1e-6, atol=1e-9)
    assert config.through_tangent
    assert not FlowMap().through_tangent


@pytest.mark.parametrize("method", METHODS)
def test_without_a_teacher_the_map_leans_on_its_own_velocity(method: str) -> None:
    """F at r = t is the velocity; where the interval is empty it learns the data's, whose mean given x_t is that."""
    config = FlowMap(method=method, velocity="own", times=PLAIN, instant_share=0.5)
    batch = gaussian_batch(4096, seeded(12))
    terms = flow_map_loss(ExactDual(GaussianAverage()), nn.Identity(), batch, seeded(13), config, iteration=1)
    t, r = ordered_times(4096, config, seeded(13))
    norm = terms["target_norm"]
    assert norm[t > r].max() < 1e-9
    # of 16 numbers, each with the variance of cos(t) eps - sin(t) x0 given x_t: STD^2 / V(t)
    expected = (16 * STD**2 / variance(t)[t == r]).mean()
    assert norm[t == r].square().mean().item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("method", ["eulerian", "lagrangian"])
def test_targets_have_no_gradient_though_the_tangent_has(method: str) -> None:
    """As beside `terminal`, which has its student transformed so."""
    config, gradients = FlowMap(method=method, times=PLAIN), []
    for differentiable in (False, True):
        student = Scaled(1.3)
        dual = ExactDual(student, differentiable_tangent=differentiable)
        batch = gaussian_batch(8, seeded(10))
        flow_map_loss(dual, GaussianFlow(), batch, seeded(11), config, iteration=1)["loss"].mean().backward()
        gradients.append(student.factor.grad)
    assert torch.equal(*gradients)


def test_pairs_of_times() -> None:
    t, r = ordered_times(8000, FlowMap(times=PLAIN, instant_share=0.5, clean_share=0.25), seeded(14))
    assert (t >= r).all()
    assert (t == r).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (r == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    t, r = ordered_times(8000, FlowMap(times=PLAIN, instant_share=0.0, clean_share=0.0, longest=0.2), seeded(15))
    length = flow_time(t) - flow_time(r)
    assert 0.15 < length.max() <= 0.2
    assert length.mean().item() == pytest.approx(0.2 / 3, rel=0.05)  # of two uniform times, a third apart


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"instant_share": 0.8, "clean_share": 0.3}, "together at most 1"),
        ({"longest": 0.5}, "set clean_share to 0, or longest to 1"),
        ({"longest": 0.0, "clean_share": 0.0}, "longest is 0.0 and must be above 0"),
        ({"velocity": "own", "instant_share": 0.0}, "set instant_share above 0"),
        ({"method": "lagrangian", "tangent_warmup": 5}, "tangent_warmup is of eulerian, and method is lagrangian"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FlowMap(**settings)


class Mlp(nn.Module):
    """F(x, t, r) of single numbers x [B, 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        ).double()

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], r: Tensor) -> Tensor:
        times = torch.stack([t.sin(), t.cos(), (t - r).sin(), (t - r).cos()], dim=1)
        return self.layers(torch.cat([x, times], dim=1))


def distance_to_the_map(student: nn.Module) -> float:
    """RMS over the trajectories, for jumps from anywhere to anywhere below."""
    t, r = ordered_times(2048, FlowMap(times=PLAIN, instant_share=0.0), seeded(16))
    x = torch.randn(2048, 1, dtype=torch.float64, generator=seeded(17)) * variance(t).sqrt()[:, None]
    with torch.no_grad():
        landed = euler_step(student(x, t, {}, r), x, t, r)
    return (landed - trajectory(x, t, r)).square().mean().sqrt().item()


@pytest.mark.long
@pytest.mark.parametrize(("method", "steps"), [("eulerian", 1000), ("lagrangian", 2500), ("terminal", 1000)])
def test_a_student_trained_on_a_gaussian_becomes_the_flow_map(method: str, steps: int, record_property) -> None:
    """RMS distance of where it lands, beside the data's STD of 0.5."""
    torch.manual_seed(0)
    student, rng = Mlp(), seeded(18)
    config = FlowMap(method=method, times=PLAIN)
    dual = jvpgraph.transform(student, backend="eager", dynamic=False, differentiable_tangent=config.through_tangent)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = distance_to_the_map(student)
    for iteration in range(1, steps + 1):
        batch = Batch(STD * torch.randn(128, 1, dtype=torch.float64, generator=rng), {})
        loss = flow_map_loss(dual, GaussianFlow(), batch, rng, config, iteration=iteration)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    after = distance_to_the_map(student)
    record_property("rms_distance", {"before": before, "after": after})
    print(f"{method}: RMS distance to the flow map {before:.3f} before, {after:.4f} after")
    assert before > 0.15
    assert after < 0.08


# ---------------------------------------------------------------- without data


def test_free_flow_vanishes_only_at_the_exact_flow_map() -> None:
    config = FreeFlow()

    def target(model: nn.Module) -> Tensor:
        batch = gaussian_batch(64, seeded(19))
        return free_flow_loss(ExactDual(model), GaussianFlow(), batch, seeded(20), config)["target_norm"]

    assert target(GaussianAverage()).max() < 1e-9
    assert target(Nearly()).max() > 1e-3


def test_free_flow_looks_at_no_data() -> None:
    batch = gaussian_batch(8, seeded(21))
    first, second = (
        free_flow_loss(ExactDual(Nearly()), GaussianFlow(), Batch(factor * batch.x0, {}), seeded(22), FreeFlow())
        for factor in (1.0, 100.0)
    )
    assert torch.equal(first["target_norm"], second["target_norm"])
    assert not FreeFlow().needs_data


def test_free_flow_moves_the_end_of_the_jump_as_the_teacher_would() -> None:
    """g = F_T(X, r) - dX/dr by central differences, from noise."""
    terms = free_flow_loss(ExactDual(Nearly()), GaussianFlow(), gaussian_batch(16, seeded(23)), seeded(24), FreeFlow())
    rng, h = seeded(24), 1e-6
    x = images(16, rng)
    r = FreeFlow().times.draw(16, rng)
    t = torch.full_like(r, math.pi / 2)

    def jump(r: Tensor) -> Tensor:
        return euler_step(Nearly()(x, t, {}, r), x, t, r)

    g = GaussianFlow()(jump(r), r, {}) - (jump(r + h) - jump(r - h)) / (2 * h)
    torch.testing.assert_close(terms["target_norm"], g.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-7)


class Asked(nn.Module):
    """A model, and the last x_t and t that it was asked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.x, self.t = x, t
        return self.model(x, t, cond)


def test_the_correction_of_free_flow_is_dmd_on_the_end_of_one_jump() -> None:
    """FreeFlow moves the end by v_N - u, with v_N the velocity of the student's samples with noise; dmd by s (v_N - u).

    The end is -F, so that the loss has the gradient 2 s (v_N - u) / mean |end - x0_teacher| in F.
    """
    correction = DMD(rollout="jumps", simulation_steps=1, times=LogitNormal(mean=0.8))
    config = WeightedTerms((Term(FreeFlow()), Term(correction, weight=0.1)))
    student, fake, size = Shifted(Scaled(1.2), 16), Asked(GaussianFlow(1.2 * STD)), 16
    given = (ExactDual(student), GaussianFlow(), gaussian_batch(size, seeded(25)), seeded(26), config)
    terms = terms_loss(*given, iteration=4, fake=fake)
    torch.testing.assert_close(terms["loss"], terms["free_flow"] + 0.1 * terms["dmd"])
    terms["dmd"].sum().backward()

    rng = seeded(26)
    images(size, rng), FreeFlow().times.draw(size, rng)  # what free_flow draws
    end = 1.2 * STD * images(size, rng)
    s, z = flow_time(fake.t), fake.x / expand_like(fake.t.cos() + fake.t.sin(), fake.x)
    v_N, u = (average_velocity(flow, z, fake.t, None, {}) for flow in (fake.model, GaussianFlow()))
    distance = (end - (z - expand_like(s, z) * u)).abs().flatten(1).mean(1)
    torch.testing.assert_close(student.shift.grad, 2 * expand_like(s / distance, z) * (v_N - u))
    assert not config.needs_data
    assert config.sampler == "mean_flow"
