"""Stages of a student and a teacher that is another network, with guidance of their own; and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save_file

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.networks import build_network
from jvpgraph.trainer.plan.plan import plan_run
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.run.build import build_networks
from jvpgraph.trainer.run.finished import load_run, sample_run
from jvpgraph.trainer.run.log import RunLog
from jvpgraph.trainer.run.origin import differences, read_origin
from jvpgraph.trainer.run.parallel import joined
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import SCALE, Guided
from tests.test_train import content, last_checkpoint
from tests.tiny_pipelines import make

pytestmark = pytest.mark.usefixtures("one_thread")

LATENT, TEXT = (4, 3, 4, 8), (5, 10)
DIT = {"load": "jvpgraph.trainer.dit:dit", "options": {"width": 16, "depth": 1, "heads": 2}}
DEEPER: dict[str, Any] = {"load": "jvpgraph.trainer.dit:dit", "options": {"width": 24, "depth": 2, "heads": 2}}


def stage(name: str, **more: Any) -> dict[str, Any]:
    few = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    return {"objective": {"name": name}, "steps": 2, "batch": 4, **few, **more}


def digits(out: Path, stages: list[dict[str, Any]], **more: Any) -> RunConfig:
    """A run of the digits whose teacher is deeper and wider than the student."""
    plain = {
        "out": str(out),
        "model": DIT,
        "teacher": {"model": DEEPER},
        "student": {"backend": "eager"},
        "guidance": {"scale": 2.0, "negative": {"labels": 10}},
        "device": "cpu",
        "threads": 1,
        "stages": stages,
        "ema": {"sigma_rel": [0.1]},
        "checkpoint": {"every": 1, "keep": 9},
        "log": {"every": 1, "flops": False},
    }
    return settings.from_dict(RunConfig, plain | more)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- a teacher of its own


@pytest.mark.long
def test_a_small_student_of_a_deeper_wan_in_three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dCM, sCM and DMD, each with a guidance of its own, stopped in the second; then a pipeline samples it."""
    for name, layers in (("teacher", 4), ("small", 2)):
        make("WanPipeline", num_layers=layers).save_pretrained(tmp_path / name)
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "wan.tar")) as shard:
        for i in range(8):
            latent, text = (rng.standard_normal(shape, dtype=np.float32) for shape in (LATENT, TEXT))
            shard.write({"__key__": f"{i:06d}", "latents.npy": latent, "prompt.npy": text})
    save_file({"encoder_hidden_states": torch.zeros(TEXT)}, tmp_path / "negative.safetensors")

    load = "jvpgraph.trainer.adapters:diffusers_model"
    fields = {"latents": "latents.npy", "conditions": {"prompt.npy": "encoder_hidden_states"}}
    source = {"load": "jvpgraph.trainer.data.shards:webdataset", "options": {"urls": f"{tmp_path}/wan.tar", **fields}}
    stages = [
        stage("dcm", guidance={"scale": 5.0}),
        stage("scm", guidance={"interval": [0.1, 0.9]}),
        stage("dmd", guidance={"scale": 3.0}) | {"objective": {"name": "dmd", "fake_updates_per_step": 1}},
    ]

    def configuration(out: str) -> RunConfig:
        return digits(
            tmp_path / out,
            stages,
            model={"load": load, "options": {"path": str(tmp_path / "small")}},
            teacher={"model": {"load": load, "options": {"path": str(tmp_path / "teacher")}}},
            guidance={"scale": 2.0, "negative_file": str(tmp_path / "negative.safetensors")},
            data={"source": source},
        )

    whole = train(configuration("whole"))
    add = RunLog.add

    def interrupted(log: RunLog, step: int, *values: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt
        add(log, step, *values)

    monkeypatch.setattr(RunLog, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(configuration("stopped"))
    monkeypatch.setattr(RunLog, "add", add)
    stopped = train(configuration("stopped"))
    expected, found = (content(last_checkpoint(run), tmp_path / "content.pt") for run in (whole, stopped))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    run = load_run(whole)
    assert len(run.student.net.blocks) == 2
    assert len(run.teacher.net.blocks) == 4
    assert any(not torch.equal(a, b) for a, b in zip(run.student.parameters(), run.base.parameters(), strict=True))
    pipe = diffusers.WanPipeline.from_pretrained(export_run(whole, tmp_path / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.transformer.blocks) == 2
    more = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0}
    (frames,) = pipe("a red thing", generator=torch.Generator().manual_seed(0), output_type="np", **more).frames
    assert frames.shape == (9, 32, 64, 3)
    assert np.isfinite(frames).all()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2.0, "targets": ["qkv"]}], ids=["whole", "lora"])
def test_a_fake_score_starts_as_the_settings_say(tmp_path: Path, network: str, lora: Any) -> None:
    """Of a later stage too, when the student is not any more what it was."""
    student = {"backend": "eager", "lora": lora}
    stages = [stage("dcm"), stage("dmd") | {"objective": {"name": "dmd", "fake_updates_per_step": 1}, "steps": 1}]
    config = digits(tmp_path / "run", stages, student=student, fake_score={"network": network})
    with joined(config) as layout:
        networks = build_networks(config, layout)
        with torch.no_grad():
            for parameter in networks.student.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        fake = networks.new_student()
        expected = build_network(config, layout.device, "model" if network == "student" else "teacher.model")
    theirs = {name.replace(".base_layer.", "."): p for name, p in fake.named_parameters()}
    for name, parameter in expected.named_parameters():
        assert torch.equal(theirs[name], parameter), name
    if lora is not None:
        shared = networks.student if network == "student" else networks.teacher
        frozen = {id(p) for p in shared.parameters()}
        assert all(id(p) in frozen for p in fake.parameters() if not p.requires_grad)
    train(config)


@pytest.mark.slow
def test_a_run_with_a_teacher_of_its_own_keeps_to_both_networks(tmp_path: Path) -> None:
    """Another teacher, and another start of the student, are refused in going on, and taken with --change."""
    out, one = tmp_path / "run", [stage("dcm", steps=1)]
    train(digits(out, one))
    longer = [stage("dcm", steps=2)]
    other = {"load": DEEPER["load"], "options": {**DEEPER["options"], "heads": 4}}
    with pytest.raises(ValueError, match=r"teacher\.model\.options\.heads"):
        train(digits(out, longer, teacher={"model": other}))
    train(digits(out, longer, teacher={"model": other}), change=["teacher.model"])
    assert len(losses(out)) == 2
    origin = read_origin(out)
    assert origin is not None
    assert origin.base != origin.teacher
    assert list(differences(origin, replace(origin, base="another"))) == ["model"]
    assert list(differences(origin, replace(origin, teacher="another"))) == ["teacher.model"]


@pytest.mark.long
def test_the_plan_counts_both_networks(tmp_path: Path) -> None:
    """The deeper teacher's blocks are no part of student and fake score."""
    stages = [stage("dmd")]
    (own,) = plan_run(digits(tmp_path / "a", stages), processes=1)
    (same,) = plan_run(digits(tmp_path / "b", stages, teacher={}), processes=1)
    for name in ("student", "fake score", "averages"):
        assert own.resident[name] == same.resident[name]
    teacher = build_network(digits(tmp_path / "a", stages), torch.device("cpu"), "teacher.model")
    assert own.resident["teacher"] == sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers()))
    assert own.flops > same.flops


# ---------------------------------------------------------------- guidance


NET = """
import torch
from jvpgraph.trainer.trigflow import TrigFlow

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = torch.nn.Linear(64 + 3, 64)

    def forward(self, x, time, labels, guidance=None):
        assert guidance is None or guidance.dtype == torch.float32
        seen.append(guidance)
        told = torch.zeros_like(time) if guidance is None else guidance
        inputs = [x.flatten(1), time[:, None], told[:, None], labels[:, None] / 10]
        return self.lin(torch.cat(inputs, 1)).reshape(x.shape)

seen = []

def model():
    return TrigFlow(Net())
"""


def gentle(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
    return x * cond["c"][:, None]


def test_guidance_in_an_interval_and_of_a_scale_for_each_sample() -> None:
    x, t = torch.ones(4, 3, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0, 1.5], dtype=torch.float64)
    cond, negative = {"c": torch.full((4,), 2.0)}, {"c": torch.tensor([1.0])}
    s = t.sin() / (t.sin() + t.cos())
    inside = (s >= 0.2) & (s <= 0.8)
    assert inside.tolist() == [False, True, True, False]
    found = Guided(gentle, 5.0, negative, interval=(0.2, 0.8))(x, t, cond)  # type: ignore[arg-type]
    assert torch.equal(found, torch.where(inside, 6.0, 2.0).double()[:, None].expand_as(x))  # 1 + 5 (2 - 1)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = Guided(gentle, None, negative)(x, t, {**cond, SCALE: scale})  # type: ignore[arg-type]
    assert torch.equal(found, (1 + scale).double()[:, None].expand_as(x))


@pytest.mark.long
def test_the_guidance_of_a_stage_takes_the_place_of_the_runs(tiny_folder: Path) -> None:
    Path("net.py").write_text(NET)
    more: dict[str, Any] = {"model": {"load": "net.py:model"}, "teacher": {}}
    strong = {"scale": 5.0, "interval": [0.2, 0.8], "negative": {"labels": 10}}
    as_run = train(digits(Path("a"), [stage("dcm")], guidance=strong, **more))
    same = stage("dcm", guidance={"scale": 5.0, "interval": [0.2, 0.8]})
    as_stage = train(digits(Path("b"), [same], **more))
    assert losses(as_stage) == losses(as_run)
    for guidance in ({"scale": 5.0}, {"interval": [0.2, 0.8]}, {}):
        assert losses(
            train(
                digits(Path("c"), [stage("dcm", guidance=guidance)], **more),
            )
        ) != losses(as_run)
        shutil.rmtree("c")


@pytest.mark.slow
def test_a_student_is_told_the_scale_that_its_teacher_has(tiny_folder: Path) -> None:
    Path("net.py").write_text(NET)
    plug = {"load": "net.py:model"}
    stages = [stage("dcm", guidance={"scale": [2.0, 6.0]}), stage("dcm")]
    config = digits(Path("run"), stages, model=plug, teacher={}, student={"backend": "op_by_op"})
    folder = train(config)
    seen = Plug("net.py:model").function().__globals__["seen"]
    told = torch.cat([x for x in seen if x is not None and len(x) == 4])
    assert any(x is None for x in seen)  # the teacher
    first, second = told[told != 2].reshape(-1), told[told == 2]
    assert len(first)
    assert len(second)  # the second stage has the run's scale
    assert 2 < first.min() < first.max() < 6
    assert len(first.unique()) == 8  # drawn for each sample of two steps
    seen.clear()
    sample_run(folder, steps=2, count=4, ema=None, seed=0, out=folder / "samples")
    assert all(torch.equal(x, torch.full((4,), 2.0)) for x in seen)  # what the last stage learnt


@pytest.mark.slow
def test_the_teacher_alone_is_not_told_the_scale_of_its_guidance(tiny_folder: Path) -> None:
    """`guidance_times` go past the guidance, to a network that refuses conditions which it does not know."""
    Path("net.py").write_text(NET)
    apart = {"name": "dmd", "fake_updates_per_step": 1, "guidance_times": {"name": "shifted_uniform"}}
    told = {"scale": [2.0, 6.0], "negative": {"labels": 10}}
    config = digits(
        Path("run"),
        [stage("dmd") | {"objective": apart}],
        model={"load": "net.py:model"},
        teacher={},
        guidance=told,
        student={"backend": "op_by_op"},
    )
    assert all(loss > 0 for loss in losses(train(config)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"teacher": {"model": {**DEEPER, "options": {**DEEPER["options"], "image_size": 16}}}},
            r"teacher\.model: the teacher cannot run .* same latents and conditions as `model` \(x0 \[1, 1, 8, 8\]",
        ),
        (
            {"guidance": {"scale": [2.0, 6.0], "negative": {"labels": 10}}},
            "as the condition `guidance`, and DiT does not look at it. Set student.embed_scale=true",
        ),
        (
            {"guidance": {}, "stages": [stage("scm", guidance={"scale": 4.0})]},
            r"stages\.0\.guidance\.scale is 4\.0 and there is no negative condition",
        ),
        ({"teacher": {"model": {"load": "nowhere:net"}}}, "there is no module nowhere"),
    ],
    ids=["latents", "told", "no negative", "no network"],
)
def test_refused_before_the_first_step(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(digits(tmp_path / "run", **{"stages": [stage("scm")], **more}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("guidance.scale=0", "scale is 0.0"),
        ("guidance.scale=[6, 2]", "scale is (6.0, 2.0) and must be above 0, or two numbers that rise"),
        ("guidance.interval=[0.5, 1.5]", "interval is (0.5, 1.5): two times that rise, from 0 (data) to 1 (noise)"),
        ("stages.0.guidance.interval=[0.5, 0.5]", "interval is (0.5, 0.5)"),
        ("teacher.conditions={guidance: 1}", "teacher.conditions is for a teacher of its own"),
        ("fake_score.network=teacher", "fake_score.network=teacher is for a teacher of its own"),
        ("sampling.guidance=3", "guidance.scale is one number"),
    ],
)
def test_settings_that_do_not_go_together(tiny_folder: Path, override: str, said: str) -> None:
    with pytest.raises(settings.SettingsError) as error:
        settings.load(RunConfig, Path("tiny.yaml"), [override])
    assert said in str(error.value)
