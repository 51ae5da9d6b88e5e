"""Runs with the objectives' variants: on the default backend in two precisions, resumed, planned; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.plan.plan import plan_run
from jvpgraph.trainer.run.memory import clashes
from jvpgraph.trainer.run.parallel import sizes_of
from jvpgraph.trainer.settings import from_dict, to_dict
from jvpgraph.trainer.train import train
from tests.test_train import SMALL, config_of, content, last_checkpoint, stage
from tests.tiny_runs import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

TERMINAL = {"name": "flow_map", "method": "terminal"}
VARIANTS: list[dict[str, Any]] = [
    {"name": "flow_map", "longest": 0.5, "clean_share": 0.0, "tangent_warmup": 2},
    {"name": "flow_map", "method": "lagrangian", "velocity": "own"},
    TERMINAL,
    {"name": "free_flow"},
    {"name": "mean_flow", "velocity": "data", "own_direction": 1.0, "guidance": 1.5, "guidance_mix": 0.5},
    {"name": "mean_flow", "discrete": {"first": 0.5, "end": 2}},
    {"name": "scm", "coordinates": "rf", "velocity": "data"},
    {"name": "rcm", "scm": {"points": "trajectory", "trajectory_steps": 2}, "dmd": {"fake_updates_per_step": 1}},
    {"name": "dcm", "target": "ema", "jitter": True, "huber": 0.01, "noise": 0.5, "substeps": 2},
]


@pytest.mark.long
def test_variants_train_and_resume_to_the_bit(tmp_path: Path) -> None:
    """A stage each: from the middle of the first one again, and from the middle of the last."""
    more = {"checkpoint": {"every": 1, "keep": 99}, "sampling": {"steps": [1]}}
    config = config_of(tmp_path / "run", [stage(objective, 2) for objective in VARIANTS], **more)
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 2 * len(VARIANTS) + 1))
    assert all(line["gradient_norm"] > 0 for line in lines)
    whole = content(last_checkpoint(folder), tmp_path / "whole.pt")
    for begin in (1, 2 * len(VARIANTS) - 1):
        for path in sorted((folder / "checkpoints").glob("step-*"))[begin + 1 :]:
            shutil.rmtree(path)
        again = content(last_checkpoint(train(config)), tmp_path / "again.pt")
        assert whole.keys() == again.keys()
        assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_through_the_tangent_on_the_default_backend(tmp_path: Path, dtype: str) -> None:
    """The same first steps as without Inductor, to rounding; another stage has a tangent without gradients."""
    losses = {}
    for backend in ("inductor", "eager"):
        config = config_of(
            tmp_path / backend,
            [stage(TERMINAL, 2), stage("flow_map", 1)],
            student={"backend": backend, "dtype": dtype},
        )
        lines = [json.loads(line) for line in (train(config) / "log.jsonl").read_text().splitlines()]
        losses[backend] = [(line["loss"], line["gradient_norm"]) for line in lines]
    torch.testing.assert_close(
        losses["inductor"], losses["eager"], rtol=0.05 if dtype == "bfloat16" else 1e-3, atol=1e-3
    )


@pytest.mark.long
def test_plan_asks_for_the_negative_condition_that_a_target_takes() -> None:
    objective = {"name": "mean_flow", "velocity": "data", "guidance": 1.5}
    config = from_dict(RunConfig, {**TINY, "stages": [{"steps": 4, "batch": 4, "objective": objective}]})
    [plan] = plan_run(config, processes=1, on_gpu=False)
    assert plan.flops > 0


@pytest.mark.long
def test_plan_counts_the_backward_through_the_tangent() -> None:
    flops = {}
    for method in ("lagrangian", "terminal"):
        objective = {"name": "flow_map", "method": method}
        config = from_dict(RunConfig, {**TINY, "stages": [{"steps": 4, "batch": 4, "objective": objective}]})
        [plan] = plan_run(config, processes=1, on_gpu=False)
        flops[method] = plan.flops
    assert flops["terminal"] > 1.2 * flops["lagrangian"]


def test_a_gradient_through_the_tangent_needs_one_graph() -> None:
    stages = [stage("scm", 1), stage(TERMINAL, 1)]
    config = from_dict(RunConfig, {**SMALL, "out": "run", "stages": stages, "student": {"backend": "op_by_op"}})
    [said] = clashes(config, sizes_of(config.parallel, 1))
    assert "stages.1.objective: the gradient of flow_map goes through the tangent" in said
    assert "Set student.backend to inductor or eager" in said
    lora = {"teacher": {"quantization": "int8"}, "student": {"lora": {"rank": 2, "alpha": 2.0}}}
    [said] = clashes(
        from_dict(RunConfig, {**SMALL, "out": "run", "stages": stages, **lora}), sizes_of(config.parallel, 1)
    )
    assert "needs plain weights. Set teacher.quantization to null" in said
    for name in ("dp_shard", "tp"):
        config = from_dict(RunConfig, {**SMALL, "out": "run", "stages": stages, "parallel": {name: 2}})
        [said] = clashes(config, sizes_of(config.parallel, 2))
        assert f"one graph in one process, which parallel.{name} takes apart. Set it to 1" in said


def test_what_would_go_wrong_later_is_refused(tmp_path: Path) -> None:
    guided = {"name": "mean_flow", "velocity": "data", "guidance": 2.0}
    with pytest.raises(ValueError, match=r"mean_flow asks the network without a prompt: give guidance\.negative"):
        train(config_of(tmp_path / "a", [stage(guided, 1)], guidance={}))
    with pytest.raises(ValueError, match=r"dcm with 4 segments is sampled in 4 steps.* set sampling.steps to \[4\]"):
        train(config_of(tmp_path / "b", [stage({"name": "dcm", "segments": 4}, 1)]))
    model = {"load": "tests.test_train:one_time"}
    with pytest.raises(ValueError, match=r"free_flow trains jumps from noise alone.* not 1, 2, 4: set sampling.steps"):
        train(config_of(tmp_path / "c", [stage("free_flow", 1)]))
    for name in ("flow_map", "free_flow"):
        with pytest.raises(ValueError, match=f"{name} needs a network with a second time"):
            train(config_of(tmp_path / name, [stage(name, 1)], model=model))
    assert not list(tmp_path.iterdir())


def test_settings_of_variants_are_kept(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [stage(objective, 1) for objective in VARIANTS])
    assert from_dict(RunConfig, to_dict(config)) == config
