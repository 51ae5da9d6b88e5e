"""A second time for networks that know one: the teacher at first, exact tangents, export, and what it learns."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jvpgraph
from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig, StudentConfig
from jvpgraph.trainer.dit import dit
from jvpgraph.trainer.evaluation import samplers
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.export.prompts import sample_prompts
from jvpgraph.trainer.model.adapters import diffusers_model
from jvpgraph.trainer.model.additions import KNOWN, TimeInput, of_addition
from jvpgraph.trainer.model.anyflow import as_anyflow, fits_anyflow, from_anyflow
from jvpgraph.trainer.model.embedded_scale import embed_scale
from jvpgraph.trainer.model.networks import build_student, check_stage
from jvpgraph.trainer.model.saved_additions import saved_with
from jvpgraph.trainer.model.second_time import add_second_time, takes_r
from jvpgraph.trainer.model.student import LoRA, make_student
from jvpgraph.trainer.model.told import WithConditions
from jvpgraph.trainer.objectives import MeanFlow
from jvpgraph.trainer.objectives.mean_flow import mean_flow_loss
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.start import start_from
from jvpgraph.trainer.times import ShiftedUniform
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow, level
from tests.distributed.test_train import WAN, assert_same_log, config_of, lines, stage, train_many
from tests.gaussian import STD, ExactDual, GaussianAverage, GaussianFlow, gaussian_batch, seeded
from tests.test_adapters import TABLE, build, latents, normal, times
from tests.test_export import ARGUMENTS, CONDITIONS, LATENTS, LORA, loaded, trained
from tests.test_train import config_of as digits_config

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers")

TWO_ALREADY = {"HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel"}  # as the zoo has them
FAMILIES = sorted(KNOWN.keys() - TWO_ALREADY)


def with_second_time(name: str, dtype: str = "float32", *, awake: bool = True, **more: Any) -> TrigFlow:
    """The zoo's network with a second time; awake: as if it were trained."""
    model = add_second_time(build(name, dtype, **more))
    for parameter, value in model.net.named_parameters():
        if awake and of_addition(parameter):
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
    awake, told = with_second_time(name, dtype), cond
    if "guidance" not in cond:  # else it is told that by itself
        told = {**cond, "guidance": torch.tensor([2.0, 7.5])}
        both = embed_scale(student)
        assert takes_r(both)
        assert torch.equal(both(x, t, told, t / 2), teacher(x, t, cond))
        trained = embed_scale(awake)
        for parameter in trained.net.guidance_scale.parameters():
            parameter.data = parameter.data + 0.1
        other = {**cond, "guidance": torch.tensor([2.0, 6.5])}
        assert torch.equal(trained(x, t, told)[:1], trained(x, t, other)[:1])
        assert not torch.equal(trained(x, t, told)[1:], trained(x, t, other)[1:])
    assert torch.equal(awake(x, t, told), awake(x, t, told, t))  # no r is t
    assert (awake(x, t, told, t / 2) - awake(x, t, told)).norm() > 1e-3 * awake(x, t, told).norm()


def test_names_of_the_teacher_stay_and_copies_are_their_own() -> None:
    name = "FluxTransformer2DModel"
    teacher, student = build(name, "float32"), with_second_time(name)
    new = student.net.state_dict().keys() - teacher.net.state_dict().keys()
    assert new
    assert all(map(of_addition, new))
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
    student = make_student(teacher, dtype=None, lora=lora, checkpoint_blocks=False, second_time=TimeInput())
    trained = [key for key, p in student.named_parameters() if p.requires_grad]
    assert {key for key in trained if of_addition(key)} == {
        key for key, _ in student.named_parameters() if of_addition(key)
    }
    assert all(of_addition(key) or ".lora_" in key for key in trained)
    assert not any(of_addition(key) and ".lora_" in key for key in trained)
    x, t, cond = latents(name), times(), TABLE[name].cond
    student(x, t, cond, t / 2).square().sum().backward()
    assert all(p.grad is not None for key, p in student.named_parameters() if of_addition(key))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_the_fake_score_has_one_time() -> None:
    teacher, config = build("WanTransformer3DModel", "float32"), StudentConfig(second_time=True)
    assert takes_r(build_student(teacher, config))
    assert not takes_r(build_student(teacher, config.fake_score))
    assert not takes_r(teacher)


@torch.no_grad()
def test_the_digits_network_is_asked_at_t_where_there_is_no_r() -> None:
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


def test_adapters_alone_cannot_learn_a_second_time() -> None:
    teacher, lora = dit(width=16, depth=1, heads=2), LoRA(rank=2, alpha=2.0, targets=("qkv",))
    how: Any = {"dtype": None, "lora": lora, "checkpoint_blocks": False, "second_time": TimeInput()}
    student = make_student(teacher, **how)
    assert all(p.requires_grad for p in student.net.interval.parameters())
    assert not {*student.net.interval.parameters()} & {*teacher.net.parameters()}
    teacher.net.apart = teacher.net.interval
    del teacher.net.interval
    with pytest.raises(ValueError, match=r"DiT brings its second time itself.*call the module .* `interval`"):
        make_student(teacher, **how)
    make_student(teacher, **{**how, "lora": None})


# ---------------------------------------------------------------- networks of one's own


class Parts(nn.Module):
    """Of the digits, with an embedding of the time that is made in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.waves = how, Waves()
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        if how == "compiled":
            self.embed = torch.compile(self.embed, backend="eager")
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 64)

    def embedded(self, t: Tensor) -> Tensor:
        h = self.waves(t).to(self.first.weight.dtype)
        if self.how == "layer by layer":
            for layer in self.embed:
                h = layer(h)
            return h
        return self.embed.forward(h) if self.how == "by a method" else self.embed(h)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        kept = self.how == "checkpointed" and torch.is_grad_enabled()
        e = checkpoint(self.embedded, t, use_reentrant=False) if kept else self.embedded(t)
        return self.last((self.first(x.flatten(1)) + e).tanh()).unflatten(1, x.shape[1:])


def parts(how: str) -> TrigFlow:
    return TrigFlow(Parts(how))


PLACE = {"embedder": "embed", "sinusoids": "waves"}
JUMPS = {"name": "dmd", "rollout": "jumps", "fake_updates_per_step": 1}


def of_parts(out: Path, how: str, stages: list[Any], student: dict[str, Any], **more: Any) -> RunConfig:
    model = {"load": f"{__name__}:parts", "options": {"how": how}}
    return digits_config(out, stages, model=model, student={"backend": "eager", **student}, **more)


@pytest.mark.parametrize("setting", ["second_time", "embed_scale"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("layer by layer", "embed is not called as a module in Parts, so that what is added .* is passed by"),
        ("by a method", "embed is not called as a module in Parts"),
        ("compiled", r"embed of Parts is compiled by torch.compile\(module\).*\nCompile it in place"),
        ("checkpointed", "embed is computed again in the backward"),
    ],
    ids=["layer by layer", "by a method", "compiled", "checkpointed"],
)
def test_what_passes_the_addition_by_is_refused_before_the_first_step(
    tmp_path: Path, how: str, said: str, setting: str
) -> None:
    """It trained to the end, and neither r nor the scale changed anything."""
    stages = [stage("flow_map", 1), stage(JUMPS, 1)] if setting == "second_time" else [stage("dcm", 1)]
    several = {"scale": [2.0, 6.0], "negative": {"labels": 10}}
    more = {"guidance": several} if setting == "embed_scale" else {}
    with pytest.raises(ValueError, match=said):
        train(of_parts(tmp_path / "run", how, stages, {setting: PLACE}, **more))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_checkpointed_embedder_trains_where_graphs_alone_do(tmp_path: Path) -> None:
    lines_of = [
        lines(train(of_parts(tmp_path / how, how, [stage("flow_map", 2)], {"second_time": PLACE})))
        for how in ("checkpointed", "whole")
    ]
    assert lines_of[0] == lines_of[1]


def test_a_module_that_is_called_as_ours_is_none(tmp_path: Path) -> None:
    model = parts("whole")
    model.net.time_input = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="it is not known where Parts takes its time in"):
        add_second_time(model)
    model.net.block = nn.ModuleDict({"interval": nn.Linear(32, 32)})
    lora = LoRA(rank=2, alpha=2.0, targets=("first",))
    student = make_student(model, dtype=None, lora=lora, checkpoint_blocks=False, second_time=TimeInput(**PLACE))
    assert not student.net.block["interval"].weight.requires_grad
    assert all(p.requires_grad for p in student.net.interval.parameters())


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


WHERE = TimeInput("embed", "waves")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (TimeInput(), "not known where Scaling takes its time in\nName the module that embeds its time"),
        (TimeInput("embedding"), "Scaling has no module embedding"),
        (TimeInput("embed", "sinus"), "Scaling has no module sinus"),
        (TimeInput("waves"), "waves has no linear layer"),
    ],
)
def test_places_that_are_not_there(where: TimeInput, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_second_time(scaling(), where)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(nn.functional.silu(self.inner(x)))


TAILS: dict[str, Callable[[], nn.Module]] = {
    "a norm": lambda: nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.LayerNorm(64)),
    "a sigmoid": lambda: nn.Sequential(nn.Linear(16, 64), nn.Sigmoid()),
    "a sum": lambda: nn.Sequential(Residual(), nn.Identity()),
}


@pytest.mark.parametrize("give", [add_second_time, embed_scale])
@pytest.mark.parametrize("tail", TAILS)
def test_what_does_not_begin_as_nothing_is_refused(tail: str, give: Any) -> None:
    model = scaling()
    model.net.embed = TAILS[tail]()
    nn.init.constant_(list(model.net.embed.parameters())[-1], 0.1)
    if tail == "a sum":
        model.net.head[1] = nn.Linear(16, 64)
    before = list(model.net.state_dict())
    with pytest.raises(ValueError, match="embed does not end with its last linear layer, so that it cannot be copied"):
        give(model, WHERE)
    assert list(model.net.state_dict()) == before
    model(normal(2, 1, 4, 4), times(), {})
    model = scaling()
    with pytest.raises(
        ValueError, match=r"(?s)embed makes no embedding \[1, C\] of a time \[1\], float32, but.*sinusoids"
    ):
        give(model, TimeInput("embed"))
    model.net.embed = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"makes no embedding \[1, C\] of a time \[1\], float32, but \[64\]"):
        give(model, TimeInput("embed"))


@pytest.mark.parametrize("r", [None, 0.3])
def test_an_embedder_that_the_backward_runs_again_is_refused(r: float | None) -> None:
    """Its number is gone by then: another gradient came out, and no word."""
    name, parent = "DiTTransformer2DModel", "transformer_blocks.0.norm1.emb"
    where = TimeInput(f"{parent}.timestep_embedder", f"{parent}.time_proj")
    student = make_student(build(name, "float32"), dtype=None, lora=None, checkpoint_blocks=True, second_time=where)
    t = times()
    answer = student(latents(name), t, TABLE[name].cond, None if r is None else r * t)
    with pytest.raises(ValueError, match=r"computed again in the backward.*\n.*checkpoint_blocks"):
        answer.square().sum().backward()


def test_conditions_that_are_the_same_for_all_stay_with_a_second_time() -> None:
    teacher, x, t = dit(width=16, depth=1, heads=2), normal(2, 1, 8, 8), times()
    for parameter in teacher.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    teacher.call = WithConditions(teacher.call, {"labels": 3})
    student = build_student(teacher, StudentConfig(second_time=True))
    assert takes_r(student)
    with torch.no_grad():
        wanted = teacher(x, t, {"labels": torch.tensor([3, 3])}, t)
        assert torch.equal(student(x, t, {}, t), wanted)
        assert not torch.equal(student(x, t, {"labels": torch.tensor([4, 4])}, t), wanted)


def test_what_is_no_embedding_is_named() -> None:
    name = "PixArtTransformer2DModel"
    with pytest.raises(ValueError, match=r"adaln_single makes no embedding \[1, C\] of a time"):
        add_second_time(build(name, "float32"), TimeInput("adaln_single"))
    model = scaling().to("meta")  # where nothing is tried
    model.net.embed.register_forward_hook(lambda module, args, out: (out, out))
    add_second_time(model, WHERE)
    with pytest.raises(TypeError, match=r"Sequential gives a tuple, not an embedding \[B, C\]"):
        model(normal(2, 1, 4, 4).to("meta"), times().to("meta"), {})


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
    assert all(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if of_addition(key))

    with torch.no_grad():  # the reference itself, along r alone
        step, fixed = 1e-4, {"r": ones}
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
    assert of_settings(student={"second_time": True}).student.added_time == TimeInput()
    where = {"embedder": "embed", "sinusoids": "waves", "scale": 10.0}
    config = of_settings(student={"second_time": where})
    assert config.student.added_time == TimeInput("embed", "waves", 10.0)
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
    for each in (average, flow):
        check_stage(each, two, {}, sample, second_time=True)


def test_the_settings_of_a_run_are_written_back(tmp_path: Path) -> None:
    config = of_settings(student={"second_time": True})
    settings.save(config, tmp_path / "config.yaml")
    assert settings.load(RunConfig, tmp_path / "config.yaml") == config
    assert json.loads(json.dumps(settings.to_dict(config)))["student"]["second_time"] is True


AVERAGE = ("student.second_time=true", "stages.0.objective={name: mean_flow, instant_share: 0.25}")


@torch.no_grad()
def asked(model: TrigFlow, name: str) -> list[Tensor]:
    """Jumps, and the velocity."""
    rng = seeded(11)
    x = torch.randn(2, *LATENTS[name], generator=rng, dtype=torch.float64)
    cond = {key: torch.randn(2, *shape, generator=rng) for key, shape in CONDITIONS[name].items()}
    t = torch.tensor([1.2, 0.8], dtype=torch.float64)
    return [model(x, t, cond, t / 4), model(x, t, cond)]


GAMMA = ("sampling.gamma=0.8", "sampling.sigma_max=80")


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("more", [(), (LORA,), GAMMA], ids=["whole", "LoRA", "gamma"])
def test_a_wan_student_is_sampled_by_the_pipeline_of_anyflow(
    dtype: str, tolerance: float, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained("wan", tmp_path, *AVERAGE, f"model.options.dtype={dtype}", "sampling.shift=3", *more, steps=2)
    run = load_run(folder)
    assert run.sampler == "mean_flow"
    learnt = [p for key, p in run.student.named_parameters() if of_addition(key) and "linear_2" in key]
    assert learnt
    assert all(p.any() for p in learnt)
    out = export_run(folder, tmp_path / "out")
    noises = [torch.randn(1, *LATENTS["wan"], generator=seeded(seed)).double() for seed in range(3)]
    between = (noise.transpose(1, 2) for noise in noises[1:])  # the pipeline has frames first
    monkeypatch.setattr("diffusers.utils.torch_utils.randn_tensor", lambda *how: next(between).to(how[3]))
    trust = {"trust_remote_code": True} if more is GAMMA else {}
    pipe = loaded(out, torch_dtype=getattr(torch, dtype), **trust)
    assert type(pipe) is diffusers.AnyFlowPipeline
    assert type(pipe.transformer) is diffusers.AnyFlowTransformer3DModel
    scheduler = "GammaScheduler" if more is GAMMA else "FlowMapEulerDiscreteScheduler"
    assert type(pipe.scheduler).__name__ == scheduler
    for found, wanted in zip(asked(diffusers_model(out, dtype=dtype), "wan"), asked(run.student, "wan")):
        assert relative(found, wanted) < tolerance

    start = level(run.config.sampling.start("mean_flow")) * noises[0].float()
    found = pipe("a cat", latents=start, num_inference_steps=3, output_type="latent", **ARGUMENTS["wan"])[0]
    text = pipe.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=16)[0]
    own = iter(noises)
    monkeypatch.setattr(samplers, "noise_like", lambda x, rng: next(own))
    sample = samplers.sampler_of(run.sampler, run.student, 3, run.config.sampling)
    wanted = sample(Batch(noises[0], {"encoder_hidden_states": text.float()}), seeded())
    assert relative(found, wanted) < tolerance
    assert (next(own, None) is None) == (more is GAMMA)
    assert ("trust_remote_code" in (out / "README.md").read_text()) == (more is GAMMA)


@pytest.mark.long
def test_prompts_of_a_wan_student_are_sampled_by_jumps_too(tmp_path: Path) -> None:
    """In memory as from the exported folder; and other formats say that they know one time."""
    folder = trained("wan", tmp_path, *AVERAGE)
    size = {key: value for key, value in ARGUMENTS["wan"].items() if key != "guidance_scale"}
    (file,) = sample_prompts(folder, ["a cat"], out=tmp_path / "prompts", steps=2, seed=3, more=size)
    pipe = loaded(export_run(folder, tmp_path / "out"))
    made = pipe(
        "a cat",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        output_type="pil",
        **ARGUMENTS["wan"],
    )[0][0]
    with Image.open(file) as picture:
        picture.seek(1)
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(made[1].convert("RGB")))
    for format in ("lora", "comfyui"):
        with pytest.raises(ValueError, match=r"the student takes two times, and .* it one\nUse --format diffusers"):
            export_run(folder, tmp_path / format, format=format)
    assert "AnyFlowPipeline" in json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"]


@pytest.mark.long
def test_other_networks_say_in_their_config_where_they_have_it(tmp_path: Path) -> None:
    folder = trained("flux", tmp_path, *AVERAGE, steps=2)
    out = export_run(folder, tmp_path / "out")
    student = load_run(folder).student
    model = diffusers_model(out)
    assert takes_r(model)
    for found, wanted in zip(asked(model, "flux"), asked(student, "flux")):
        assert torch.equal(found, wanted)
    assert "F = model(x_t, t, conditions, r)" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="a FluxTransformer2DModel takes two times, and the one pipeline"):
        export_run(folder, tmp_path / "pipeline", pipeline=tmp_path / "checkpoint")

    diffusers.FluxTransformer2DModel.from_pretrained(out).save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"and 4 of its tensors are missing, such as interval\."):
        diffusers_model(tmp_path / "again")


@pytest.mark.long
def test_a_student_starts_from_earlier_weights(tmp_path: Path) -> None:
    """From what was exported of it: AnyFlow's names for Wan; and from a student that had one time."""
    for name in ("wan", "flux"):
        (tmp_path / name).mkdir()
        first = trained(name, tmp_path / name, *AVERAGE)
        out = export_run(first, tmp_path / name / "out")
        student = build_student(load_run(first).teacher, StudentConfig(second_time=True))
        start_from(student, out)
        for found, wanted in zip(asked(student, name), asked(load_run(first).student, name)):
            assert relative(found, wanted) < 1e-6
        settings_of_run = (tmp_path / name / "run.yaml").read_text()
        assert "second_time" not in settings_of_run
    (tmp_path / "one").mkdir()
    earlier = trained("flux", tmp_path / "one")
    student = build_student(load_run(earlier).teacher, StudentConfig(second_time=True))
    start_from(student, export_run(earlier, tmp_path / "one" / "out"))
    jump, velocity = asked(student, "flux")
    assert torch.equal(velocity, asked_velocity(load_run(earlier).student, "flux"))
    assert torch.equal(jump, velocity)


@torch.no_grad()
def asked_velocity(model: TrigFlow, name: str) -> Tensor:
    """As `asked`, of a network with one time."""
    return asked(add_second_time(copy.deepcopy(model)), name)[1]


def test_an_interval_of_another_unit_is_no_anyflow(tmp_path: Path) -> None:
    """Nor do its weights mean the same elsewhere."""
    place = TimeInput("condition_embedder.time_embedder", "condition_embedder.timesteps_proj", 0.1)
    usual, slow = add_second_time(diffusers_model(**WAN)), add_second_time(diffusers_model(**WAN), place)
    assert fits_anyflow(usual.net)
    assert not fits_anyflow(slow.net)
    for name, net in (("slow", saved_with(slow.net)), ("usual", saved_with(usual.net)), ("any", as_anyflow(usual.net))):
        net.save_pretrained(tmp_path / name)
        of_place, other = (slow, usual) if name == "slow" else (usual, slow)
        start_from(of_place, tmp_path / name)
        with pytest.raises(ValueError, match="the same weights would be another network\nGive the same"):
            start_from(other, tmp_path / name)


@pytest.mark.parametrize(("gate", "kind"), [(0.5, "t-r"), (0.25, "t-r"), (0.25, "r")])
@torch.no_grad()
def test_anyflow_s_own_gates(gate: float, kind: str) -> None:
    name = "AnyFlowTransformer3DModel"
    theirs = build(name, config={"gate_value": gate, "deltatime_type": kind})
    ours = with_second_time("WanTransformer3DModel", "float64", config={"image_dim": None, "added_kv_proj_dim": None})
    if kind == "r":
        with pytest.raises(ValueError, match="this AnyFlow network embeds r, and a Wan with a second time t - r"):
            from_anyflow(theirs.net.state_dict(), theirs.net.config)
        return
    ours.net.load_state_dict(from_anyflow(theirs.net.state_dict(), theirs.net.config))
    x, t, cond = latents(name), times(), TABLE[name].cond
    for r in (None, t / 3):
        assert relative(ours(x, t, cond, r), theirs(x, t, cond, r)) < 1e-6  # its sinusoids are float32
    assert fits_anyflow(ours.net)
    back = TrigFlow(as_anyflow(ours.net), theirs.call, theirs.schedule, time_scale=theirs.time_scale)
    assert relative(back(x, t, cond, t / 3), ours(x, t, cond, t / 3)) < 1e-6
    assert not fits_anyflow(with_second_time("WanTransformer3DModel").net)  # which attends to a picture


OWN = """
from tests.test_second_time import scaling


def teacher():
    return scaling()
"""


@pytest.mark.long
def test_a_network_of_ones_own_comes_back_by_the_code_of_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_teacher.py").write_text(OWN)
    data: dict[str, Any] = {
        "out": str(tmp_path / "run"),
        "model": {"load": f"{tmp_path}/own_teacher.py:teacher"},
        "student": {"backend": "eager", "second_time": {"embedder": "embed", "sinusoids": "waves"}},
        "data": {"source": {"load": "tests.test_export:Noise", "options": {"latents": [1, 8, 8], "conditions": {}}}},
        "stages": [{"steps": 2, "objective": "mean_flow", "batch": 2, "student": {"lr": 1e-2}}],
        "device": "cpu",
    }
    run = train(settings.from_dict(RunConfig, data))
    out = export_run(run, tmp_path / "out")
    (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(str(out))
    made: dict[str, Any] = {}
    exec(code, made)  # as a reader would
    x, t = normal(2, 1, 8, 8), times()
    with torch.no_grad():
        assert torch.equal(made["model"](x, t, {}, t / 2), load_run(run).student(x, t, {}, t / 2))
        assert not torch.equal(made["model"](x, t, {}, t / 2), made["model"](x, t, {}))


# ---------------------------------------------------------------- several processes, and stops


def of_wan(out: Path, steps: int, parallel: str | None = None, **student: Any) -> RunConfig:
    model = {"load": "jvpgraph.trainer.adapters:diffusers_model", "options": {**WAN, "dtype": "float32"}}
    more: dict[str, Any] = {"model": model, "data": {"source": {"load": "tests.distributed.test_train:Videos"}}}
    more |= {"guidance": {}, "student": {"backend": "eager", "second_time": True, **student}}
    return config_of(out, [stage("mean_flow", steps)], parallel, **more)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "student",
    [{}, {"checkpoint_blocks": True, "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}],
    ids=["whole", "LoRA, checkpointed"],
)
def test_it_is_sharded_and_goes_on(tmp_path: Path, student: dict[str, Any]) -> None:
    one = train(of_wan(tmp_path / "one", 4, **student))
    many = train_many(of_wan(tmp_path / "many", 4, "FSDP2", **student), "FSDP2")
    assert_same_log(many, one, tolerance=1e-3)
    train(of_wan(tmp_path / "stopped", 2, **student))
    on = train(of_wan(tmp_path / "stopped", 4, **student))
    assert lines(on)[-1]["loss"] == lines(one)[-1]["loss"]
    learnt = [p for key, p in load_run(many).student.named_parameters() if of_addition(key) and "linear_2" in key]
    assert learnt
    assert all(p.any() for p in learnt)
