"""Folders of diffusers' pipelines: what they say of their networks, and how they are loaded."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jvpgraph.trainer.files import read_json

FORMERLY_ONE = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def class_name(config: Mapping[str, Any]) -> str:
    """The class of a network by its config.json. DiT and PixArt were one once, and their checkpoints still say so."""
    name = str(config.get("_class_name", "a network without _class_name"))
    return FORMERLY_ONE.get(config.get("norm_type", ""), name) if name == "Transformer2DModel" else name


def boundary_of(index: Mapping[str, Any]) -> float | None:
    """The rectified-flow time at which a pipeline, by its model_index.json, changes networks; None: it has one."""
    two = (index.get("transformer_2") or [None])[0] is not None and index.get("boundary_ratio") is not None
    return float(index["boundary_ratio"]) if two else None


def check_one_network(path: Path, index: Mapping[str, Any]) -> None:
    """Raises ValueError for a pipeline, by its model_index.json, that changes networks on its way."""
    if (boundary := boundary_of(index)) is not None:
        raise ValueError(
            f"{path} has two networks, one above and one below {boundary:g} of the noise, and a student is one network "
            f"for all of it.\nGive one of the two, such as {path / 'transformer'}. Both can be its teacher: "
            "teacher.model={load: jvpgraph.trainer.adapters:experts}. Or give a checkpoint with one."
        )


def load_pipeline(cls: Any, folder: Path, dtype: torch.dtype | dict[str, torch.dtype], **parts: Any) -> Any:
    """A pipeline from its folder, with some parts given; `dtype` may be by part. Raises what diffusers does."""
    lend_classes(cls, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # 0.36 knows no other
        return cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **parts)


def lend_classes(cls: Any, folder: Path) -> None:
    """Puts classes of diffusers' own that a pipeline looks for in transformers there, as PRX' text encoder.

    diffusers does so itself, and transformers loses it where its module has been made anew since.
    """
    package, library = (importlib.import_module(name) for name in (cls.__module__.rpartition(".")[0], "transformers"))
    parts = [value for value in read_json(folder / "model_index.json").values() if isinstance(value, list)]
    for name in (value[1] for value in parts if value[0] == "transformers"):
        if not hasattr(library, name) and hasattr(package, name):
            setattr(library, name, getattr(package, name))
