"""Every recipe: a run that was killed goes on to the same bits, whole or as adapters, in float32 or bfloat16."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from jvpgraph.trainer.run.checkpoint import Checkpoints
from jvpgraph.trainer.run.finished import load_run, sample_run
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.train import train
from tests.recipes import RECIPES, STEPS
from tests.test_train import SMALL, config_of, content, last_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"lora": {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "adapters": ("bfloat16", LORA),
}


def killed(whole: Path, out: Path, step: int) -> None:
    """What kill -9 leaves of a run right after the checkpoint of a step."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "samples", ignore_errors=True)
    assert Checkpoints(out / "checkpoints").latest() is not None


@pytest.mark.long
@pytest.mark.parametrize("kind", ["float32", "adapters", pytest.param("bfloat16", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, name: str, kind: str) -> None:
    dtype, student = STUDENTS[kind]
    more = dict(RECIPES[name])
    model = more.pop("model", SMALL["model"])
    model = {**model, "options": {**model["options"], "dtype": dtype}}
    more["student"] = {**SMALL["student"], **more.get("student", {}), **student}
    more["checkpoint"] = {"every": 1, "keep": 99}
    whole = train(config_of(tmp_path / "whole", **more, model=model))
    lines = computed(whole / "log.jsonl")
    assert all(torch.isfinite(torch.tensor([*line.values()])).all() for line in lines)
    assert all(line["gradient_norm"] > 0 for line in lines)

    killed(whole, tmp_path / "killed", STEPS // 2)
    again = train(config_of(tmp_path / "killed", **more, model=model))
    assert computed(again / "log.jsonl") == lines
    expected, found = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (whole, again))
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    steps = min(2, *load_run(again).config.sampling.steps)
    begins = pytest.raises(ValueError, match="makes none from noise") if name == "dmd, a phase" else nullcontext()
    with begins:
        assert sample_run(again, steps=steps, count=2, ema=None, seed=0, out=tmp_path / "samples").is_file()
