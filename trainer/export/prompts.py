"""Pictures and videos of prompts, by the pipeline with the student in it: what the exported pipeline makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from jvpgraph.trainer.export.task import Task
from jvpgraph.trainer.model.adapters import computing_dtype
from jvpgraph.trainer.model.pipelines import load_pipeline
from jvpgraph.trainer.pictures import Film, mp4_writer, save_frames
from jvpgraph.trainer.prepare.checkpoint import pipeline_of
from jvpgraph.trainer.run.finished import load_run

FRAMES_PER_SECOND = 16  # of the animated pictures; Wan's


def sample_prompts(
    folder: Path,
    prompts: Sequence[str],
    *,
    out: Path,
    pipeline: Path | None = None,
    steps: int | None = None,
    own_times: bool = False,
    ema: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    images: Sequence[Path] = (),
    film: Film = "webp",
    more: Mapping[str, Any] | None = None,
) -> list[Path]:
    """OUT/0000.png and so on, animated WebP or MP4 for videos; prompt i has the seed `seed` + i.

    Args:
        images: pictures that videos begin with, one for each prompt, or one for all.
        pipeline, steps, own_times, ema, guidance: as for export_run.
        more: further arguments of the pipeline's call, such as height and num_frames.

    Raises:
        ValueError: no pipeline, or none that can sample the student; or the pipeline refuses its arguments, or wants
            pictures.
    """
    if film == "mp4":
        mp4_writer()
    run = load_run(folder, ema=ema, guidance=guidance)
    found = pipeline_of(run.config.model.options) if pipeline is None else pipeline
    task = Task(run, folder, found, steps, own_times)
    pictures = first_frames(task, len(prompts), images)
    pipe = assemble(task)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, prompt in enumerate(prompts):
        try:
            sample = call(pipe, prompt, seed + i, {**task.arguments(), **pictures[i], **(more or {})})
        except TypeError as error:
            raise ValueError(f"{type(pipe).__name__} does not take these arguments: {error}") from error
        frames = sample if isinstance(sample, list) else [sample]
        files.append(save_frames(frames, out / f"{i:04d}", FRAMES_PER_SECOND, film))
    return files


def first_frames(task: Task, count: int, images: Sequence[Path]) -> list[dict[str, Any]]:
    """The argument `image` of each of `count` calls, where the pipeline takes one. Raises ValueError."""
    task.check_pipeline()
    if not task.first_frame and not images:
        return [{}] * count
    if not task.first_frame or len(images) not in (1, count):
        wants = (
            f"begins with a picture: give one, or one for each of {count} prompts" if task.first_frame else "takes none"
        )
        raise ValueError(f"--images: {len(images)} pictures, and a {task.index['_class_name']} {wants}")
    opened = []
    for path in images:
        try:
            with Image.open(path) as picture:
                opened.append(picture.convert("RGB"))
        except UnidentifiedImageError as error:
            raise ValueError(f"--images: {path} is no picture that can be read\nGive a .jpg, .png or .webp.") from error
    return [{"image": picture} for picture in (opened * count if len(opened) == 1 else opened)]


def assemble(task: Task) -> Any:
    """The pipeline with the student and its scheduler, in the student's dtype and on its device."""
    folder = task.check_pipeline()
    parts = {name: net for name, net in task.networks.items() if name in task.index}
    if task.own_scheduler:
        parts["scheduler"] = task.scheduler
    pipe = load_pipeline(task.pipeline_class(), folder, computing_dtype(task.net), **parts)
    if task.boundary is not None:
        pipe.register_modules(**task.networks)  # a pipeline of one network takes another in
        pipe.register_to_config(boundary_ratio=task.boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(next(task.net.parameters()).device)


def call(pipe: Any, prompt: str, seed: int, arguments: Mapping[str, Any]) -> Any:
    """One picture, or a list of frames. Schedulers that get no generator from their pipeline draw from torch's own."""
    torch.manual_seed(seed)
    generator = torch.Generator(pipe.device).manual_seed(seed)
    return pipe(prompt=prompt, generator=generator, output_type="pil", **arguments)[0][0]
