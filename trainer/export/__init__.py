"""A run's student for use elsewhere: task (what is exported), a file per format, keys (original names), card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jvpgraph.trainer.evaluation.phases import times_of
from jvpgraph.trainer.export.comfyui import export_comfyui
from jvpgraph.trainer.export.lora import export_lora
from jvpgraph.trainer.export.network import export_network
from jvpgraph.trainer.export.task import Task
from jvpgraph.trainer.files import draft_folder_of
from jvpgraph.trainer.prepare.checkpoint import pipeline_of
from jvpgraph.trainer.run.finished import load_run

__all__ = ["FORMATS", "export_run"]

FORMATS: dict[str, Callable[[Task, Path], None]] = {
    "diffusers": export_network,
    "lora": export_lora,
    "comfyui": export_comfyui,
}
ADDED = "exported are those weights, widened, with the adapters added"


def export_run(
    folder: Path,
    out: Path,
    *,
    format: str = "diffusers",
    ema: float | None = None,
    step: int | None = None,
    pipeline: Path | None = None,
    steps: int | None = None,
    own_times: bool = False,
    rank: int | None = None,
    guidance: float | None = None,
    keep_scale: bool = False,
) -> Path:
    """The averaged student in a new folder, whole or not at all, with a card and the run's times in sampling.json.

    Args:
        format: diffusers: the network's class saves it (adapters merged), in its pipeline if there is one; a network
            without save_pretrained as safetensors. lora: what it adds to the teacher. comfyui: one file.
        ema: relative width of the average of the weights; None: the first of ema.sigma_rel.
        step: checkpoint to take; None: the last.
        pipeline: a whole pipeline of diffusers to put the student into; None: the one that the teacher came from.
        steps: of the scheduler; None: the most of sampling.steps.
        own_times: the scheduler keeps the run's times exactly, by a class that loads with trust_remote_code only,
            instead of even ones next to them (see schedulers.even_times) that diffusers' own can be told to use.
        rank: of a LoRA that is taken from the difference of whole weights.
        guidance: scale of a student that learnt several; None: sampling.guidance, or the middle. One that was given it
            by student.embed_scale has it in its weights then.
        keep_scale: leave that an input instead, for `diffusers_model`.

    Raises:
        ValueError: the folder is taken; or the format does not fit the network, and why.
        FileNotFoundError: no run, or no such checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty\nChoose another folder.")
    run = load_run(folder, ema=ema, step=step, guidance=guidance)
    found = pipeline_of(run.config.model.options) if pipeline is None else pipeline
    task = Task(run, folder, found, steps, own_times, rank, keep_scale)
    if keep_scale and not task.has_scale:
        raise ValueError("--keep-scale is for students of student.embed_scale, and this is none\nLeave it out.")
    if pipeline is None and found is not None and not task.goes_into_pipelines:
        task.pipeline = None
        if task.about_part:
            print(f"{task.about_part} Exported is the network alone.")
    if task.about_bytes:
        how = "on the checkpoint's own weights they act a little differently" if format == "lora" else ADDED
        print(f"{task.about_bytes[:-1]}; {how}.")
    with draft_folder_of(out) as draft:
        FORMATS[format](task, draft)
        if run.sampler == "consistency" and task.whole:
            times = {n: times_of(run.config, run.stage, n) for n in run.config.sampling.steps}
            (draft / "sampling.json").write_text(json.dumps({"times": times}, indent=2) + "\n")
    return out
