"""Previews for prompts of the user's own, as files and in TensorBoard and wandb; validation beside the teacher."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.run import prompted
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.train import train
from tests.media_files import clip
from tests.test_log import log_of
from tests.test_train import config_of, stage
from tests.tiny_pipelines import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red thing", "a round field"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips prepared for a tiny Wan, which lies beside them."""
    folder = tmp_path_factory.mktemp("clips")
    checkpoint = save_tiny("WanPipeline", folder / "wan")
    for i in range(2):
        clip(folder / "in" / f"{i}.mp4", 32, 32, 5, fps=16)
    argv = ["prepare", checkpoint, folder / "in", "--out", folder / "data", "--size", "32x32", "--aspects"]
    assert cli.main([*map(str, argv), "--frames", "5", "--caption", "a thing", "--text-length", "8"]) == 0
    return folder


def run_of(clips: Path, out: Path, steps: int, **log: Any) -> RunConfig:
    file = out.with_suffix(".yaml")
    file.write_text(
        f"base: {clips}/data/settings.yaml\nout: {out}\nthreads: 1\ndevice: cpu\nstudent: {{backend: op_by_op}}\n"
        f"sampling: {{steps: [1, 2]}}\nstages: [{{objective: dcm, steps: {steps}, batch: 2, student: {{lr: 1e-4}}}}]\n"
    )
    return settings.load(RunConfig, file, [f"log.{name}={value}" for name, value in log.items()])


@pytest.mark.slow
def test_prompts_become_videos_and_are_encoded_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = {"every": 1, "preview_every": 2, "preview_count": 1, "prompts": TEXTS, "tensorboard": "true", "fps": 8}
    config = run_of(clips, tmp_path / "run", 2, **log)
    folder = train(config)
    previews = folder / "samples" / "step-00000002"
    assert sorted(path.name for path in previews.iterdir()) == ["prompt-0.webp", "prompt-1.webp", "sample-0.webp"]
    with Image.open(previews / "prompt-0.webp") as video:
        assert (video.n_frames, video.size) == (5, (32, 32))
        video.load()
        assert video.info["duration"] == 125
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"images": 0})
    events.Reload()
    assert {*events.Tags()["images"]} == {"samples/grid", "samples/0", "prompts/0", "prompts/1"}
    (image,) = events.Images("prompts/1")
    assert (image.step, image.encoded_image_string[:6]) == (2, b"GIF89a")

    plain = train(run_of(clips, tmp_path / "plain", 3, every=1))

    def fail(*args: Any) -> Any:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(prompted, "Encoder", fail)
        train(run_of(clips, tmp_path / "run", 3, **log))
        with pytest.raises(AssertionError, match="encoded again"):
            train(run_of(clips, tmp_path / "run", 4, **{**log, "prompts": TEXTS[1:]}))
    assert computed(folder / "log.jsonl") == computed(plain / "log.jsonl")  # previews change nothing
    train(run_of(clips, tmp_path / "run", 4, **{**log, "prompts": TEXTS[1:]}))  # other prompts than before
    assert [path.name for path in (folder / "samples" / "step-00000004").glob("prompt*")] == ["prompt-0.webp"]
    with Image.open(folder / "samples" / "step-00000004" / "prompt-0.webp") as video:
        assert video.n_frames == 5


@pytest.mark.slow
def test_prompts_that_cannot_be_encoded_are_refused_before_there_is_a_folder(clips: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "digits", [stage("dcm", 1)], log={"prompts": TEXTS})
    with pytest.raises(ValueError, match=r"whole pipeline.*\nName one: log\.prompts_pipeline"):
        train(config)
    sana = save_tiny("SanaPipeline", tmp_path / "sana")
    with pytest.raises(ValueError, match=r"log\.prompts: .*sana gives other conditions than the data has: encoder_"):
        train(run_of(clips, tmp_path / "run", 1, prompts=TEXTS, prompts_pipeline=sana))
    assert not (tmp_path / "digits").exists()
    assert not (tmp_path / "run").exists()


def test_wandb_gets_pictures_and_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module: Any = types.ModuleType("wandb")
    module.Image = lambda picture: ("image", picture.size)
    module.Video = lambda data, format: (format, Image.open(data).n_frames)
    module.init = lambda **_: types.SimpleNamespace(log=lambda *a, **k: calls.append((*a, k)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    frames = [Image.new("RGB", (6, 4), (50 * i, 0, 0)) for i in range(3)]
    with log_of(tmp_path, wandb="project") as log:
        log.pictures(7, {"samples/grid": frames[:1], "prompts/0": frames}, 8.0)
    assert calls == [({"samples/grid": ("image", (6, 4)), "prompts/0": ("gif", 3)}, {"step": 7})]
    assert torch.initial_seed() == 0
