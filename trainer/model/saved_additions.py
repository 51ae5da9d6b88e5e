"""Networks of diffusers that keep what was added to them, beside what their class knows, and give it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from jvpgraph.trainer.model.additions import EMBEDDED, INTERVAL, NAMES, TimeInput, added, of_addition
from jvpgraph.trainer.model.embedded_scale import embed_scale
from jvpgraph.trainer.model.second_time import add_second_time
from jvpgraph.trainer.trigflow import TrigFlow

SAVED = {INTERVAL: "_second_time", EMBEDDED: "_guidance_scale"}  # in config.json: diffusers passes over what has a _
ADD = {INTERVAL: add_second_time, EMBEDDED: embed_scale}


def saved_with(net: Any) -> Any:
    """The network itself, which says in its config.json where it was given what."""
    if hasattr(net, "register_to_config"):
        given = {SAVED[name]: asdict(addition.place) for name, addition in added(net).items()}
        gone = {key: None for key in SAVED.values() if key in net.config}
        net.register_to_config(**{**gone, **given})
    return net


def without_complaint(cls: Any, config: Mapping[str, Any]) -> Any:
    """A class of diffusers that loads what `saved_with` saved, and leaves what was added to `load_additions`."""
    known = cls._keys_to_ignore_on_load_unexpected or []
    ours = [rf"^{name}\." for name in NAMES if config.get(SAVED[name]) is not None]
    return type(cls.__name__, (cls,), {"_keys_to_ignore_on_load_unexpected": [*known, *ours]})


@torch.no_grad()
def load_additions(model: TrigFlow, folder: Path) -> None:
    """Adds what its network was saved with, and takes the weights of that from the folder's safetensors.

    Raises:
        ValueError: they are not there, or of another shape.
    """
    config: Any = getattr(model.net, "config", {})
    places = {name: config[key] for name, key in SAVED.items() if config.get(key) is not None}
    for name, place in places.items():
        ADD[name](model, TimeInput(**place))
    wanted = {name: p for name, p in model.net.state_dict().items() if of_addition(name, places)}
    if all(value.is_meta for value in wanted.values()):
        return
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                wanted.pop(name).copy_(tensors.get_tensor(name))
    if wanted:
        raise ValueError(
            f"{folder}: config.json says that the network takes more than its class knows, and {len(wanted)} of its "
            f"tensors are missing, such as {min(wanted)}\nExport it again; diffusers itself does not save them."
        )
