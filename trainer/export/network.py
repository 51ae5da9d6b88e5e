"""--format diffusers: the network as its class saves it, in its pipeline if there is one; others as safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_model

from jvpgraph.trainer import settings
from jvpgraph.trainer.evaluation.phases import is_whole
from jvpgraph.trainer.export.card import write_card
from jvpgraph.trainer.export.task import Task

BESIDE = ("tokenizer", "text_encoder", "vae")  # what AnyFlow's pipeline has of Wan's


def export_network(task: Task, out: Path) -> None:
    """A whole pipeline if `task` names one, else the network alone, by its own save_pretrained or as safetensors."""
    if task.pipeline is not None:
        write_pipeline(task, out)
        write_card(task, out, "pipeline")
    elif hasattr(task.net, "save_pretrained"):
        task.net.save_pretrained(out)
        if is_whole(task.run.parts) and (task.fits or task.by_jumps):
            task.save_scheduler(out / "scheduler")
        write_card(task, out, "network")
    else:
        write_plain(task, out)
        write_card(task, out, "plain")


def write_pipeline(task: Task, out: Path) -> None:
    """The pipeline's folder with the student and its scheduler in the place of the teacher's; the rest is copied.

    Components that are not in model_index.json, such as the same weights as one big file, stay behind.
    """
    folder, index = task.check_pipeline(), dict(task.index)
    kept = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    if task.by_jumps:
        index = {"_class_name": task.pipeline_class().__name__, "_diffusers_version": index.get("_diffusers_version")}
        index |= {name: task.index[name] for name in BESIDE if name in kept}
        kept = [*BESIDE]
    for name in kept:
        if name not in (*task.networks, "scheduler") and (folder / name).is_dir():
            shutil.copytree(folder / name, out / name)
    for name, net in task.networks.items():
        net.save_pretrained(out / name)
        index[name] = ["diffusers", type(net).__name__]  # which an old checkpoint calls otherwise
    if task.boundary is not None:
        index["boundary_ratio"] = task.boundary
    if task.own_scheduler:
        index["scheduler"] = task.save_scheduler(out / "scheduler")
    else:
        shutil.copytree(folder / "scheduler", out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_plain(task: Task, out: Path) -> None:
    """model.safetensors, the run's settings, and the user's file with the function that builds the network."""
    save_model(task.net, str(out / "model.safetensors"))
    settings.save(task.run.config, out / "config.yaml")
    if (file := task.run.config.model.file) is not None:
        shutil.copy(file, out / file.name)
