"""Settings that do not go together are refused, and those that do are not; students are sampled where they learnt."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.phases import check_steps, parts_of, times_of
from jvpgraph.trainer.export.task import Task
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.run.beforehand import warn_of_settings
from jvpgraph.trainer.run.finished import Run, evaluate_run, load_run
from jvpgraph.trainer.settings import SettingsError
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow
from tests.recipes import CRITIC, SEGMENTS, alone, of_terms
from tests.test_adapters import build
from tests.test_train import SMALL, config_of, stage

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = math.atan(80.0)
DMD: dict[str, Any] = {"name": "dmd", "fake_updates_per_step": 1}
TWO_TIMES = {"student": {"backend": "eager", "second_time": True}}
SEVERAL = {"scale": [2.0, 6.0], "negative": {"labels": 10}}
PROMPTS = {
    "source": {
        "load": "jvpgraph.trainer.data.prompts:listed",
        "options": {"shape": [1, 8, 8], "values": {"labels": [*range(10)]}},
    }
}
ONE_SCALE = {"scale": 5.0, "negative": {"labels": 10}}
SCM_LOW = {"name": "scm", "times": {"name": "log_normal", "between": [0.0, 0.5]}}
SILENT = {"log": {"every": 1, "preview_every": None}}


def beside(*objectives: Any, weights: Any = ()) -> dict[str, Any]:
    pairs = zip(objectives, weights or [1.0] * len(objectives), strict=True)
    return of_terms(*({"objective": each, "weight": weight} for each, weight in pairs))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (beside(DMD, SEGMENTS), "student of dmd is sampled by consistency and that of dcm by flow"),
        (beside({"name": "scm"}, {"name": "flow_matching"}), "scm asks it for a clean image.*take data in its place"),
        (
            beside(
                {**DMD, "start": 1.2, "earlier": "a"},
                {**CRITIC, "features": "teacher", "simulation": {"start": 0.9, "earlier": "a", "steps": 2}},
            ),
            "start from those of a at 1.2 and of a at 0.9: name one run .* and one `start`",
        ),
        (
            beside({**DMD, "divergence": "forward_kl"}, {**CRITIC, "simulation": {"steps": 2}}, weights=(1.0, 0.0)),
            "weighs by the ratio of dmd's samples, and adversarial.simulation makes other ones",
        ),
    ],
    ids=["two samplers", "a velocity and a clean image", "two starts", "the ratio of other samples"],
)
def test_terms_that_want_different_students(tmp_path: Path, objective: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        config_of(tmp_path, **alone(objective))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ema": {"sigma_rel": [0.05, 0.05]}}, r"sigma_rel is \(0.05, 0.05\): each width once"),
        (
            {
                "stages": [stage("dcm", 1, guidance={"scale": each}) for each in ([2.0, 4.0], [6.0, 8.0])],
                "guidance": SEVERAL,
                "sampling": {"guidance": 3.0},
            },
            "guidance is 3, and the student learns scales from 6 to 8 in its last stage",
        ),
        (
            {"stages": [stage("flow_matching", 1), stage("rcm", 1)]},
            "stages.1 learns from `model` as it is loaded, not from what flow_matching makes of it in stages.0",
        ),
        (
            {**alone("dcm"), "guidance": {**ONE_SCALE, "scale": 1.0, "interval": [0.1, 0.6]}},
            "guidance.interval is for guidance, and guidance.scale is 1 in all stages",
        ),
        (
            {**alone({**DMD, "end": 1.2}), "guidance": {**ONE_SCALE, "interval": [0.1, 0.6]}},
            "stages.0: guidance is on between 0.1 and 0.6 .*asked between 0.72.. and 1, where there is none",
        ),
        (
            {
                **alone({**DMD, "guidance_times": {"name": "shifted_uniform", "between": [0.0, 0.3]}}),
                "guidance": {**ONE_SCALE, "interval": [0.4, 1.0]},
            },
            "guidance is on between 0.4 and 1 .*asked between 0 and 0.3",
        ),
        (
            {**alone("dcm"), "guidance": {**ONE_SCALE, "interval": [0.9, 1.0], "below": [0.875, 3.0]}},
            "guidance.below begins at 0.875, and guidance is on between 0.9 and 1 only",
        ),
        (
            {"stages": [stage(SCM_LOW, 1, guidance={"interval": [0.6, 1.0]})], "guidance": ONE_SCALE},
            "asked between 0 and 0.5, where there is none",
        ),
        (
            {
                **alone({"name": "scm", "times": {"name": "log_normal", "between": [0.0, 0.98]}}),
                "guidance": {**ONE_SCALE, "interval": [0.99, 1.0]},
            },
            "asked between 0 and 0.98, where there is none",
        ),
        (
            {
                **alone({"name": "free_flow", "times": SCM_LOW["times"]}, sampling={"steps": [1]}),
                "guidance": {**ONE_SCALE, "interval": [0.6, 1.0]},
            },
            "asked between 0 and 0.5, where there is none",
        ),
        (
            {**alone({**DMD, "end": 1.4289}), "guidance": {**ONE_SCALE, "scale": 1.0, "below": [0.5, 3.0]}},
            "guidance is on between 0 and 0.5 .*asked between 0.875 and 1",
        ),
        (
            {
                **alone({"name": "dcm", "teacher_steps": 48, "shift": 5.0}),
                "guidance": {**ONE_SCALE, "interval": [0, 0.09]},
            },
            "guidance is on between 0 and 0.09 .*asked at 48 times from 0.09615 to 1",
        ),
        (
            {
                **alone({"name": "dcm", "teacher_steps": 4, "substeps": 2}),  # at multiples of an eighth
                "guidance": {**ONE_SCALE, "interval": [0.76, 0.86]},
            },
            "guidance is on between 0.76 and 0.86 .*asked at 8 times from 0.125 to 1",
        ),
        (
            {**alone({"name": "dcm", "teacher_steps": 1}), "guidance": {**ONE_SCALE, "interval": [0.1, 0.6]}},
            "guidance is on between 0.1 and 0.6 .*asked at 1, where there is none",
        ),
        (
            {
                **alone(of_terms({"objective": SCM_LOW}, {"objective": {"name": "dcm", "teacher_steps": 1}})),
                "guidance": {**ONE_SCALE, "interval": [0.55, 0.7]},
            },
            "asked between 0 and 0.5 and at 1, where there is none",
        ),
        (
            {
                **alone(of_terms({"objective": SCM_LOW}, {"objective": {**DMD, "end": 1.2}})),
                "guidance": {**ONE_SCALE, "interval": [0.55, 0.7]},
            },
            "guidance is on between 0.55 and 0.7 .*asked between 0 and 0.5 and between 0.72.* and 1",
        ),
        (
            {
                "stages": [stage("dcm", 1), stage("dcm", 1, guidance={"below": [0.5, 2.0]})],
                "guidance": SEVERAL,
            },
            "stages.1.guidance: below goes with one scale, not with two",
        ),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        config_of(tmp_path, **{**alone("dcm"), **more})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {**alone({"name": "rcm", "weight": 0.1, "scm": {"points": "trajectory"}, "dmd": {"start": 1.2}})},
            "objective rcm learns from latents, and the data set holds prompts only",
        ),
        (
            {**alone({**DMD, "simulation_steps": 1})},
            r"2 steps: this run's samples take 1 to 1 .* Change sampling.steps; or give more times",
        ),
    ],
)
def test_refused_before_the_first_step(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(config_of(tmp_path / "run", **more, data=PROMPTS if "rcm" in said else {}))
    assert not (tmp_path / "run").exists()


def test_a_negative_condition_of_letters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance.negative.labels is '10': give a number, .* without quotes"):
        train(config_of(tmp_path / "run", **alone("dcm"), guidance={"scale": 2.0, "negative": {"labels": "10"}}))


def test_samples_are_not_compared_with_prompts(tmp_path: Path) -> None:
    features = {"features": {"load": "jvpgraph.trainer.features:digits_classifier"}, "count": 4}
    run = train(config_of(tmp_path / "run", **alone({**DMD}), data=PROMPTS, evaluation=features, **SILENT))
    with pytest.raises(ValueError, match="holds prompts only, and samples are compared with real ones"):
        evaluate_run(run)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [stage({"name": "rcm", "scm": {"tangent_warmup": 3}}, 2)],
            ["its tangent counts in full after 3", "dmd begins after 3"],
        ),
        (
            [stage(of_terms({"objective": {"name": "scm"}}, {"objective": DMD, "after": 2}), 2)],
            ["dmd begins after 2 updates, and the stage has 2 steps"],
        ),
        ([stage({"name": "mean_flow", "discrete": {"end": 9}}, 2)], ["takes the place of differences after 9"]),
        ([stage(DMD, 2, fake={"lr": 1e-3, "warmup": 5})], ["fake.lr is reached after 5"]),
        (
            [stage({"name": "rcm", "scm": {"tangent_warmup": 3}}, 5, fake={"lr": 1e-3, "warmup": 4})],
            ["fake.lr is reached after 7 updates, and the stage has 5 steps"],
        ),
        ([stage({"name": "mean_flow", "velocity": "data", "guidance": 1.5}, 2)], ["condition_dropout 0 never trains"]),
        ([stage({"name": "rcm", "scm": {"tangent_warmup": 1}}, 2)], []),
    ],
)
def test_what_stages_end_before_is_said(tmp_path: Path, caplog: Any, stages: Any, said: list[str]) -> None:
    warn_of_settings(config_of(tmp_path, stages, **SILENT))
    assert len(caplog.messages) == len(said), caplog.messages
    assert all(each in message for each, message in zip(said, caplog.messages, strict=True))


def without_checkpoint(folder: Path, objective: Any) -> str:
    """The folder of a run that has begun nothing yet."""
    config = config_of(folder, **alone(objective), **SILENT)
    config.out.mkdir()
    settings.save(config, config.out / "config.yaml")
    return str(config.out)


def test_what_stages_begin_with_is_tried_before_an_older_run_is_moved_aside(tmp_path: Path) -> None:
    """And where a run goes on with a new stage."""
    phase = {**DMD, "start": 1.2, "earlier": without_checkpoint(tmp_path / "high", {**DMD, "end": 1.2})}
    out, more = tmp_path / "run", {"sampling": {"steps": [2]}, **SILENT}
    train(config_of(out, [stage("dcm", 1)], **more))
    with pytest.raises(FileNotFoundError, match="high/checkpoints holds no complete checkpoint"):
        train(config_of(out, [stage(phase, 1)], **more), fresh=True)
    with pytest.raises(FileNotFoundError, match="high/checkpoints holds no complete checkpoint"):
        train(config_of(out, [stage("dcm", 3), stage(phase, 1)], **more))
    assert {path.name for path in tmp_path.iterdir()} == {"high", "run"}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000000", "step-00000001"]


def test_later_stages_are_tried_before_the_first_step(tmp_path: Path) -> None:
    """A fake score whose network is another each time; an expert that has no checkpoint."""
    wild = {"load": f"{__name__}:wild"}
    stages = [stage("dcm", 1), stage(DMD, 1)]
    with pytest.raises(ValueError, match=r"model: .*wild builds another network each time"):
        train(config_of(tmp_path / "run", stages, model=wild, teacher={"model": SMALL["model"]}))
    high = without_checkpoint(tmp_path / "high", {**DMD, "end": 1.2})
    stages = [stage("dcm", 1), stage({**DMD, "start": 1.2, "earlier": high}, 1)]
    with pytest.raises(FileNotFoundError, match="high/checkpoints holds no complete checkpoint"):
        train(config_of(tmp_path / "run", stages, sampling={"steps": [2]}, **SILENT))
    assert not (tmp_path / "run").exists()


def wild() -> Any:
    network = Plug(**SMALL["model"]).build()
    with torch.no_grad():
        network.net.patch_in.bias.copy_(torch.tensor(list(os.urandom(len(network.net.patch_in.bias)))))
    return network


def test_labels_are_tried_on_the_student_too(tmp_path: Path) -> None:
    few = {**SMALL["model"], "options": {**SMALL["model"]["options"], "classes": 5}}
    with pytest.raises(ValueError, match=r"the student cannot run with sample .*labels \[9\]"):
        train(config_of(tmp_path / "run", **alone("dcm"), model=few, teacher={"model": SMALL["model"]}))


# ---------------------------------------------------------------- taken


def test_stages_whose_terms_know_all_times_leave_no_gap(tmp_path: Path) -> None:
    phase, low = {**DMD, "end": 1.2}, {**DMD, "start": 0.9}
    for first in (beside(phase, {"name": "scm"}), beside({"name": "scm"}, phase), {"name": "rcm", "dmd": phase}):
        config_of(tmp_path, [stage(first, 1), stage(low, 1)])
    lagrangian = {"name": "flow_map", "method": "lagrangian", "times": {"name": "shifted_uniform", "between": [0.5, 1]}}
    config_of(tmp_path, **alone(lagrangian), guidance={**ONE_SCALE, "interval": [0.0, 0.3]}, **TWO_TIMES)
    with pytest.raises(SettingsError, match="nobody learns the times between"):
        config_of(tmp_path, [stage(phase, 1), stage(low, 1)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (9.0, "learnt guidance scales from 2 to 6 in its last stage, and is asked for 9 to 9 here"),
        (3.0, None),
    ],
)
@pytest.mark.sampled(1)
def test_an_expert_is_told_the_one_scale_of_the_next(tmp_path: Path, scale: float, said: str | None) -> None:
    told = {"student": {"backend": "eager", "embed_scale": True}, "guidance": SEVERAL}
    two = {"sampling": {"steps": [2]}, **SILENT}
    high = train(config_of(tmp_path / "high", **alone({**DMD, "end": 1.2}), **told, **two))
    low = alone(
        {**DMD, "start": 1.2, "earlier": str(high)}, guidance={**SEVERAL, "scale": scale}, sampling={"steps": [2]}
    )
    with nullcontext() if said is None else pytest.raises(ValueError, match=said):
        run = load_run(train(config_of(tmp_path / "low", **low, **SILENT)))
        assert [student.call.usual for student in run.students[1:]] == [scale]


def test_one_scale_of_an_expert_is_said(tmp_path: Path, caplog: Any) -> None:
    high = without_checkpoint(tmp_path / "high", {**DMD, "end": 1.2})
    told = {"student": {"backend": "eager", "embed_scale": True}, "guidance": SEVERAL}
    warn_of_settings(config_of(tmp_path / "low", **alone({**DMD, "start": 1.2, "earlier": high}), **told, **SILENT))
    assert "they begin with those of" in caplog.text


def test_scales_are_told_by_the_argument_that_the_pipeline_has(tmp_path: Path) -> None:
    """HunyuanImage's own is another; Sana's pipelines have none, though the network takes one."""
    pipe = tmp_path / "pipe"
    pipe.mkdir()
    several = {"guidance": {**SEVERAL, "negative": {"labels": 10}}, "conditions": {"guidance": 1000.0}}
    for name, cls, argument in (
        ("HunyuanImageTransformer2DModel", "HunyuanImagePipeline", "distilled_guidance_scale"),
        ("SanaVideoTransformer3DModel", "SanaVideoPipeline", None),
    ):
        (pipe / "model_index.json").write_text(json.dumps({"_class_name": cls, "transformer": ["diffusers", name]}))
        task = Task(asked_for(config_of(tmp_path, **alone("dcm"), **several), name), tmp_path, pipe)
        if argument is not None:
            assert task.arguments()[argument] == 4.0
            continue
        assert not task.goes_into_pipelines
        with pytest.raises(ValueError, match="a SanaVideoPipeline tells its network no guidance scale"):
            task.check_pipeline()


def test_a_teacher_that_is_named_may_follow_flow_matching(tmp_path: Path) -> None:
    config_of(tmp_path, [stage("flow_matching", 1), stage("rcm", 1)], teacher={"model": SMALL["model"]})
    config_of(tmp_path, [stage("rcm", 1), stage("flow_matching", 1)])


@pytest.mark.parametrize(
    "stages",
    [
        [{**SEGMENTS, "segments": 4}, SEGMENTS],
        [{**DMD, "end": 0.9, "simulation_steps": 1}, {**DMD, "start": 0.9, "simulation_steps": 1}],
    ],
    ids=["segments", "phases"],
)
def test_the_last_stage_says_how_many_steps_where_nobody_looks_before(tmp_path: Path, stages: list[Any]) -> None:
    more = {"stages": [stage(each, 1) for each in stages], "sampling": {"steps": [2]}}
    run = train(config_of(tmp_path / "run", **more, **SILENT))
    assert (run / "checkpoints").is_dir()
    with pytest.raises(ValueError, match=r"stages.0 while it is trained: without log.preview_every"):
        train(config_of(tmp_path / "seen", **more, log={"every": 1, "preview_every": 1}))


def test_a_regulariser_may_come_first() -> None:
    def parsed(objective: Any) -> Any:
        return settings.from_dict(RunConfig, {**SMALL, "out": "x", **alone(objective)}).stages[0].objective

    jumps = {**DMD, "rollout": "jumps"}
    assert parsed(beside({"name": "data"}, SEGMENTS, weights=(0.1, 1.0))).sampler == "flow"
    assert parsed(beside({"name": "flow_matching"}, jumps, weights=(0.1, 1.0))).sampler == "mean_flow"
    assert parsed(beside({"name": "data"}, {**DMD, "end": 0.8}, weights=(0.1, 1.0))).span == (math.pi / 2, 0.8)
    judged = beside({"name": "scm"}, {**DMD, "divergence": "forward_kl"}, CRITIC, weights=(1.0, 0.01, 0.0))
    assert parsed(judged).critic.made_by == parsed(judged).fake_score.simulation
    assert not parsed({"name": "rcm", "weight": 0, "dmd": {"divergence": "forward_kl"}}).needs_critic
    low = {"name": "shifted_uniform", "between": [0.1, 1.0]}
    assert parsed({**DMD, "times": low}).span == (math.pi / 2, 0)


@pytest.mark.long
def test_places_that_are_rounded_meet(tmp_path: Path) -> None:
    """1.4289 radians are rectified-flow time 0.875 to four digits."""
    first = {**DMD, "end": 1.4289, "simulation_steps": 1}
    high = config_of(tmp_path / "high", **alone(first), sampling={"steps": [1]}, **SILENT)
    train(high)
    times = {"name": "shifted_uniform", "between": [0.0, 0.875]}
    for low in (
        alone({**DMD, "start": math.atan(7), "earlier": str(high.out)}),
        alone({"name": "scm", "times": times}),
    ):
        earlier = {} if "earlier" in str(low) else {"earlier": str(high.out)}
        assert train(config_of(tmp_path / str(len(earlier)), **low, sampling={"steps": [2], **earlier})).is_dir()


# ---------------------------------------------------------------- networks that round their time


class Clock(nn.Module):
    """A network that is told its time in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.table = how, nn.Linear(64, 64), nn.Embedding(1001, 64)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        match self.how:
            case "table":
                e = self.table((1000 * time).long())
            case "round":
                e = (1000 * time).round()[:, None].sin()
            case "cast":  # half precision has a derivative
                e = (8 * time.to(self.layer.weight.dtype)[:, None]).sin()
            case _:
                e = torch.full_like(time, 0.5)[:, None]
        return self.layer(x.flatten(1) * (1 + e).to(x.dtype)).view_as(x)


def clock(how: str, dtype: str) -> TrigFlow:
    torch.manual_seed(0)
    return TrigFlow(Clock(how).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["table", "round", "cast", "no time"])
def test_a_network_that_rounds_its_time_is_named(
    tmp_path: Path, how: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its derivative by time is 0, which trains something else."""
    model = {"load": "tests.test_combinations:clock", "options": {"how": how, "dtype": dtype}}
    for objective in ("dcm", "scm"):
        train(config_of(tmp_path / objective, **alone(objective), model=model))
        said = [r for r in caplog.records if "it rounds its time" in r.getMessage()]
        assert len(said) == (objective == "scm" and how in ("table", "round"))


# ---------------------------------------------------------------- where students are asked


@pytest.mark.parametrize("others", [(), ({"name": "data"},)], ids=["alone", "beside data"])
def test_dmd_is_sampled_where_its_simulation_stopped(tmp_path: Path, others: tuple[Any, ...]) -> None:
    fixed = {**DMD, "fixed_times": [1.5042, 1.3734, 1.0304]}
    config = config_of(tmp_path, **alone(beside(*others, fixed) if others else fixed))
    assert times_of(config, 0, 4) == [FIRST, 1.5042, 1.3734, 1.0304]
    assert times_of(config, 0, 2) == [FIRST, 1.5042]
    several = config_of(tmp_path, **alone(beside({"name": "scm"}, fixed)))
    assert times_of(several, 0, 4) == [FIRST, 1.3, 1.0, 0.6]
    jumps = {**fixed, "rollout": "jumps"}
    [part] = parts_of(config_of(tmp_path, **alone(jumps), **TWO_TIMES), 0)
    assert part.asked_there_alone
    after = {"stages": [stage("flow_map", 1), stage(jumps, 1)]}
    [part] = parts_of(config_of(tmp_path, **after, **TWO_TIMES), 1)
    assert not part.asked_there_alone


def test_the_scale_of_samples_is_one_of_the_last_stage(tmp_path: Path) -> None:
    def told(*scales: Any) -> float | None:
        stages = [stage("dcm", 1, guidance={"scale": scale}) for scale in scales]
        return config_of(tmp_path, stages=stages, guidance={**SEVERAL, "scale": 5.0}).told_scale

    assert told([2.0, 4.0], [6.0, 8.0]) == 7.0
    assert told([2.0, 6.0], 9.0) == 9.0
    assert told(2.0, 9.0) is None


def test_networks_of_two_times_that_learnt_one_go_into_no_pipeline(tmp_path: Path) -> None:
    """AnyFlow's pipeline tells them where each step ends; ACE-Step's that it ends nowhere, as in training."""
    for name, objective, fits in (
        ("AnyFlowTransformer3DModel", "dcm", False),
        ("AnyFlowTransformer3DModel", "flow_matching", False),
        ("AceStepTransformer1DModel", "dcm", True),
    ):
        task = Task(asked_for(config_of(tmp_path, **alone(objective)), name), tmp_path)
        assert task.goes_into_pipelines == fits


def asked_for(config: RunConfig, name: str) -> Run:
    """A stub: networks of both kinds are too much to train here."""
    model, stub = build(name, "float32"), Mock(spec=Run)
    stub.configure_mock(config=config, stage=0, student=model, students=[model])
    stub.sampler, stub.parts = config.sampler(0), parts_of(config, 0)
    return stub


@pytest.mark.parametrize(
    ("objective", "steps", "gamma", "said"),
    [
        ({"name": "flow_map", "longest": 0.25, "clean_share": 0.0}, [1, 4], 0, "samples in 1 steps jump 1 of"),
        ({"name": "flow_map", "longest": 0.25, "clean_share": 0.0}, [4], 0, None),
        ({"name": "flow_map", "longest": 0.25, "clean_share": 0.0}, [4], 0.8, "in 4 steps jump 0.375 of"),
        ({"name": "mean_flow", "instant_share": 0.5, "clean_share": 0.5}, [1, 2], 0, "those to r = 0 alone are"),
        ({"name": "mean_flow", "instant_share": 0.5, "clean_share": 0.5}, [2], 0.9, "those to r = 0 alone are"),
        ({"name": "mean_flow", "instant_share": 0.5, "clean_share": 0.5}, [1, 2], 1, None),
        ({"name": "mean_flow", "instant_share": 0.5, "clean_share": 0.5}, [1], 0, None),
        ({"name": "mean_flow", "instant_share": 1.0}, [1], 1, "of all jumps none are trained"),
    ],
)
def test_jumps_that_nobody_trained(objective: Any, steps: list[int], gamma: float, said: str | None) -> None:
    more = {"sampling": {"steps": steps, "gamma": gamma}, **TWO_TIMES}
    [each] = settings.from_dict(RunConfig, {**SMALL, "out": "x", **alone(objective), **more}).stages
    with nullcontext() if said is None else pytest.raises(ValueError, match=said):
        each.objective.check_sampling(steps, 1.0, gamma)


def test_new_noise_between_jumps_is_for_students_that_know_all_of_them(tmp_path: Path) -> None:
    gamma = {"sampling": {"gamma": 0.5}}
    with pytest.raises(SettingsError, match=r"sampling\.gamma is for the jumps .* samples are of consistency"):
        config_of(tmp_path, **alone("scm"), **gamma)
    with pytest.raises(SettingsError, match=r"gamma is 1\.5 and must be in \[0, 1\]"):
        config_of(tmp_path, **alone("mean_flow"), **TWO_TIMES, sampling={"gamma": 1.5})
    jumps = {**DMD, "rollout": "jumps", "fixed_times": [1.3, 1.0, 0.6]}
    with pytest.raises(ValueError, match=r"trained for few times .*: set it to 0"):
        check_steps(config_of(tmp_path, **alone(jumps), **TWO_TIMES, **gamma), 0, [2])
    after = {"stages": [stage("flow_map", 1), stage(jumps, 1)]}
    check_steps(config_of(tmp_path, **after, **TWO_TIMES, **gamma), 1, [2])
    short = alone({"name": "flow_map", "longest": 0.25, "clean_share": 0.0})
    with pytest.raises(ValueError, match=r"in 4 steps jump 0\.3\d+ of rectified-flow time"):
        train(config_of(tmp_path, **short, **TWO_TIMES, sampling={"steps": [4], "gamma": 0.8}))


@pytest.mark.parametrize(
    "objective",
    [{"name": "scm", "velocity": "data"}, "flow_matching", {"name": "mean_flow", "velocity": "data"}],
)
def test_a_scale_that_nobody_teaches(tmp_path: Path, objective: Any) -> None:
    with pytest.raises(SettingsError, match=r"no teacher here, and .* gives two numbers"):
        config_of(tmp_path, **alone(objective), guidance=SEVERAL)
