"""A second time for networks that know one: the teacher at first, exact tangents, export, and what it learns."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig, StudentConfig
from jvpgraph.trainer.model.networks import build_student, check_stage
from jvpgraph.trainer.model.second_time import KNOWN, SecondTime, add_second_time, of_interval, takes_r
from jvpgraph.trainer.model.student import LoRA, make_student
from jvpgraph.trainer.objectives import MeanFlow
from jvpgraph.trainer.objectives.mean_flow import mean_flow_loss
from jvpgraph.trainer.times import ShiftedUniform
from jvpgraph.trainer.trigflow import TrigFlow
from tests.gaussian import STD, ExactDual, GaussianAverage, GaussianFlow, gaussian_batch, seeded
from tests.test_adapters import TABLE, build, latents, normal, times

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers")

TWO_ALREADY = {"HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel"}  # as the zoo has them
FAMILIES = sorted(KNOWN.keys() - TWO_ALREADY)


def with_second_time(name: str, dtype: str = "float32", *, awake: bool = True, **more: Any) -> TrigFlow:
    """The zoo's network with a second time; awake: as if it were trained."""
    model = add_second_time(build(name, dtype, **more))
    for parameter, value in model.net.named_parameters():
        if awake and of_interval(parameter):
            value.data = 0.2 * torch.randn(value.shape, generator=seeded(value.numel())).to(value.dtype)
    return model


# ---------------------------------------------------------------- what it is


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_its_teacher_bit_for_bit_until_it_is_trained(name: str, dtype: str) -> None:
    teacher, x, t, cond = build(name, dtype), latents(name), times(), TABLE[name].cond
    student = with_second_time(name, dtype, awake=False)
    assert takes_r(student)
    assert not takes_r(teacher)
    for r in (None, t, t / 2):
        assert torch.equal(student(x, t, cond, r), teacher(x, t, cond))
    awake = with_second_time(name, dtype)
    assert torch.equal(awake(x, t, cond), awake(x, t, cond, t))  # no r is t
    assert (awake(x, t, cond, t / 2) - awake(x, t, cond)).norm() > 1e-3 * awake(x, t, cond).norm()


def test_names_of_the_teacher_stay_and_copies_are_their_own() -> None:
    name = "FluxTransformer2DModel"
    teacher, student = build(name, "float32"), with_second_time(name)
    new = student.net.state_dict().keys() - teacher.net.state_dict().keys()
    assert new
    assert all(map(of_interval, new))
    assert teacher.net.state_dict().keys() <= student.net.state_dict().keys()
    other = copy.deepcopy(student)
    for parameter in other.parameters():
        parameter.data.zero_()
    x, t, cond = latents(name), times(), TABLE[name].cond
    assert student(x, t, cond, t / 2).any()
    assert not other(x, t, cond, t / 2)[:, :, 0].isnan().any()


def test_adapters_are_beside_a_second_time_that_is_trained_whole() -> None:
    name = "SD3Transformer2DModel"
    teacher = build(name, "bfloat16")
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    lora = LoRA(rank=2, alpha=2.0, targets=("to_q", "linear_1"))
    student = make_student(teacher, dtype=None, lora=lora, checkpoint_blocks=False, second_time=SecondTime())
    trained = [key for key, p in student.named_parameters() if p.requires_grad]
    assert {key for key in trained if of_interval(key)} == {
        key for key, _ in student.named_parameters() if of_interval(key)
    }
    assert all(of_interval(key) or ".lora_" in key for key in trained)
    assert not any(of_interval(key) and ".lora_" in key for key in trained)
    x, t, cond = latents(name), times(), TABLE[name].cond
    student(x, t, cond, t / 2).square().sum().backward()
    assert all(p.grad is not None for key, p in student.named_parameters() if of_interval(key))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_the_fake_score_has_one_time() -> None:
    teacher, config = build("WanTransformer3DModel", "float32"), StudentConfig(second_time=True)
    assert takes_r(build_student(teacher, config))
    assert not takes_r(build_student(teacher, config.fake_score))
    assert not takes_r(teacher)


@torch.no_grad()
def test_the_digits_network_is_asked_at_t_where_there_is_no_r() -> None:
    from jvpgraph.trainer.dit import dit

    teacher = dit(width=16, depth=1, heads=2)
    for parameter in teacher.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    student = build_student(teacher, StudentConfig(second_time=True))
    x, t, cond = normal(2, 1, 8, 8), times(), {"labels": torch.tensor([3, 10])}
    assert torch.equal(student(x, t, cond), teacher(x, t, cond, t))
    assert (teacher(x, t, cond) - teacher(x, t, cond, t)).norm() > 0
    assert student.net.config.second_time
    assert not teacher.net.config.second_time


# ---------------------------------------------------------------- networks of one's own


class Waves(nn.Module):
    """Time [B] -> [B, 16]."""

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.logspace(0, 1, 8, dtype=t.dtype, device=t.device)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Scaling(nn.Module):
    """u = a x, and a a number that is read off the time: enough for Gaussian data."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = Waves()
        self.embed = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.head(self.embed(self.waves(t).to(next(self.parameters()).dtype)))
        return x * a.reshape(-1, *[1] * (x.dim() - 1))


def scaling(dtype: torch.dtype = torch.float32) -> TrigFlow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TrigFlow(Scaling().to(dtype))


WHERE = SecondTime("embed", "waves")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (SecondTime(), "not known where Scaling takes its time in\nName the module that embeds its time"),
        (SecondTime("embedding"), "Scaling has no module embedding"),
        (SecondTime("embed", "sinus"), "Scaling has no module sinus"),
        (SecondTime("waves"), "waves has no linear layer"),
    ],
)
def test_places_that_are_not_there(where: SecondTime, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_second_time(scaling(), where)


def test_what_is_no_embedding_is_named() -> None:
    name = "PixArtTransformer2DModel"
    model = add_second_time(build(name, "float32"), SecondTime("adaln_single"))
    with pytest.raises(TypeError, match=r"a AdaLayerNormSingle gives a tuple, not an embedding \[B, C\]"):
        model(latents(name), times(), TABLE[name].cond)


def minimise(model: nn.Module, loss: Any, steps: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().mean().backward()
        optimiser.step()
        schedule.step()


@pytest.mark.long
def test_average_velocities_are_learnt_from_one_time() -> None:
    """To 3 % of the latents' size in the mean and 10 % at worst, over intervals of all lengths: at first a half."""
    rng, model, uniform = seeded(3), scaling(torch.float64), ShiftedUniform(shift=1.0)

    def velocity_error() -> Tensor:
        t = uniform.draw(64, rng)
        x = normal(64, 1, 4, 4, seed=int(1e6 * t[0]))
        return (model(x, t, {}) - GaussianFlow()(x, t, {})).square().flatten(1).sum(1)

    minimise(model, velocity_error, 300)
    add_second_time(model, WHERE)
    t = torch.linspace(0.4, math.pi / 2, 6, dtype=torch.float64).repeat(6)
    r = t * torch.linspace(0, 1, 6, dtype=torch.float64).repeat_interleave(6)
    x = STD * normal(len(t), 1, 4, 4, seed=5)

    def errors() -> Tensor:
        with torch.no_grad():
            off = model(x, t, {}, r) - GaussianAverage()(x, t, {}, r)
        return off.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)

    assert errors()[-6:].max() < 0.03  # r = t
    assert errors().max() > 0.4
    config, dual = MeanFlow(times=uniform, instant_share=0.25, power=0.0), ExactDual(model)
    minimise(model, lambda: mean_flow_loss(dual, GaussianFlow(), gaussian_batch(64, rng), rng, config)["loss"], 1000)
    assert errors().mean() < 0.03
    assert errors().max() < 0.1


def test_a_sequential_embedder_is_not_run_through_what_is_added() -> None:
    model = add_second_time(scaling(), WHERE)
    assert len(model.net.embed) == 3
    assert torch.equal(model(normal(2, 1, 4, 4), times(), {}), scaling()(normal(2, 1, 4, 4), times(), {}))


# ---------------------------------------------------------------- tangents


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tangents_of_x_t_and_r_on_the_default_backend(dtype: str) -> None:
    """In two sizes; r = t has the teacher's tangent, and the new layers have gradients."""
    name, tolerance = "WanTransformer3DModel", {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    model = with_second_time(name, dtype, config={"num_layers": 1})
    exact = copy.deepcopy(model).double()
    reference = jvpgraph.transform(exact, backend="op_by_op")
    dual = jvpgraph.transform(model, dynamic=False)
    for size in (2, 3):
        x = normal(size, *TABLE[name].latent, seed=size)
        cond = {key: value[:1].expand(size, *value.shape[1:]) for key, value in TABLE[name].cond.items()}
        t = torch.linspace(0.4, 1.2, size, dtype=torch.float64)
        r, ones = 0.4 * t, torch.ones_like(t)
        tangents = {"x": normal(*x.shape, seed=7), "t": 0.3 * ones, "r": -0.2 * ones}
        F, F_dot = dual(x, t, cond, r, tangents=tangents)
        wanted, wanted_dot = reference(x, t, cond, r, tangents=tangents)
        assert relative(F, wanted) < tolerance
        assert relative(F_dot, wanted_dot) < tolerance
    F.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if of_interval(key))

    with torch.no_grad():  # the reference itself, along r alone
        step, fixed = 3e-4, {"r": ones}
        ends = [exact(x, t, cond, r + sign * step) for sign in (1, -1)]
        _, along_r = reference(x, t, cond, r, tangents=fixed)
    assert relative((ends[0] - ends[1]) / (2 * step), along_r) < 1e-2


@pytest.mark.long
def test_a_graph_at_r_equals_t_is_the_teacher_s() -> None:
    """With its tangent, to rounding: t - r stands still."""
    name = "WanTransformer3DModel"
    teacher = build(name, "float32", config={"num_layers": 1})
    student = add_second_time(copy.deepcopy(teacher))
    x, t, cond = latents(name), times(), TABLE[name].cond
    tangents = {"x": latents(name, seed=2), "t": torch.tensor([0.3, -0.2], dtype=torch.float64)}
    F, F_dot = jvpgraph.transform(student, dynamic=False)(x, t, cond, tangents=tangents)
    wanted, wanted_dot = jvpgraph.transform(teacher, dynamic=False)(x, t, cond, tangents=tangents)
    assert relative(F, wanted) < 1e-6
    assert relative(F_dot, wanted_dot) < 1e-6


# ---------------------------------------------------------------- runs


def of_settings(**more: Any) -> RunConfig:
    data: dict[str, Any] = {"out": "run", "model": {"load": "a:b"}, "stages": [{"steps": 1, "objective": "mean_flow"}]}
    return settings.from_dict(RunConfig, data | more)


def test_settings_say_yes_or_where() -> None:
    assert of_settings().student.added_time is None
    assert of_settings(student={"second_time": True}).student.added_time == SecondTime()
    where = {"embedder": "embed", "sinusoids": "waves", "scale": 10.0}
    config = of_settings(student={"second_time": where})
    assert config.student.added_time == SecondTime("embed", "waves", 10.0)
    assert settings.to_dict(config)["student"]["second_time"] == where
    with pytest.raises(settings.SettingsError, match="those of an embedder: name that too"):
        of_settings(student={"second_time": {"sinusoids": "waves"}})


def test_a_student_with_a_second_time_is_sampled_by_jumps() -> None:
    stages = [{"steps": 1, "objective": name} for name in ("scm", "mean_flow", "flow_matching")]
    kinds = [of_settings(stages=stages).sampler(i) for i in range(3)]
    assert kinds == ["consistency", "mean_flow", "flow"]
    kinds = [of_settings(stages=stages, student={"second_time": True}).sampler(i) for i in range(3)]
    assert kinds == ["mean_flow", "mean_flow", "flow"]


def test_wrong_combinations_are_refused() -> None:
    one, two = scaling(), add_second_time(scaling(), WHERE)
    stages = of_settings(stages=[{"steps": 1, "objective": name} for name in ("mean_flow", "scm", "flow_matching")])
    average, scm, flow = stages.stages
    sample = Batch(torch.zeros(1, 1, 4, 4), {})
    with pytest.raises(ValueError, match="mean_flow needs a network with a second time, and Scaling takes none: set"):
        check_stage(average, one, {}, sample)
    with pytest.raises(ValueError, match="scm trains the student at r = t alone"):
        check_stage(scm, two, {}, sample, second_time=True)
    for stage in (average, flow):
        check_stage(stage, two, {}, sample, second_time=True)


def test_the_settings_of_a_run_are_written_back(tmp_path: Path) -> None:
    config = of_settings(student={"second_time": True})
    settings.save(config, tmp_path / "config.yaml")
    assert settings.load(RunConfig, tmp_path / "config.yaml") == config
    assert json.loads(json.dumps(settings.to_dict(config)))["student"]["second_time"] is True
