"""--format comfyui: one safetensors file with the names of the network's own repository, as ComfyUI reads it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from jvpgraph.trainer.export.card import write_card
from jvpgraph.trainer.export.keys import to_original
from jvpgraph.trainer.export.task import Task


def export_comfyui(task: Task, out: Path) -> None:
    """NAME.safetensors, and the network's config.json, with which diffusers reads it too (from_single_file).

    Raises:
        ValueError: the original names of this network's weights are not known, or it takes a second time.
    """
    task.check_inputs("ComfyUI tells")
    name = type(task.net).__name__
    tensors = to_original(task.net.state_dict(), name, getattr(task.net, "config", {}))
    file = out / f"{task.folder.resolve().name}.safetensors"
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    task.net.save_config(out)
    write_card(task, out, "comfyui")
