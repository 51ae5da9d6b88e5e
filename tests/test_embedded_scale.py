"""The guidance scale as an input of networks that take none: exact at first, learnt, folded, exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer import settings
from jvpgraph.trainer.cli import main
from jvpgraph.trainer.config import RunConfig, StudentConfig
from jvpgraph.trainer.dit import dit
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.adapters import diffusers_model
from jvpgraph.trainer.model.additions import EMBEDDED, TimeInput, added, fold, of_addition
from jvpgraph.trainer.model.embedded_scale import embed_scale
from jvpgraph.trainer.model.networks import build_student
from jvpgraph.trainer.model.second_time import add_second_time
from jvpgraph.trainer.model.student import make_student
from jvpgraph.trainer.model.told import WithScale
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.start import start_from
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import SCALE, TrigFlow
from tests.distributed.test_train import assert_same_log, lines, train_many
from tests.gaussian import GaussianFlow, seeded
from tests.test_adapters import TABLE, build, latents, normal, times
from tests.test_export import CONDITIONS, LATENTS, LORA, loaded, trained
from tests.test_second_time import FAMILIES, Scaling, minimise, of_wan, relative, scaling
from tests.test_stages import NET, digits, stage
from tests.test_train import content, last_checkpoint

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers")

ALONE = [name for name in FAMILIES if "guidance" not in TABLE[name].cond]
WHERE = TimeInput("embed", "waves")
SEVERAL = {"scale": [2.0, 6.0], "negative": {"labels": 10}}


def awake(model: TrigFlow) -> TrigFlow:
    """As if what was added were trained."""
    for parameter, value in model.net.named_parameters():
        if of_addition(parameter):
            value.data = 0.2 * torch.randn(value.shape, generator=seeded(value.numel())).to(value.dtype)
    return model


def with_scale(name: str, dtype: str = "float32", **more: Any) -> TrigFlow:
    return awake(embed_scale(build(name, dtype, **more)))


def told(cond: Any, *scales: float) -> dict[str, Tensor]:
    return {**cond, "guidance": torch.tensor(scales)}


class Listening(Scaling):
    """It knows a condition `guidance`."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        return super().forward(x, t) * (1 if guidance is None else guidance[:, None, None, None])


def listening() -> TrigFlow:
    return TrigFlow(Listening())


# ---------------------------------------------------------------- what it is


@pytest.mark.sampled(7)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_one_scale_is_a_bias(name: str, dtype: str) -> None:
    """Beside a second time, and without touching the network that shares the parameters."""
    x, t, cond = latents(name), times(), TABLE[name].cond
    model = awake(add_second_time(embed_scale(build(name, dtype))))
    wanted, other = (model(x, t, told(cond, w, w), t / 2) for w in (3.0, 4.0))
    fixed = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    fold(fixed.net, EMBEDDED, 3.0)
    fixed.call = add_second_time(build(name, dtype)).call
    names = build(name, dtype).net.state_dict().keys()
    assert {key for key in fixed.net.state_dict() if not of_addition(key)} == names
    assert EMBEDDED not in added(fixed.net)
    error = relative(fixed(x, t, cond, t / 2), wanted)
    assert error < {"float32": 3e-6, "bfloat16": 3e-2}[dtype]
    assert relative(other, wanted) > 3 * error
    assert torch.equal(model(x, t, told(cond, 3.0, 3.0), t / 2), wanted)


@torch.no_grad()
def test_a_network_that_was_given_a_scale_needs_one() -> None:
    name = "SD3Transformer2DModel"
    model, x, t, cond = with_scale(name), latents(name), times(), TABLE[name].cond
    with pytest.raises(ValueError, match=r"this SD3Transformer2DModel learnt more than one .* the condition guidance"):
        model(x, t, cond)
    with pytest.raises(ValueError, match="embed is added to, and its network is called without the number"):
        embed_scale(scaling(), WHERE).net(normal(2, 1, 4, 4).float(), t.float())
    both = model(x, t, told(cond, 2.0, 5.0))
    assert torch.equal(both[:1], model(x, t, told(cond, 2.0, 7.0))[:1])  # each sample has its own
    assert embed_scale(model) is model
    assert list(added(model.net)) == [EMBEDDED]


def test_an_embedder_without_a_last_bias_cannot_hold_it() -> None:
    model = scaling()
    model.net.embed = nn.Sequential(*model.net.embed, nn.SiLU())
    embed_scale(model, WHERE)
    with pytest.raises(ValueError, match="embed of Scaling does not end with a linear layer that has a bias"):
        fold(model.net, EMBEDDED, 2.0)


@torch.no_grad()
def test_a_linear_layer_alone_can_hold_it() -> None:
    model = scaling()
    model.net.embed = nn.Linear(16, 64)
    awake(embed_scale(model, WHERE))
    x, t = normal(2, 1, 4, 4), times()
    wanted = model(x, t, told({}, 3.0, 3.0))
    fold(model.net, EMBEDDED, 3.0)
    assert relative(TrigFlow(model.net)(x, t, {}), wanted) < 1e-6


@pytest.mark.parametrize("how", ["called twice", "tied"])
def test_a_last_layer_that_others_use_cannot_hold_it(how: str) -> None:
    model, last = scaling(), nn.Linear(64, 64)
    model.net.embed = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), last, *([nn.SiLU(), last] * (how == "called twice")))
    if how == "tied":
        model.net.head[1].bias = last.bias
    embed_scale(model, WHERE)
    with pytest.raises(ValueError, match="a linear layer that has a bias of its own and is called once"):
        fold(model.net, EMBEDDED, 2.0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_added_is_kept_in_float32_where_the_embedder_is(dtype: str) -> None:
    name = "WanTransformer3DModel"
    student = make_student(
        build(name, dtype),
        dtype="bfloat16",
        lora=None,
        checkpoint_blocks=False,
        second_time=TimeInput(),
        scale=TimeInput(),
    )
    assert {p.dtype for key, p in awake(student).net.named_parameters() if of_addition(key)} == {torch.float32}
    x, t, cond = latents(name), times(), TABLE[name].cond
    wanted = student(x, t, told(cond, 3.0, 3.0), t / 2)
    fold(student.net, EMBEDDED, 3.0)
    student.call = add_second_time(build(name, dtype)).call
    assert relative(student(x, t, cond, t / 2), wanted) < 2e-2


@pytest.mark.long
def test_a_guided_velocity_is_learnt_at_all_scales() -> None:
    """Of Gaussian data without and with a narrower condition: a velocity a(t, w) x. To 2 % between 1 and 8."""
    rng, model = seeded(3), embed_scale(scaling(torch.float64), WHERE)
    plain, narrow = GaussianFlow(), GaussianFlow(0.3)

    def error(t: Tensor, w: Tensor) -> Tensor:
        x = normal(len(t), 1, 4, 4, seed=5)
        F, F_negative = narrow(x, t, {}), plain(x, t, {})
        wanted = F_negative + w[:, None, None, None] * (F - F_negative)
        off = model(x, t, {"guidance": w}) - wanted
        return off.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).mean()

    def drawn() -> Tensor:
        t = torch.empty(128, dtype=torch.float64).uniform_(0.2, 1.4, generator=rng)
        return error(t, torch.empty(128).uniform_(1, 8, generator=rng)).square()

    t, w = torch.meshgrid(torch.linspace(0.3, 1.3, 9).double(), torch.linspace(1.2, 7.7, 9).double(), indexing="ij")
    minimise(model, drawn, 1500)
    with torch.no_grad():
        assert error(t.flatten(), w.flatten()).mean() < 0.02


# ---------------------------------------------------------------- graphs


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_is_an_input_of_graphs(dtype: str) -> None:
    """Values, tangents and gradients of two scales by one graph of the default backend, and by torch.compile."""
    name, tolerance = "WanTransformer3DModel", {"float32": 1e-5, "bfloat16": 4e-2}[dtype]
    base = awake(add_second_time(embed_scale(build(name, dtype, config={"num_layers": 1}))))
    base.call = WithScale(base.call, 4.0)
    model, exact = copy.deepcopy(base), copy.deepcopy(base).double()
    reference = jvpgraph.transform(exact, backend="eager")
    dual = jvpgraph.transform(model, dynamic=False, regions="auto")
    x, t, cond = latents(name), times(), TABLE[name].cond
    tangents = {"x": normal(*x.shape, seed=7), "t": torch.ones_like(t)}
    compiled = copy.deepcopy(base)
    compiled.compile(backend=jvpgraph.backend(), dynamic=False)
    seen, graphs = list[Tensor](), list[int]()
    for scale in (2.0, 6.0):
        own = {**cond, SCALE: torch.full((len(x),), scale)}
        F, F_dot = dual(x, t, own, t / 2, tangents=tangents)
        wanted, wanted_dot = reference(x, t, own, t / 2, tangents=tangents)
        assert relative(F, wanted) < tolerance
        assert relative(F_dot, wanted_dot) < tolerance
        with torch.no_grad():
            assert relative(compiled(x, t, own, t / 2), wanted) < tolerance
        for network, answer in ((model, F), (exact, wanted)):
            network.zero_grad()
            answer.square().sum().backward()
        for (key, p), q in zip(model.named_parameters(), exact.parameters()):
            if of_addition(key, [EMBEDDED]):
                assert q.grad.any()
                assert relative(p.grad, q.grad) < 3 * tolerance, key
        seen.append(wanted.detach())
        graphs.append(len(dual.reports))
    assert graphs[0] == graphs[1] > 0
    assert relative(*seen) > 3 * tolerance


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"student": {"embed_scale": True}},
            "embed_scale tells a student its .* is one number: give two",
        ),
        (
            {"guidance": SEVERAL, "sampling": {"guidance": 8}},
            "guidance is 8, and the student learns scales from 2 to 6",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(settings.SettingsError, match=said):
        digits(tmp_path, [stage("scm")], **more)


def test_one_place_is_enough_for_both() -> None:
    place = TimeInput("embed", "waves", 10.0)
    assert StudentConfig(second_time=True, embed_scale=place).added_time == place
    both = StudentConfig(second_time=place, embed_scale=True)
    assert both.added_scale == place
    assert both.fake_score.added_time is None
    assert both.fake_score.added_scale == place
    assert StudentConfig(embed_scale=True).added_scale == TimeInput()
    assert StudentConfig(second_time=place).added_scale is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {
                "model": {"load": "tests.test_embedded_scale:listening"},
                "student": {"embed_scale": {"embedder": "embed", "sinusoids": "waves"}},
            },
            "embed_scale is for networks that take no guidance scale, and Listening takes it .* to false",
        ),
        (
            {
                "model": {"load": "net.py:model"},
                "fake_score": {"network": "teacher"},
                "stages": [stage("dmd")],
            },
            "so is the fake score, which starts from the teacher's network, and that does not look at it. Set fake_sc",
        ),
    ],
    ids=["an input of its own", "fake score"],
)
def test_refused_before_the_first_step(tiny_folder: Path, more: dict[str, Any], said: str) -> None:
    Path("net.py").write_text(NET)
    with pytest.raises(ValueError, match=said):
        train(digits(Path("run"), **{"stages": [stage("scm")], "guidance": SEVERAL, **more}))
    assert not Path("run").exists()


# ---------------------------------------------------------------- runs


@pytest.mark.long
def test_the_digits_are_told_their_scale_and_the_fake_score_is_too(tmp_path: Path) -> None:
    """A run that stops goes on to the bit; samples, exports and networks that are loaded know the scale."""
    student = {"backend": "eager", "embed_scale": True}
    config = digits(tmp_path / "run", [stage("rcm") | {"steps": 3}], guidance=SEVERAL, student=student)
    run = train(config)
    found = content(last_checkpoint(run), tmp_path / "scratch.pt")
    last = {key: value for key, value in found.items() if f"{EMBEDDED}.embedder.mlp.2.weight" in key}
    assert {key.split(".")[1] for key in last} >= {"student", "fake"}, sorted(last)
    assert all(value.any() for value in last.values())

    stopped = digits(tmp_path / "stopped", [stage("rcm") | {"steps": 2}], guidance=SEVERAL, student=student)
    train(stopped)
    on = train(digits(tmp_path / "stopped", [stage("rcm") | {"steps": 3}], guidance=SEVERAL, student=student))
    assert lines(on)[-1]["loss"] == lines(run)[-1]["loss"]

    x, t, cond = normal(2, 1, 8, 8), times(), {"labels": torch.tensor([3, 10])}
    with torch.no_grad():
        model = load_run(run).student
        wanted = {w: model(x, t, {**cond, SCALE: torch.full((2,), w)}) for w in (2.0, 4.0)}
        assert not torch.equal(wanted[2.0], wanted[4.0])
        assert torch.equal(model(x, t, cond), wanted[4.0])  # the middle
        assert torch.equal(load_run(run, guidance=2.0).student(x, t, cond), wanted[2.0])
        kept = dit(export_run(run, tmp_path / "kept", keep_scale=True))
        assert torch.equal(kept(x, t, told(cond, 2.0, 2.0)), wanted[2.0])
        fixed = dit(export_run(run, tmp_path / "fixed", guidance=2.0))
        assert relative(fixed(x, t, cond), wanted[2.0]) < 1e-6
    assert not added(fixed.net)
    assert "Its guidance scale is 2, of those that it learnt." in (tmp_path / "fixed/README.md").read_text()
    again = embed_scale(dit(width=16, depth=1, heads=2))
    start_from(again, tmp_path / "fixed")  # where its own scale begins from that one
    assert relative(again(x, t, told(cond, 5.0, 5.0)), wanted[2.0]) < 1e-6
    with pytest.raises(ValueError, match="guidance is 7, and the student learns scales from 2 to 6"):
        load_run(run, guidance=7.0)
    with pytest.raises(ValueError, match="LoRA files hold no biases"):
        export_run(run, tmp_path / "lora", format="lora", rank=2)


@torch.no_grad()
def asked(model: TrigFlow, name: str, scale: float | None = None, *, jump: bool = False) -> Tensor:
    rng = seeded(11)
    x = torch.randn(2, *LATENTS[name], generator=rng, dtype=torch.float64)
    cond = {key: torch.randn(2, *shape, generator=rng) for key, shape in CONDITIONS[name].items()}
    t = torch.tensor([1.2, 0.8], dtype=torch.float64)
    return model(x, t, cond if scale is None else told(cond, scale, scale), *([t / 4] if jump else []))


def several(name: str, folder: Path) -> list[str]:
    """Overrides for a student of the pipeline `name` that is told scales from 2 to 6."""
    negative = folder / "negative.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in CONDITIONS[name].items()}, negative)
    return ["student.embed_scale=true", "guidance.scale=[2, 6]", f"guidance.negative_file={negative}"]


@pytest.mark.long
@pytest.mark.parametrize("more", [(), (LORA,)], ids=["whole", "LoRA"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_plain_pipelines_sample_it_at_one_scale(name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    run = trained(name, tmp_path, *several(name, tmp_path), *more, "stages.0.objective=rcm", steps=2)
    student = load_run(run).student
    assert not torch.equal(student_at(run, name, 2.0), student_at(run, name, 6.0))
    for scale, given in ((4.0, []), (2.5, ["--guidance", "2.5"])):
        out = tmp_path / f"at-{scale}"
        assert main(["export", str(run), "--out", str(out), *given]) == 0
        pipe = loaded(out)
        assert pipe.transformer.state_dict().keys() == loaded(tmp_path / "checkpoint").transformer.state_dict().keys()
        assert relative(asked(diffusers_model(out), name), student_at(run, name, scale)) < 1e-5
        text = (out / "README.md").read_text()
        assert f"Its guidance scale is {scale:g}, of those that it learnt." in text
        assert f"guidance_scale={scale:g}" not in text  # that of the pipeline would be on top
    out = export_run(run, tmp_path / "kept", keep_scale=True)
    kept = diffusers_model(out)
    assert relative(asked(kept, name, 2.5), student_at(run, name, 2.5)) < 1e-5
    assert "the condition `guidance` [B]" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match=r"no pipeline of diffusers tells a .* scale of student.embed_scale"):
        export_run(run, tmp_path / "none", keep_scale=True, pipeline=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="LoRA files hold no biases"):
        export_run(run, tmp_path / "none", format="lora")
    if not more:
        again = build_student(load_run(run).teacher, StudentConfig(embed_scale=True))
        start_from(again, out)
        assert torch.equal(asked(again, name, 2.5), student_at(run, name, 2.5))
    assert EMBEDDED in added(student.net)  # which the exports have left alone


def student_at(run: Path, name: str, scale: float) -> Tensor:
    return asked(load_run(run, guidance=scale).student, name)


@pytest.mark.long
def test_a_wan_with_a_second_time_goes_into_anyflow(tmp_path: Path) -> None:
    more = ("student.second_time=true", "stages.0.objective={name: mean_flow, instant_share: 0.25}")
    run = trained("wan", tmp_path, *several("wan", tmp_path), *more, steps=2)
    out = export_run(run, tmp_path / "out", guidance=2.5)
    assert type(loaded(out).transformer) is diffusers.AnyFlowTransformer3DModel
    wanted = asked(load_run(run, guidance=2.5).student, "wan", jump=True)
    assert relative(asked(diffusers_model(out), "wan", jump=True), wanted) < 1e-5
    assert relative(asked(load_run(run).student, "wan", jump=True), wanted) > 1e-4
    kept = export_run(run, tmp_path / "kept", keep_scale=True)
    assert json.loads((kept / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    assert torch.equal(asked(diffusers_model(kept), "wan", 2.5, jump=True), wanted)


@pytest.mark.long
@pytest.mark.parametrize(
    "student",
    [{}, {"checkpoint_blocks": True, "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}],
    ids=["whole", "LoRA, checkpointed"],
)
def test_it_is_sharded_and_goes_on(tmp_path: Path, student: dict[str, Any]) -> None:
    def config(out: str, steps: int, parallel: str | None = None) -> RunConfig:
        data = settings.to_dict(of_wan(tmp_path / out, steps, parallel, **student))
        data["student"]["embed_scale"] = True
        data["guidance"] = {"scale": [2.0, 6.0], "negative": {"encoder_hidden_states": [[0.0] * 16] * 6}}
        return settings.from_dict(RunConfig, data)

    one = train(config("one", 4))
    many = train_many(config("many", 4, "FSDP2"), "FSDP2")
    assert_same_log(many, one, tolerance=1e-3)
    train(config("stopped", 2))
    assert lines(train(config("stopped", 4)))[-1]["loss"] == lines(one)[-1]["loss"]
    learnt = [p for key, p in load_run(many).student.named_parameters() if f"{EMBEDDED}.embedder.linear_2" in key]
    assert learnt
    assert all(p.any() for p in learnt)
