"""Students of a part of the times each: how they are sampled, exported into one pipeline, planned for, and refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.cli import main
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation import phases
from jvpgraph.trainer.evaluation.phases import Leg, legs_of, level, parts_of, sample_in_legs, times_of
from jvpgraph.trainer.evaluation.samplers import few_step_times, sample_consistency, sample_euler
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.dit import dit
from jvpgraph.trainer.model.experts import experts
from jvpgraph.trainer.model.networks import build_student
from jvpgraph.trainer.plan.plan import plan_run
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.start import values_in
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import radians
from tests.gaussian import GaussianConsistency, GaussianFlow, gaussian_batch, seeded
from tests.test_plan import TINY, measured
from tests.test_train import SMALL
from tests.tiny_pipelines import make, pair_of_networks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:diffusers"),
]

MEET = radians(0.875)
FIRST = math.atan(80.0)
HIGH, LOW = 1.5, 0.8  # radians between the steps of each
DMD: dict[str, Any] = {"name": "dmd", "fake_updates_per_step": 1, "simulation_steps": 2}


def settings_in(folder: Path, objective: Any, name: str = "run", **more: Any) -> RunConfig:
    """Of a run of the digits, whose config.yaml is there."""
    stages = [
        {"objective": each, "steps": 1, "batch": 4} for each in (objective if type(objective) is list else [objective])
    ]
    config = settings.from_dict(RunConfig, {**SMALL, "out": str(folder / name), "stages": stages, **more})
    config.out.mkdir(parents=True, exist_ok=True)
    settings.save(config, config.out / "config.yaml")
    return config


def legs(config: RunConfig, steps: int) -> list[Leg]:
    return legs_of(parts_of(config, len(config.stages) - 1), steps)


# ---------------------------------------------------------------- who is asked when


def test_each_phase_takes_steps_from_where_it_starts(tmp_path: Path) -> None:
    """First those of the phase whose samples the next one learnt from, then of that."""
    high = settings_in(tmp_path, {**DMD, "end": MEET, "fixed_times": [HIGH]}, "high")
    low = settings_in(tmp_path, {**DMD, "start": MEET, "fixed_times": [LOW], "earlier": str(high.out)}, "low")
    assert legs(low, 4) == [Leg(1, "consistency", (FIRST, HIGH), MEET), Leg(0, "consistency", (MEET, LOW), 0.0)]
    assert legs(low, 3) == [Leg(1, "consistency", (FIRST, HIGH), MEET), Leg(0, "consistency", (MEET,), 0.0)]
    assert times_of(low, 0, 2) == [FIRST, MEET]
    for steps in (1, 5):
        with pytest.raises(ValueError, match=r"take 2 to 4 \(2 from 1 on, 2 from 0\.875 on"):
            legs(low, steps)
    assert legs(high, 2) == [Leg(0, "consistency", (FIRST, HIGH), 0.0)]
    with pytest.raises(ValueError, match="take 1 to 2"):
        legs(high, 3)
    third = settings_in(tmp_path, {**DMD, "start": LOW, "earlier": str(low.out)}, "third")
    low = settings_in(tmp_path, {**DMD, "start": MEET, "end": LOW, "earlier": str(high.out)}, "low")
    assert [(leg.owner, leg.times[0], leg.end) for leg in legs(third, 4)] == [
        (2, FIRST, MEET),
        (1, MEET, LOW),
        (0, LOW, 0.0),
    ]
    one = settings_in(tmp_path, [{**DMD, "end": MEET}, {**DMD, "start": MEET}], "one")
    assert [(leg.owner, leg.times, leg.end) for leg in legs(one, 2)] == [(0, (FIRST,), MEET), (0, (MEET,), 0.0)]
    refined = settings_in(tmp_path, ["scm", {**DMD, "end": 1.2}], "refined")
    assert [(leg.times, leg.end) for leg in legs(refined, 3)] == [((FIRST, 1.3), 1.2), ((1.2,), 0.0)]


def test_students_that_were_trained_apart_meet_where_the_times_of_the_lower_end(tmp_path: Path) -> None:
    def times(low: float, high: float) -> dict[str, Any]:
        return {"name": "shifted_uniform", "between": [low, high]}

    high = settings_in(tmp_path, "scm", "high")
    below = {"sampling": {"earlier": str(high.out)}}
    low = settings_in(tmp_path, {"name": "scm", "times": times(0.0, 0.875)}, "low", **below)
    assert legs(low, 3) == [Leg(1, "consistency", (FIRST,), MEET), Leg(0, "consistency", (MEET, 1.3), 0.0)]
    second = {"student": {"second_time": True}}
    high = settings_in(tmp_path, {"name": "flow_map", "clean_share": 0, "times": times(0.8, 1.0)}, "high", **second)
    flow = {"name": "flow_map", "times": times(0.0, 0.8)}
    low = settings_in(tmp_path, flow, "low", sampling={**below["sampling"]}, **second)
    found = legs(low, 4)
    assert [(leg.owner, leg.kind) for leg in found] == [(1, "mean_flow"), (0, "mean_flow")]
    grid = [round(level(t), 6) for leg in found for t in (*leg.times, leg.end)]
    assert grid == [1.0, 0.8, 0.8, 0.5, 0.25, 0.0]
    begun = settings_in(tmp_path, flow, "begun", sampling={**below["sampling"], "sigma_max": 80}, **second)
    assert legs(begun, 4)[0].times == (FIRST,)
    assert legs(begun, 2)[1].end == 0.0
    renewed = settings_in(tmp_path, flow, "renewed", sampling={**below["sampling"], "gamma": 0.5}, **second)
    with pytest.raises(ValueError, match="trained for few times or for a part of them: set it to 0"):
        legs(renewed, 4)
    gap = settings_in(tmp_path, {**flow, "times": times(0.0, 0.7)}, "gap", **below, **second)
    with pytest.raises(ValueError, match=r"time 0\.8\), where the student of .*high ends, and .* \(0\.7\)"):
        legs(gap, 4)
    velocity = {"name": "flow_matching", "times": times(0.0, 0.875)}
    settings_in(tmp_path, {**velocity, "times": times(0.875, 1.0)}, "high")
    low = settings_in(tmp_path, velocity, "low", **below)
    assert [len(leg.times) for leg in legs(low, 16)] == [2, 14]  # 1 and 15/16, as a pipeline of two networks has it


@pytest.mark.parametrize("name", ["scm", "rcm", "dmd", "flow_matching"])
def test_times_cut_a_little_short_of_both_ends_are_all_times(tmp_path: Path, name: str) -> None:
    cut = {"times": {"name": "shifted_uniform", "between": [0.02, 0.98]}}
    objective = {"name": name, **({"scm": cut, "dmd": cut} if name == "rcm" else cut)}
    config = settings_in(tmp_path, objective)
    assert phases.is_whole(parts_of(config, 0))
    assert times_of(config, 0, 2) == few_step_times(2, config.sampling)


def test_samples_in_legs_are_those_of_one_student() -> None:
    batch, times = gaussian_batch(8, seeded(1)), few_step_times(4, SAMPLING)
    whole = sample_consistency(GaussianConsistency(), batch, times, seeded(2))
    both = [GaussianConsistency(), GaussianConsistency()]
    parts = [Leg(1, "consistency", (*times[:1],), times[1]), Leg(0, "consistency", (*times[1:],), 0.0)]
    torch.testing.assert_close(sample_in_legs(both, parts, batch, seeded(2)), whole, rtol=1e-12, atol=1e-12)
    grid = torch.tensor([math.pi / 2, 1.2, 0.7, 0.0], dtype=torch.float64)
    whole = sample_euler(GaussianFlow(), batch, grid, seeded(2))
    parts = [Leg(0, "flow", (math.pi / 2, 1.2), 0.7), Leg(1, "flow", (0.7,), 0.0)]
    flows = [GaussianFlow(), GaussianFlow()]
    torch.testing.assert_close(sample_in_legs(flows, parts, batch, seeded(2)), whole, rtol=1e-12, atol=1e-12)


SAMPLING = settings.from_dict(RunConfig, {**SMALL, "out": "run", "stages": [{"steps": 1}]}).sampling


# ---------------------------------------------------------------- two networks of Wan

LATENTS, TEXT = [4, 2, 2, 2], [5, 10]


def of_wan(folder: Path, network: str, objective: dict[str, Any], name: str, **more: Any) -> RunConfig:
    load, checkpoint = "jvpgraph.trainer.adapters", folder / "checkpoint"
    data = {"latents": LATENTS, "conditions": {"encoder_hidden_states": TEXT}}
    options = {"path": str(checkpoint / network), "dtype": more.pop("dtype", "float32")}
    plain = {
        "out": str(folder / name),
        "threads": 1,
        "device": "cpu",
        "model": {"load": f"{load}:diffusers_model", "options": options},
        "teacher": {"model": {"load": f"{load}:experts", "options": {**options, "path": str(checkpoint)}}},
        "student": {"backend": "eager"},
        "guidance": {"scale": 3.0, "negative": {"encoder_hidden_states": [[0.0] * 10] * 5}},
        "data": {"source": {"load": "tests.test_export:Noise", "options": data}},
        "stages": [{"objective": objective, "steps": 1, "batch": 2, "student": {"lr": 1e-2}}],
        "sampling": {"steps": [2]},
    }
    return settings.from_dict(RunConfig, {**plain, **more})


ABOVE = {**DMD, "end": MEET, "fixed_times": [HIGH]}


def below(high: Path) -> dict[str, Any]:
    return {**DMD, "start": MEET, "fixed_times": [LOW], "earlier": str(high)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of both."""
    folder = tmp_path_factory.mktemp("pair")
    pair_of_networks(folder / "checkpoint")
    high = train(of_wan(folder, "transformer", ABOVE, "high"))
    steps = {"sampling": {"steps": [2, 4]}, "log": {"preview_every": 1, "preview_count": 1}}
    return high, train(of_wan(folder, "transformer_2", below(high), "low", **steps))


def same_samples(run: Path, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-4) -> Any:
    """The pipeline, whose samples were found to be those of our own sampler and of its networks as one teacher."""
    loaded = load_run(run)
    times = times_of(loaded.config, loaded.stage, steps)
    rng = torch.Generator().manual_seed(7)
    noises = [torch.randn(1, *LATENTS, generator=rng) for _ in times]
    text = torch.randn(1, *TEXT, generator=rng)
    batch = Batch(torch.zeros(1, *LATENTS), {"encoder_hidden_states": text})

    def noise_like(x: Tensor, _: Any) -> Tensor:
        return next(given).to(x)

    given = iter([noise.double() for noise in noises])
    with monkeypatch.context() as patched:
        patched.setattr(phases, "noise_like", noise_like)
        expected = loaded.sample(steps)(batch, rng)
        given = iter([noise.double() for noise in noises])
        both = experts(out)
        again = sample_in_legs([both], [Leg(0, "consistency", tuple(times), 0.0)], batch, rng)
    torch.testing.assert_close(again, expected, rtol=tolerance, atol=tolerance)
    pipe = diffusers.WanPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    given = iter(noises[1:])
    with monkeypatch.context() as patched:
        patched.setattr(
            "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor",
            lambda *_, **__: next(given, torch.zeros(1, *LATENTS)),
        )
        size = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": steps, "guidance_scale": 1.0}
        latents = level(times[0]) * noises[0]
        made = pipe(prompt_embeds=text, latents=latents, output_type="latent", **size)[0]
    torch.testing.assert_close(made.double(), expected, rtol=tolerance, atol=tolerance)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("steps", [2, 4])
def test_two_students_in_one_pipeline(
    pair: tuple[Path, Path], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    high, low = pair
    out = export_run(low, tmp_path / "out", steps=steps)
    pipe = same_samples(low, out, steps, monkeypatch)
    index = json.loads((out / "model_index.json").read_text())
    assert 0.875 < index["boundary_ratio"] < 0.8751
    for folder, part in ((high, pipe.transformer), (low, pipe.transformer_2)):
        assert all(
            torch.equal(value, part.state_dict()[name])
            for name, value in load_run(folder).student.net.state_dict().items()
        )
    levels = [level(t) for t in (times_of(load_run(low).config, 0, steps))]
    assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx(levels, rel=1e-6)
    card = (out / "README.md").read_text()
    assert f"made by the one in {high}" in card
    assert ("trust_remote_code=True" in card) == (steps == 4)
    assert list((low / "samples").glob("step-*.png"))  # a preview, which both had made


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_students_by_inductor(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As adapters, in a pipeline of one network, which takes the second in."""
    lora = {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}
    more = {"student": {"backend": "inductor", "lora": lora}, "teacher": {}, "dtype": dtype}
    make("WanPipeline").save_pretrained(tmp_path / "checkpoint")
    high = train(of_wan(tmp_path, "transformer", ABOVE, "high", **more))
    low = train(of_wan(tmp_path, "transformer", below(high), "low", sampling={"steps": [4]}, **more))
    out = export_run(low, tmp_path / "out")
    same_samples(low, out, 4, monkeypatch, 1e-4 if dtype == "float32" else 0.1)
    ends = {
        name: diffusers.WanTransformer3DModel.from_pretrained(out / name).state_dict()["blocks.0.attn1.to_q.weight"]
        for name in ("transformer", "transformer_2")
    }
    assert not torch.equal(*ends.values())


# ---------------------------------------------------------------- what is said of one alone


@pytest.mark.long
def test_the_commands_sample_with_both(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    high, low = pair
    asked = []
    original = phases.sample_in_legs
    monkeypatch.setattr(phases, "sample_in_legs", lambda *given: asked.append(given[1]) or original(*given))
    picture = ["--count", "1", "--out", str(tmp_path / "made.png")]
    assert main(["sample", str(low), "--steps", "4", *picture]) == 0
    assert [leg.owner for leg in asked[0]] == [1, 0]
    assert main(["sample", str(low), "--steps", "1", *picture]) == 1
    assert "take 2 to 4" in capsys.readouterr().err
    call = [
        "--call",
        "height=16",
        "width=16",
        "num_frames=5",
        "max_sequence_length=16",
        "--out",
        str(tmp_path / "made"),
    ]
    assert main(["sample", str(low), "--prompts", "a cat", "--steps", "2", *call]) == 0
    assert (tmp_path / "made" / "0000.webp").is_file()
    assert main(["sample", str(high), "--steps", "2", *picture]) == 0
    assert "clean images whose details are for the phase after" in caplog.text
    assert main(["export", str(high), "--out", str(tmp_path / "high")]) == 0  # the network alone, which is said
    assert "was trained from rectified-flow time 1 down to 0.875" in capsys.readouterr().out
    assert not (tmp_path / "high" / "scheduler").exists()
    assert (
        main(["export", str(high), "--out", str(tmp_path / "no"), "--pipeline", str(high.parent / "checkpoint")]) == 1
    )
    assert "Export the run of the next phase" in capsys.readouterr().err
    assert main(["export", str(low), "--out", str(tmp_path / "lora"), "--format", "lora", "--rank", "1"]) == 0
    card = (tmp_path / "lora" / "README.md").read_text()
    assert 'load_lora_weights(".", load_into_transformer_2=True)' in card
    assert "from few_step_scheduler import FewStepScheduler" in card  # four times that diffusers' own cannot be told


@pytest.mark.long
def test_the_lower_one_alone_makes_no_samples(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pair[0].parent
    alone = {**DMD, "start": MEET, "fixed_times": [LOW]}
    config = of_wan(folder, "transformer_2", alone, "alone")
    with pytest.raises(ValueError, match=r"begins at 1\.428.* time 0\.875.*makes none from noise"):
        train(of_wan(folder, "transformer_2", alone, "seen", log={"preview_every": 1}))
    assert not (folder / "seen").exists()
    train(config)  # from real latents, and nobody looks
    for command in (
        ["sample", "--count", "1"],
        ["export", "--pipeline", str(folder / "checkpoint"), "--out", str(tmp_path / "out")],
    ):
        assert main([command[0], str(config.out), *command[1:]]) == 1
        assert "sampling.earlier" in capsys.readouterr().err
    file = config.out / "config.yaml"  # where what samples are made with may be changed
    settings.save(
        of_wan(folder, "transformer_2", alone, "alone", sampling={"steps": [4], "earlier": str(pair[0])}), file
    )
    index = export_run(config.out, tmp_path / "out") / "model_index.json"
    assert json.loads(index.read_text())["boundary_ratio"] == pytest.approx(0.875, abs=1e-4)


@pytest.mark.long
def test_the_upper_one_has_to_stay_as_it_was(tmp_path: Path) -> None:
    first = train(run_of(tmp_path, {**DMD, "end": 1.0}, "first", 1))
    second = train(run_of(tmp_path, {**DMD, "start": 1.0, "earlier": str(first)}, "second", 1))
    assert load_run(second).sample(2) is not None
    train(run_of(tmp_path, {**DMD, "end": 1.0}, "first", 2))
    with pytest.raises(ValueError, match="other weights than when this run began"):
        load_run(second).sample(2)


@pytest.mark.long
def test_both_are_told_the_guidance_scale_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = several(2.0, 6.0)
    high = train(run_of(tmp_path, {**DMD, "end": 1.0}, "high", 1, **told))
    asked, original = [], phases.sample_in_legs
    monkeypatch.setattr(phases, "sample_in_legs", lambda *given: asked.append(given[0]) or original(*given))
    told |= {"log": {"preview_every": 1, "preview_count": 1}, "sampling": {"steps": [2], "guidance": 3.0}}
    low = train(run_of(tmp_path, {**DMD, "start": 1.0, "earlier": str(high)}, "low", 1, **told))
    assert [student.call.usual for student in asked[0]] == [3.0, 3.0]
    assert [student.call.usual for student in load_run(low).students] == [3.0, 3.0]
    assert [student.call.usual for student in load_run(low, guidance=2.5).students] == [2.5, 2.5]


def several(low: float, high: float) -> dict[str, Any]:
    """Guidance scales of which a student is told one."""
    return {
        "student": {**SMALL["student"], "embed_scale": True},
        "guidance": {"scale": [low, high], "negative": {"labels": 10}},
    }


def run_of(folder: Path, objective: Any, name: str, steps: int, **more: Any) -> RunConfig:
    stages = [{"objective": objective, "steps": steps, "batch": 4, "student": {"lr": 1e-3}}]
    given = {**SMALL, "out": str(folder / name), "stages": stages, "sampling": {"steps": [2]}, **more}
    return settings.from_dict(RunConfig, given)


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    high = settings_in(tmp_path, {**DMD, "end": 1.0}, "high").out
    prompts = {
        "load": "jvpgraph.trainer.data.prompts:listed",
        "options": {"shape": [1, 8, 8], "values": {"labels": [0, 1, 2, 3]}},
    }
    from_latents = settings_in(tmp_path, {**DMD, "start": 1.2, "end": 1.0}, "from_latents").out
    told = settings_in(tmp_path, {**DMD, "end": 1.0}, "told", **several(2.0, 6.0)).out
    for objective, more, says in (
        ({**DMD, "start": 0.9, "earlier": str(high)}, {}, "ends its phase at 1 radians"),
        (
            {**DMD, "start": 1.0, "earlier": str(tmp_path / "none")},
            {},
            "dmd.earlier: .*none/config.yaml does not exist",
        ),
        (
            {**DMD, "start": 1.0, "earlier": str(from_latents)},
            {"data": {"source": prompts}},
            "starts from real latents",
        ),
        ({**DMD, "start": 1.0, "earlier": str(high)}, {"sampling": {"steps": [1]}}, "1 step: .*take 2 to"),
        ("scm", {"sampling": {"earlier": str(high)}}, "makes samples from noise by itself"),
        (
            {**DMD, "start": 1.0, "earlier": str(told)},
            {**several(1.5, 6.0), "sampling": {"steps": [2]}},
            "learnt guidance scales from 2 to 6 in its last stage, and is asked for 1.5 to 6 here",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            train(run_of(tmp_path, objective, "run", 1, **more))
        assert not (tmp_path / "run").exists()
    times = {"name": "shifted_uniform", "between": [0.875, 1.0]}
    with pytest.raises(settings.SettingsError, match=r"times\.between begins above 0"):
        run_of(tmp_path, {"name": "scm", "times": times}, "run", 1)
    terms = [{"objective": {**DMD, "start": 1.0, "earlier": name}} for name in ("a", "b")]
    with pytest.raises(settings.SettingsError, match="name one run as `earlier`"):
        run_of(tmp_path, {"name": "terms", "terms": terms}, "run", 1)
    (tmp_path / "two" / "transformer_2").mkdir(parents=True)
    with pytest.raises(ValueError, match="a pipeline of two networks, and a student is one"):
        values_in(tmp_path / "two")


# ---------------------------------------------------------------- memory


def with_earlier(folder: Path) -> list[str]:
    high = settings_in(folder, {**DMD, "end": 1.0}, "high", model=TINY["model"])
    phase = f"{{name: dmd, simulation_steps: 2, fake_updates_per_step: 1, start: 1.0, earlier: {high.out}}}"
    return [f"stages.0.objective={phase}"]


@pytest.mark.long
def test_plan_counts_the_student_of_the_phase_before(tmp_path: Path) -> None:
    """Which is there, and makes all steps of its simulation for each update."""
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    (override,) = with_earlier(tmp_path)
    both = settings.load(RunConfig, tmp_path / "tiny.yaml", [override])
    alone = settings.load(RunConfig, tmp_path / "tiny.yaml", [override.replace("earlier:", "rollout: renoise}#")])
    [one], [other] = (plan_run(config, processes=1, on_gpu=False) for config in (both, alone))
    student = build_student(dit(**TINY["model"]["options"]), both.student)
    size = sum(x.nbytes for x in (*student.parameters(), *student.buffers()))
    assert one.resident["students of earlier phases"] == size
    assert not other.resident["students of earlier phases"]
    assert one.peak == pytest.approx(other.peak + size, rel=0.02)
    assert one.flops - other.flops == pytest.approx(2 * 2 * one.costs.plain, rel=0.01)  # for student and fake score


@pytest.mark.long
def test_the_peak_of_a_run_with_a_phase_before_within_a_tenth(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    overrides = [*with_earlier(tmp_path), "sampling.steps=[2]"]
    train(settings.load(RunConfig, tmp_path / "high" / "config.yaml", ["sampling.steps=[2]"]))
    [plan] = plan_run(settings.load(RunConfig, tmp_path / "tiny.yaml", overrides), processes=1, on_gpu=False)
    held = 1797 * 64 * 4  # the digits themselves
    assert plan.peak + held == pytest.approx(measured(tmp_path, overrides, 1), rel=0.1)


def test_the_recipe_is_sampled_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    monkeypatch.chdir(tmp_path)
    configs = {}
    for name in ("wan_high", "wan_low"):
        (block,) = re.findall(f"```yaml\n# {name}.yaml\n(.*?)```", page, re.DOTALL)
        Path(f"{name}.yaml").write_text(block)
        configs[name] = settings.load(RunConfig, Path(f"{name}.yaml"))
        configs[name].out.mkdir(parents=True)
        settings.save(configs[name], configs[name].out / "config.yaml")
    said = re.search(r"4 steps are at ([\d., and]+) radians", page)
    assert said is not None
    times = [float(time) for time in re.findall(r"\d\.\d+", said[1])]
    assert times_of(configs["wan_low"], 0, 4) == pytest.approx(times, abs=1e-4)
    assert [len(legs(configs["wan_low"], steps)) for steps in configs["wan_low"].sampling.steps] == [2, 2]
    assert [len(legs(configs["wan_high"], steps)) for steps in configs["wan_high"].sampling.steps] == [1, 1]
