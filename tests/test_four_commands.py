"""prepare, plan, train, export: from a checkpoint and a folder to a pipeline and a LoRA file that diffusers takes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.config import RunConfig
from tests.media_files import clip, picture
from tests.tiny_pipelines import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:diffusers"),
]

PROMPT = "a red thing"
SIZES = (64, 48), (48, 64), (64, 64), (128, 64)
SMALL = ("student.lora.rank=4", "stages.0.accumulate=1", "stages.0.steps=2", "threads=1", "device=cpu")
QUICK = ("stages.0.objective.dmd.fake_updates_per_step=1", "stages.0.student.lr=1e-2", "log.preview_every=2")


@dataclass(frozen=True)
class Walk:
    """What somebody has, and how the commands are started."""

    pipeline: str
    folder: str  # pictures, clips or prompts
    dtype: str = "float32"
    backend: str = "inductor"
    as_user: bool = False  # from a shell in another folder, or in this process

    def __str__(self) -> str:
        name = "-".join([self.pipeline.removesuffix("Pipeline"), self.folder, self.dtype, self.backend])
        return f"{name}-shell" * self.as_user or name

    @property
    def options(self) -> list[str]:
        side = "64x64" if self.pipeline == "LTXPipeline" else "32x32"
        frames = ["--frames", "9" if self.folder == "clips" else "1"] if self.pipeline in VIDEO else []
        aspects = ["2:1"] if self.as_user else []  # each shape costs Inductor a graph
        text = [] if self.begins else ["--text-length", "16"]  # with a picture, 512
        return ["--size", side, "--aspects", *aspects, *text, "--dtype", self.dtype, *frames]

    @property
    def begins(self) -> bool:
        """Whether the pipeline is given a picture to begin with."""
        return "ImageToVideo" in self.pipeline

    @property
    def forms(self) -> tuple[str, ...]:
        """Formats to export: diffusers has no LoRA for PRX."""
        return ("diffusers",) if self.pipeline == "PRXPipeline" else ("diffusers", "lora")


VIDEO = ("WanPipeline", "LTXPipeline", "WanImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline")
FAMILIES = (
    "WanPipeline",
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "QwenImagePipeline",
    "LTXPipeline",
    "SanaPipeline",
    "ZImagePipeline",
    "CogView4Pipeline",
    "PRXPipeline",
    "WanImageToVideoPipeline",
    "SkyReelsV2ImageToVideoPipeline",
)
WALKS = [
    Walk("SanaPipeline", "pictures", backend="op_by_op"),
    Walk("WanPipeline", "clips", backend="op_by_op"),
    Walk("FluxPipeline", "prompts", backend="op_by_op"),
]
SWEEP = [
    Walk("WanImageToVideoPipeline", "clips", backend="op_by_op"),
    Walk("SkyReelsV2ImageToVideoPipeline", "clips", backend="op_by_op"),
    Walk("ZImagePipeline", "pictures", backend="op_by_op"),
    Walk("CogView4Pipeline", "pictures", backend="op_by_op"),
    Walk("PRXPipeline", "prompts", backend="op_by_op"),
    Walk("SanaPipeline", "pictures", backend="op_by_op", as_user=True),
    *(
        Walk(name, folder, dtype)
        for name in FAMILIES
        for folder in ("clips" if name in VIDEO else "pictures", *([] if "ImageToVideo" in name else ["prompts"]))
        for dtype in ("float32", "bfloat16")
    ),
]


def command(walk: Walk, here: Path, *arguments: str) -> None:
    """Runs it in the folder `here`, and fails with what it said."""
    if not walk.as_user:
        assert cli.main(arguments) == 0
        return
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-W", "ignore", "-m", "jvpgraph.trainer.cli", *arguments]
    done = subprocess.run(line, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def fill(folder: Path, kind: str) -> str:
    """12 of a kind; what prepare is given."""
    if kind == "prompts":
        (folder / "mine.txt").write_text("\n".join(f"a {colour} thing" for colour in ("red", "green", "blue") * 4))
        return "mine.txt"
    for i in range(12):
        if kind == "clips":
            clip(folder / "mine" / f"{i:02d}.mp4", 64, 64, 10)
        else:
            picture(folder / "mine" / f"{i:02d}.{('jpg', 'png', 'webp')[i % 3]}", *SIZES[i % 4], i)
    return "mine"


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("walk", [*WALKS, *(pytest.param(w, marks=pytest.mark.matrix) for w in SWEEP)], ids=str)
def test_four_commands_give_a_pipeline_and_a_lora_file(
    walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(walk.pipeline)
    dtype = getattr(torch, walk.dtype)
    made.to(dtype).save_pretrained(tmp_path / "checkpoint")
    given = fill(tmp_path, walk.folder)
    changes = [*SMALL, *QUICK[walk.folder == "prompts" :], f"student.backend={walk.backend}"]

    command(walk, tmp_path, "prepare", "checkpoint", given, "--out", "data/mine", *walk.options)
    if walk.as_user:  # with a tangent, its graph takes as long as the rest
        command(walk, tmp_path, "plan", "data/mine/run.yaml", *changes)
    command(walk, tmp_path, "train", "data/mine/run.yaml", *changes)
    for form in walk.forms:
        command(walk, tmp_path, "export", "out/mine", "--format", form)
    first = ["--images", "first.png"] if walk.begins else []
    picture(tmp_path / "first.png", 32, 32, 0)
    command(walk, tmp_path, "sample", "out/mine", "--prompts", PROMPT, "--out", "shown", *first)

    run = tmp_path / "out" / "mine"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in log)
    config = settings.load(RunConfig, run / "config.yaml")
    assert config.stages[0].objective.name == ("dmd" if walk.folder == "prompts" else "rcm")

    pipe = loaded(run / "export-diffusers", dtype)
    unguided = 0.0 if walk.pipeline == "ZImagePipeline" else 1.0
    call = {"num_inference_steps": 4, "guidance_scale": unguided, "true_cfg_scale": 1.0, **config.sampling.call}
    if "guidance_scale" in config.sampling.call:  # the network is told it
        call.pop("true_cfg_scale")
    call = {name: value for name, value in call.items() if name in inspect.signature(pipe.__call__).parameters}
    if walk.begins:
        call["image"] = Image.open(tmp_path / "first.png")
    (shown,) = (tmp_path / "shown").iterdir()
    frames = sampled(pipe, call, "pil")[0]
    with Image.open(shown) as film:
        for i, frame in enumerate(frames if isinstance(frames, list) else [frames]):
            film.seek(i)
            off = np.asarray(film.convert("RGB"), float) - np.asarray(frame.convert("RGB"), float)
            assert np.abs(off).max() <= 1
    student = sampled(pipe, call, "latent")
    if "lora" not in walk.forms:
        return

    pipe = loaded(tmp_path / "checkpoint", dtype)
    lora = run / "export-lora"
    pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_pretrained(lora, subfolder="scheduler")
    teacher = sampled(pipe, call, "latent")
    pipe.load_lora_weights(lora)
    learnt = (student - teacher).double().norm()
    assert learnt > 1e-3 * teacher.double().norm()
    missing = (student - sampled(pipe, call, "latent")).double().norm()
    assert missing < (1e-4 if walk.dtype == "float32" else 0.1) * learnt


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: Any, call: dict[str, Any], kind: str) -> Any:
    torch.manual_seed(0)
    return pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(0), output_type=kind, **call)[0]
