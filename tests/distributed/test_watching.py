"""What a run on two processes shows: the figures of one process, and its pace in all of them and in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jvpgraph.trainer.run.log import read_lines
from jvpgraph.trainer.train import train
from tests.distributed.test_train import assert_same_log, config_of, train_many
from tests.test_train import stage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_validation_previews_and_pace_of_two_processes(tmp_path: Path) -> None:
    features = {"load": "jvpgraph.trainer.features:pixels"}
    measures = {"pixels": {"load": "jvpgraph.trainer.measures:distances", "options": {"features": features}}}
    more: dict[str, Any] = {
        "validation": {"every": 2, "count": 12, "measures": measures},
        "watch": {"every": 2, "count": 4},
        "sampling": {"teacher_steps": 3, "steps": [2], "batch": 8},
        "log": {"every": 4, "preview_every": 4, "preview_count": 2},
    }
    stages = [stage("dcm", 4, accumulate=2)]
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, "FSDP2", **more), "FSDP2")
    assert_same_log(many, one, tolerance=1e-7)
    last, alone = read_lines(many / "log.jsonl")[-1], read_lines(one / "log.jsonl")[-1]
    assert "validation/pixels/recall_teacher" in last
    assert last["watch/distance"] > 0
    assert last["samples"] == alone["samples"] == 64
    assert last["samples_per_second"] == pytest.approx(16 / last["seconds_per_step"])
    assert last["samples_per_second_each"] == pytest.approx(last["samples_per_second"] / 2)
    assert "samples_per_second_each" not in alone
    assert (many / "samples" / "step-00000004.png").read_bytes().startswith(b"\x89PNG")
    assert (many / "validation.safetensors").is_file()
