"""Every recipe: a run that was killed goes on to the same bits, and a teacher is asked when its objective says."""

from __future__ import annotations

import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.networks import trainable
from jvpgraph.trainer.run.build import build_networks
from jvpgraph.trainer.run.checkpoint import Checkpoints
from jvpgraph.trainer.run.finished import load_run, sample_run
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.run.parallel import Layout
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.train import Stage, train
from jvpgraph.trainer.trigflow import Guided, level
from tests.recipes import RECIPES, STEPS
from tests.test_train import SMALL, config_of, content, last_checkpoint, run_until

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"lora": {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "adapters": ("bfloat16", LORA),
}

AS_A_USER = ("rcm", "mean_flow", "flow_map, lagrangian")  # on Inductor; the others by make test-all


def killed(whole: Path, out: Path, step: int) -> None:
    """What kill -9 leaves of a run right after the checkpoint of a step."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "samples", ignore_errors=True)
    assert Checkpoints(out / "checkpoints").latest() is not None


def settings_of(name: str, kind: str) -> dict[str, Any]:
    """Of a recipe's run, for a kind of student."""
    dtype, student = STUDENTS[kind]
    more = dict(RECIPES[name])
    model = more.pop("model", SMALL["model"])
    return {
        **more,
        "model": {**model, "options": {**model["options"], "dtype": dtype}},
        "student": {**SMALL["student"], **more.get("student", {}), **student},
        "checkpoint": {"every": 1, "keep": 99},
    }


def assert_same_end(whole: Path, again: Path, scratch: Path) -> None:
    """The same log, and the same bits in the last checkpoint."""
    assert computed(again / "log.jsonl") == computed(whole / "log.jsonl")
    expected, found = (content(last_checkpoint(folder), scratch / "content.pt") for folder in (whole, again))
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


@pytest.mark.parametrize("taught_by", ["itself", "another"])
@pytest.mark.parametrize("name", RECIPES)
def test_whoever_is_trained_is_trained_alone(tmp_path: Path, name: str, taught_by: str) -> None:
    """Adapters on shared weights: what one of them trains no other has, and a fake score changes nothing of that."""
    more = settings_of(name, "adapters")
    if taught_by == "another":
        more["teacher"] = {"model": more["model"]}
    networks = build_networks(config_of(tmp_path, **more), Layout(torch.device("cpu"), {}, None, Ranks()))
    before = trainable(networks.student)
    fake = networks.new_student()
    assert [*before] == [*trainable(networks.student)]
    own, theirs = ({id(p) for p in trainable(network).values()} for network in (networks.student, fake))
    assert own
    assert theirs
    assert not own & {id(p) for network in (fake, networks.teacher) for p in network.parameters()}
    assert not theirs & {id(p) for network in (networks.student, networks.teacher) for p in network.parameters()}
    assert not any(p.requires_grad for p in networks.teacher.parameters())
    frozen = {id(p) for p in networks.student.parameters()} - own
    shared = frozen & {id(p) for p in fake.parameters()}
    assert len(shared) > 0.8 * len(frozen)  # and the rest is there once


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", RECIPES)
def test_a_teacher_is_asked_when_its_objective_says(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Objective.asked`, by which guidance that would never act is refused: no time is left out of it."""
    found: list[float] = []
    asked: list[bool] = []
    forward, step = Guided.forward, Stage.step

    def looking(self: Guided, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        found.extend(map(level, t.tolist()))
        return forward(self, x, t, cond)

    def one(self: Stage, number: int) -> Any:
        found.clear()  # of what was tried before
        means = step(self, number)
        allowed = self.objective.asked if self.objective.asks_teacher else ()
        assert [s for s in found if not any(low - 1e-6 <= s <= high + 1e-6 for low, high in allowed)] == []
        asked.append(bool(found))
        return means

    monkeypatch.setattr(Guided, "forward", looking)
    monkeypatch.setattr(Stage, "step", one)
    config = config_of(tmp_path / "run", **settings_of(name, "float32"))
    train(config)
    assert len(asked) == STEPS
    assert any(asked) == any(stage.objective.asks_teacher for stage in config.stages)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["float32", "adapters", pytest.param("bfloat16", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, name: str, kind: str) -> None:
    more = settings_of(name, kind)
    whole = train(config_of(tmp_path / "whole", **more))
    lines = computed(whole / "log.jsonl")
    assert all(torch.isfinite(torch.tensor([*line.values()])).all() for line in lines)
    assert all(line["gradient_norm"] > 0 for line in lines)

    killed(whole, tmp_path / "killed", STEPS // 2)
    again = train(config_of(tmp_path / "killed", **more))
    assert_same_end(whole, again, tmp_path)
    steps = min(2, *load_run(again).config.sampling.steps)
    begins = pytest.raises(ValueError, match="makes none from noise") if name == "dmd, a phase" else nullcontext()
    with begins:
        assert sample_run(again, steps=steps, count=2, ema=None, seed=0, out=tmp_path / "samples").is_file()


@pytest.mark.long
@pytest.mark.matrix
@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("name", RECIPES)
def test_sigkill_in_the_middle_of_a_run(tmp_path: Path, name: str, kind: str) -> None:
    """A process of its own, killed wherever it is: in an update, or while a checkpoint is written."""
    more = settings_of(name, kind)
    more["stages"] = [{**stage, "steps": 5 * stage["steps"]} for stage in more["stages"]]
    config = config_of(tmp_path / "killed", **more)
    at_random = random.Random(f"{name} {kind}")
    run_until(config, at_random.randint(3, 2 * STEPS), tmp_path, delay=at_random.uniform(0, 0.1))
    assert_same_end(train(config_of(tmp_path / "whole", **more)), train(config), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n if n in AS_A_USER else pytest.param(n, marks=pytest.mark.matrix) for n in RECIPES])
def test_the_first_update_on_inductor(tmp_path: Path, name: str, dtype: str) -> None:
    """Its gradient is as near to that of the same weights in float64 as the eager graph's.

    Rounding is no fixed share of it: the two networks whose difference dmd follows are all but one at first.
    """
    more = settings_of(name, dtype)
    model, student = more.pop("model"), more.pop("student")
    more["stages"] = [{**stage, "steps": 1} for stage in more["stages"]]

    def trained(own: str, backend: str) -> tuple[list[dict[str, float]], Tensor]:
        options = {**model["options"], "dtype": own, "rounded": dtype}
        own_model, own_student = {**model, "options": options}, {**student, "backend": backend}
        run = train(config_of(tmp_path / f"{own} {backend}", **more, model=own_model, student=own_student))
        return computed(run / "log.jsonl"), gradient_of(run, tmp_path / "content.pt")

    (wanted, exact), (_, eager), (logged, gradient) = (
        trained(own, backend) for own, backend in (("float64", "eager"), (dtype, "eager"), (dtype, "inductor"))
    )
    floor = (1e-5 if dtype == "float32" else 2e-2) * exact.norm()
    assert (gradient - exact).norm() < 3 * (eager - exact).norm() + floor
    if dtype == "float32":
        assert all(found == pytest.approx(line, rel=1e-3) for found, line in zip(logged, wanted, strict=True))


def gradient_of(run: Path, scratch: Path) -> Tensor:
    """Of the last update, flat: without momentum it is the first moment itself."""
    moments = {k: v for k, v in content(last_checkpoint(run), scratch).items() if k.startswith(".optimizer.exp_avg.")}
    return torch.cat([moments[name].flatten().double() for name in sorted(moments)])
