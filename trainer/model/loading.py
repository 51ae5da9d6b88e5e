"""Networks of diffusers from folders and single files, whole or not at all; new ones; and the package itself."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from jvpgraph.trainer.data.sample import shorten
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.additions import of_addition
from jvpgraph.trainer.model.pipelines import check_one_network, class_name
from jvpgraph.trainer.model.saved_additions import without_complaint
from jvpgraph.trainer.model.student import kept_in_float32


def load(path: Path, config: str | None, dtype: torch.dtype, class_of: Callable[[str], Any]) -> nn.Module:
    """The network in a folder of its own or of a pipeline, or in a single file, which `config` says the network of.

    Args:
        class_of: diffusers' class by its name.

    Raises:
        ValueError: there is none, or its weights are not those of its config.json.
    """
    if path.suffix == ".safetensors":
        return load_single_file(path, path.parent if config is None else Path(config), dtype, class_of)
    folder = folder_of(path)
    if not (folder / "config.json").exists():
        if not path.exists():
            raise ValueError(
                f"{path} is no folder here; what is on the Hub has to be downloaded first: "
                f"hf download {path} --local-dir FOLDER, and then path: FOLDER"
            )
        raise ValueError(f"{path} holds no config.json of a diffusers network, neither does {folder}")
    if folder != path and (path / "model_index.json").is_file():
        check_one_network(path, read_json(path / "model_index.json"))
    description = read_json(folder / "config.json")
    cls = class_of(class_name(description))
    if torch.get_default_device().type == "meta":  # jvpgraph plan asks for shapes: no weights are read
        return in_dtype(cls.from_config(cls.load_config(folder)), dtype)
    known = without_complaint(cls, description)
    net, found = known.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    check_complete(folder, net, **found)
    net.__class__ = cls
    return net.double() if dtype == torch.float64 else net


def folder_of(path: Path) -> Path:
    """That of a network, which may be a pipeline's."""
    return path if (path / "config.json").exists() else path / "transformer"


def load_single_file(path: Path, folder: Path, dtype: torch.dtype, class_of: Callable[[str], Any]) -> nn.Module:
    """A file with the names of the network's own repository, as ComfyUI has them; `folder` says what it is."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist\nGive a folder of diffusers, or a .safetensors file.")
    folder = folder if (folder / "config.json").exists() else folder / "transformer"
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{path} is a single file, and there is no config.json of a diffusers network for it in {folder.parent}\n"
            "Name a folder that has one by the option config: that of the same model in diffusers' format."
        )
    name = class_name(read_json(folder / "config.json"))
    cls = class_of(name)
    if not hasattr(cls, "from_single_file"):
        raise ValueError(f"diffusers reads no single files of {name}\nGive a folder in diffusers' format.")
    try:
        with safe_open(path, "pt") as tensors:
            scales = sorted(filter(is_scale, tensors.keys()))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}\nDownload it again.") from error
    if scales:
        raise ValueError(
            f"{path} is quantised, and diffusers leaves out its scales, such as {scales[0]}\n"
            "Give the file in bfloat16, float16, or float8 without scales."
        )
    try:
        with default_dtype(dtype):  # told a dtype, it would cast the tables too
            net = cls.from_single_file(str(path), config=str(folder), local_files_only=True)
    except NotImplementedError as error:  # it moves what it has left on the meta device
        raise ValueError(
            f"{path}: it has not all weights of the {name} in config.json\nTake both from the same place."
        ) from error
    return in_dtype(net, dtype)


def check_complete(
    source: Path, net: nn.Module, missing_keys: Iterable[str], unexpected_keys: Iterable[str], **_found: Any
) -> None:
    """Raises ValueError if a network got less than it has, or if there was more of what it has, or had.

    diffusers warns of both, and goes on: with values at random, or without any. What it has no use for may be nothing,
    such as a buffer of an older version; but not blocks, scales of quantised weights, or what was added.
    """
    kinds = {kind_of(name) for name in net.state_dict()}
    wrong = [f"{name} is missing" for name in missing_keys]
    wrong += [
        f"{name} is of no use"
        for name in unexpected_keys
        if kind_of(name) in kinds or is_scale(name) or of_addition(name)
    ]
    if wrong:
        raise ValueError(
            f"{source}: its weights are not those of the {type(net).__name__} in config.json: "
            f"{shorten(sorted(wrong))}\nTake both from the same place, not quantised."
        )


def kind_of(name: str) -> str:
    """The same for all blocks."""
    return re.sub(r"\.\d+\.", ".*.", name)


def is_scale(name: str) -> bool:
    """Whether a tensor is one that ComfyUI's quantised weights have beside them."""
    return name.rpartition(".")[2] in SCALES


SCALES = {"scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale", "scaled_fp8", "comfy_quant"}


def initialise(cls: Any, config: dict[str, Any], dtype: torch.dtype, seed: int) -> nn.Module:
    """A new one, at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return in_dtype(cls(**config), dtype)


def in_dtype(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with weights of this dtype, as diffusers would load it: tables that are not saved keep their own."""
    if dtype.itemsize >= 4:
        return nn.Module.to(net, dtype)  # diffusers' own warns
    saved = net.state_dict().keys()
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if name in saved and value.is_floating_point():
            value.data = value.data.to(torch.float32 if kept_in_float32(net, name) else dtype)
    return net


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def diffusers() -> ModuleType:
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the networks of diffusers need it: pip install diffusers") from error
