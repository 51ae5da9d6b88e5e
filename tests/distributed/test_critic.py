"""A critic on many processes: whole in each, on features of networks that are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jvpgraph.trainer.train import train
from tests.distributed.test_train import assert_same_content, assert_same_log, config_of, train_many
from tests.test_adversarial import OF_TEACHER, SUM
from tests.test_train import stage

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"lora": {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}}


@pytest.mark.long
@pytest.mark.parametrize(
    ("parallel", "objective", "student"),
    [
        pytest.param("FSDP2", SUM, {}, id="fake score"),
        pytest.param("FSDP2", OF_TEACHER, {}, id="teacher", marks=pytest.mark.matrix),
        pytest.param("FSDP2", SUM, LORA, id="LoRA", marks=pytest.mark.matrix),
        pytest.param("FSDP2", SUM, {"checkpoint_blocks": True}, id="checkpointed", marks=pytest.mark.matrix),
        pytest.param("TP", SUM, {}, id="TP", marks=pytest.mark.matrix),
    ],
)
def test_a_critic_learns_the_same_on_two_processes(
    tmp_path: Path, parallel: str, objective: dict[str, Any], student: dict[str, Any]
) -> None:
    stages = [stage(objective, 4, critic={"lr": 1e-3}, accumulate=2)]
    more = {"student": {"backend": "eager", **student}}
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, parallel, **more), parallel)
    assert_same_log(many, one, tolerance=1e-6)
    if not student:
        assert_same_content(many, one, tmp_path)


@pytest.mark.matrix
def test_the_expert_of_an_earlier_phase_is_split_too(tmp_path: Path) -> None:
    """And makes previews with the next one."""
    dmd = {"name": "dmd", "fake_updates_per_step": 1, "simulation_steps": 2}
    more = {"sampling": {"steps": [2]}, "log": {"every": 1, "preview_every": 3, "preview_count": 4}}
    first = train(config_of(tmp_path / "first", [stage({**dmd, "end": 1.0}, 2)], **more))
    stages = [stage({**dmd, "start": 1.0, "earlier": str(first)}, 3)]
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, "FSDP2", **more), "FSDP2")
    assert_same_log(many, one, tolerance=1e-6)
    pictures = [np.asarray(Image.open(run / "samples" / "step-00000003.png")).astype(int) for run in (one, many)]
    assert abs(pictures[0] - pictures[1]).max() <= 1
