"""The walks of docs/walks, as a reader follows them: files are written, commands and code run one after the other.

What makes a walk take hours is replaced by less: sizes, steps, and the checkpoint by a tiny one of random weights.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from jvpgraph.trainer.cli import main
from tests.media_files import clip
from tests.tiny_pipelines import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WALKS = Path(__file__).parents[1] / "docs" / "walks"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    torch._dynamo.reset()
    return tmp_path


def walk(name: str, less: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything that the Python of the walk has named at its end."""
    text = (WALKS / f"{name}.md").read_text()
    for whole, part in less.items():
        assert whole in text, whole
        text = text.replace(whole, part)
    module = ModuleType(f"walk_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, (kind, block) in enumerate(BLOCK.findall(text)):
        named = re.match(r"# (my_\w+\.\w+)\n", block)
        file = Path(named[1] if named else f"block_{number}.{kind}")
        file.write_text(block)
        if kind == "sh":
            for command in block.splitlines():
                program, *arguments = shlex.split(command, comments=True)
                assert program == "jvpgraph", command
                assert main(arguments) == 0, command
        elif kind == "python":
            exec(compile(block, str(file.absolute()), "exec"), vars(module))
        else:
            assert kind == "yaml"
            assert named
    return vars(module)


def losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_distil_your_diffusers_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("WanPipeline", Path("models/wan"))
    for i in range(3):
        clip(Path(f"clips/{i}.mp4"), 64, 32, 9, caption="a red thing moves over")
    less = {
        "832x480": "64x32",
        "--frames 81": "--frames 9",
        "height=480, width=832, num_frames=81": "height=32, width=64, num_frames=9",
        "steps: 10000": "steps: 2",
        "batch: 8": "batch: 2",
        "--gpus 8 parallel.dp_shard=-1": "--gpus 1",
        "preview_every: 500, preview_count: 4": "preview_every: 2, preview_count: 1",
        "checkpoint_blocks: true": "checkpoint_blocks: true\n  backend: eager",
    }
    named = walk("diffusers", less, monkeypatch)
    assert torch.as_tensor(named["video"].frames).shape[:3] == (1, 9, 32)
    told = capsys.readouterr().out
    assert "3 samples" in told
    assert "fits: " in told
    assert all(map(torch.isfinite, torch.tensor(losses("out/mine"))))
    assert list(Path("mine-lora").glob("*.safetensors"))


@pytest.mark.long
def test_distil_a_model_of_your_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the default backend, with a teacher that is better than none."""
    less = {
        "steps: 2000, condition": "steps: 60, condition",
        "steps: 500": "steps: 3",
        "steps: 2000, st": "steps: 3, st",
    }
    named = walk("own", less, monkeypatch)
    assert "right" in capsys.readouterr().out
    before, *_, after = losses("out/teacher")
    assert after < 0.8 * before
    trained, fresh = named["student"].net.state_dict(), named["teacher"]().net.state_dict()
    assert not any(torch.equal(trained[key], fresh[key]) for key in fresh)
    assert Path("out/mine/samples-4.png").is_file()


@pytest.mark.long
def test_only_the_tangent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    named = walk("tangent", {}, monkeypatch)
    assert named["losses"][-1] < named["losses"][0]
    told = capsys.readouterr().out
    assert "inductor, against forward AD in float64: right" in told
    assert "1 swapped, 1 fused with the tangent, 0 left" in told


def test_what_a_walk_does_not_say_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="steps: 12345"):
        walk("own", {"steps: 12345": "steps: 1"}, monkeypatch)
