"""A diffusers checkpoint as what encodes: its VAE, its processor and its text encoders, without its transformer."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from jvpgraph.trainer.model.adapters import check_one_network, diffusers, load_pipeline
from jvpgraph.trainer.prepare.families import Family, encode_text, family_of, text_length
from jvpgraph.trainer.prepare.latents import encode, load_vae, normalisation

SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
DEFAULT_SIDE = 1024  # pixels, where a pipeline does not say


@dataclass(frozen=True)
class Checkpoint:
    """What a pipeline's folder says about itself, before any weights are read."""

    path: Path
    pipeline: str
    family: Family
    network: dict[str, Any]  # the transformer's config.json

    @property
    def told_guidance(self) -> bool:
        usual = inspect.signature(getattr(diffusers(), self.family.network).__init__).parameters.get("guidance_embeds")
        return bool(self.network.get("guidance_embeds", usual is not None and usual.default))

    @property
    def told_sizes(self) -> bool:
        """Whether the network takes the picture's size: of the PixArt-alphas, the largest alone."""
        use = self.network.get("use_additional_conditions")
        return bool(self.family.sizes) and bool(self.network.get("sample_size") == 128 if use is None else use)

    def sizes(self, height: int, width: int) -> dict[str, list[float]]:
        """The conditions that say a picture's size, by name."""
        if not self.told_sizes:
            return {}
        return {"resolution": [float(height), float(width)], "aspect_ratio": [height / width]}

    def hashes(self) -> dict[str, str]:
        """sha256 of every configuration, and sizes of the weights, by file; the transformer's weights aside."""
        found = {}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if not file.is_file() or any(part.startswith(".") for part in file.relative_to(self.path).parts):
                continue
            if file.suffix in (".json", ".txt", ".jinja"):
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            elif not name.startswith("transformer"):
                found[name] = f"{file.stat().st_size} bytes"
        return found


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError for a folder that holds no pipeline to prepare for."""
    whole = "Give the folder of a whole pipeline, as its save_pretrained writes it"
    if not path.is_dir():
        hub = f", or download it first: hf download {path} --local-dir FOLDER" if path.parts[1:2] else ""
        raise ValueError(f"{path} is not a folder. {whole}{hub}.")
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{path} holds no pipeline of diffusers: {index} does not exist. {whole}.")
    try:
        parts = json.loads(index.read_text())
        pipeline = parts.get("_class_name", "a pipeline without _class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error}. Download the checkpoint again.") from error
    family = family_of(str(pipeline))
    check_one_network(path, parts)
    for part in ("vae", "transformer"):
        if not (path / part / "config.json").is_file():
            raise ValueError(f"{path} is not complete: {part}/config.json does not exist. {whole}.")
    network = json.loads((path / "transformer" / "config.json").read_text())
    if network.get("_class_name") != family.network:
        raise ValueError(
            f"{path}: the transformer is a {network.get('_class_name')}, and a {pipeline} has a {family.network}. "
            f"{whole}."
        )
    return Checkpoint(path, str(pipeline), family, network)


class Encoder:
    """The components that encode, on one device.

    Args:
        checkpoint: whose they are.
        device: where they run.
        dtype: of the text encoders; the VAE runs in float32.
        length: tokens of text; None: the pipeline's default.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, length: int | None = None
    ) -> None:
        self.checkpoint, self.family, self.device = checkpoint, checkpoint.family, device
        library = diffusers()
        cls = getattr(library, checkpoint.pipeline)
        parts = inspect.signature(cls.__init__).parameters
        left_out = {name: None for name in ("transformer", "transformer_2") if name in parts}
        vae = load_vae(checkpoint.path)
        try:
            self.pipe = load_pipeline(cls, checkpoint.path, dtype, vae=vae, **left_out)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{checkpoint.path}: its components cannot be loaded: {reason}. Download the checkpoint again, whole."
            ) from error
        self.vae = vae.to(device)
        self.pipe.to(device)
        self.length = text_length(self.pipe) if length is None else length
        factors = self._factor(SPATIAL, 8), self._factor(TEMPORAL, 1)
        if self.family.compression not in (None, factors):
            raise ValueError(
                f"{checkpoint.path}: its VAE joins {factors[0]} x {factors[0]} pixels and {factors[1]} frames, and the "
                f"positions that training gives a {self.family.network} are for {self.family.compression}.\n"
                "Train with a call of your own: docs/trainer.md, A model of your own."
            )

    @cached_property
    def multiple(self) -> int:
        """What height and width in pixels are multiples of: the VAE's factor times the network's patch."""
        return self._factor(SPATIAL, 8) * self.patch

    @cached_property
    def patch(self) -> int:
        """Latent pixels per side of a token."""
        if self.family.patch is not None:
            return self.family.patch
        size = self.checkpoint.network.get("patch_size", 1)
        return int(size if isinstance(size, int) else size[-1])

    @cached_property
    def period(self) -> int:
        """Frames per frame of latents; a clip has 1 + a multiple of it."""
        return self._factor(TEMPORAL, 1) if self.family.video else 1

    def _factor(self, names: Sequence[str], default: int) -> int:
        return next((int(getattr(self.pipe, name)) for name in names if hasattr(self.pipe, name)), default)

    def default(self, name: str) -> int | None:
        """What the pipeline's `__call__` takes for `height`, `width` or `num_frames`; None: it does not say."""
        value = self._default_of(name)
        return value if isinstance(value, int) else None

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width."""
        side = getattr(self.pipe, "default_sample_size", None)
        size = self.checkpoint.network.get("sample_size")
        side = side if isinstance(side, int) else size if isinstance(size, int) else None
        pixels = DEFAULT_SIDE if side is None else side * self._factor(SPATIAL, 8)
        return self.default("height") or pixels, self.default("width") or pixels

    @property
    def default_frames(self) -> int:
        return (self.default("num_frames") or self.default("frames") or 1) if self.family.video else 1

    @property
    def default_guidance(self) -> float:
        """What a network that is told its guidance scale is told by the pipeline."""
        return self._default_number("guidance_scale")

    @property
    def negative_scale(self) -> float:
        """The pipeline's own scale of classifier-free guidance; 1 where the network knows it, or is told it."""
        if self.checkpoint.told_guidance or self.pipe.config.get("is_distilled", False):
            return 1.0
        has = inspect.signature(self.pipe.__call__).parameters
        return self._default_number("true_cfg_scale" if "true_cfg_scale" in has else "guidance_scale")

    def _default_number(self, name: str) -> float:
        value = self._default_of(name)
        return float(value) if isinstance(value, (int, float)) else 1.0

    def _default_of(self, name: str) -> Any:
        parameter = inspect.signature(self.pipe.__call__).parameters.get(name)
        return None if parameter is None else parameter.default

    def constants(self, guidance: float | None, fps: float) -> dict[str, float]:
        """Conditions that are the same for every sample, as the network takes them."""
        found = {}
        if self.checkpoint.told_guidance:
            scale = self.default_guidance if guidance is None else guidance
            found["guidance"] = scale * self.family.guidance_scale
        if self.family.rate is not None:
            found[self.family.rate] = fps
        return found

    @property
    def normalisation(self) -> tuple[float | list[float], float | list[float]]:
        return normalisation(self.vae)

    def prompt(self, text: str) -> dict[str, Tensor]:
        """A prompt's conditions, each [...]."""
        return encode_text(self.family, self.pipe, text, None, self.length)

    def negative(self, text: str) -> dict[str, Tensor]:
        """Those of a negative prompt."""
        return encode_text(self.family, self.pipe, "", text, self.length)

    def latents(self, frames: Sequence[Image.Image]) -> Tensor:
        """Frames of one size -> latents as the VAE gives them, [C, h, w], or [C, T', h, w] of a family of videos."""
        width, height = frames[0].size
        if self.family.video:
            pixels = self.pipe.video_processor.preprocess_video(list(frames), height=height, width=width)
        else:
            pixels = self.pipe.image_processor.preprocess(frames[0], height=height, width=width).unsqueeze(2)
        latents = encode(self.vae, pixels[0])
        return latents if self.family.video else latents.squeeze(1)

    def latent_shape(self, frames: int, height: int, width: int) -> list[int]:
        """The shape of `latents`, by trying a grey picture or clip of a few frames."""
        few = min(frames, 1 + self.period)
        shape = list(self.latents([Image.new("RGB", (width, height), "grey")] * few).shape)
        if self.family.video:
            shape[1] = 1 + (frames - 1) // self.period
        return shape


def pipeline_of(options: Mapping[str, Any]) -> Path | None:
    """The folder of the pipeline that a run's teacher was loaded from, if that was one."""
    if not isinstance(options.get("path"), str | Path):
        return None
    path = Path(options["path"])
    return next((folder for folder in (path, path.parent) if (folder / "model_index.json").is_file()), None)
