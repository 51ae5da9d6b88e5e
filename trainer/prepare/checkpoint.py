"""A diffusers checkpoint as what encodes: its VAE, its processor and its text encoders, without its transformer."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from jvpgraph.trainer.data.shards import PerChannel
from jvpgraph.trainer.model.adapters import FRAMED
from jvpgraph.trainer.model.loading import diffusers
from jvpgraph.trainer.model.pipelines import boundary_of, class_name, load_pipeline
from jvpgraph.trainer.prepare.families import Family, encode_text, family_of, text_length
from jvpgraph.trainer.prepare.latents import encode, load_vae, normalisation
from jvpgraph.trainer.prepare.media import BadFile
from jvpgraph.trainer.prepare.positions import Positions, positions_of

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
    boundary: float | None = None  # rectified-flow time below which transformer_2 takes over, where there are two

    @property
    def told_guidance(self) -> bool:
        usual = inspect.signature(getattr(diffusers(), self.family.network).__init__).parameters.get("guidance_embeds")
        return bool(self.network.get("guidance_embeds", usual is not None and usual.default))

    @property
    def told_sizes(self) -> tuple[str, ...]:
        """The arguments that take the picture's size: of the PixArt-alphas, the largest alone has them."""
        use = self.network.get("use_additional_conditions")
        use = self.network.get("sample_size") == 128 if use is None else use
        return () if self.family.network == "PixArtTransformer2DModel" and not use else self.family.sizes

    def sizes(self, height: int, width: int) -> dict[str, list[float]]:
        """The conditions that say a picture's size, by name; nothing is cut away before its corner."""
        size = [float(height), float(width)]
        known = {"aspect_ratio": [height / width], "crop_coords": [0.0, 0.0]}
        return {name: known.get(name, size) for name in self.told_sizes}

    @property
    def first_frame(self) -> tuple[str, ...]:
        """The conditions that come from a clip's first frame: Wan 2.2's networks see no embedding of it."""
        unseen = () if self.network.get("image_dim") is not None else ("encoder_hidden_states_image",)
        return tuple(name for name in self.family.first_frame if name not in unseen)

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
    for part in ("vae", "transformer"):
        if not (path / part / "config.json").is_file():
            raise ValueError(f"{path} is not complete: {part}/config.json does not exist. {whole}.")
    network = json.loads((path / "transformer" / "config.json").read_text())
    if class_name(network) != family.network:
        raise ValueError(
            f"{path}: the transformer is a {class_name(network)}, and a {pipeline} has a {family.network}. {whole}."
        )
    if family.first_frame and parts.get("expand_timesteps"):
        raise ValueError(
            f"{path} is image to video with a clean first frame among the noisy ones, each with a time of its own, and "
            "a student has one time.\nPrepare it as the WanPipeline that it also is (_class_name in model_index.json)."
        )
    return Checkpoint(path, str(pipeline), family, network, boundary_of(parts))


class Encoder:
    """The components that encode, on one device.

    Args:
        checkpoint: whose they are.
        device: where they run.
        dtype: of the text encoders; the VAE, and what embeds a first frame, run in float32.
        length: tokens of text; None: the pipeline's default.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, length: int | None = None
    ) -> None:
        self.checkpoint, self.family, self.device = checkpoint, checkpoint.family, device
        library = diffusers()
        cls = getattr(library, checkpoint.pipeline)
        parts = inspect.signature(cls.__init__).parameters
        left_out = {name: None for name in ("transformer", "transformer_2", "safety_checker") if name in parts}
        vae = load_vae(checkpoint.path)
        try:
            dtypes = {"image_encoder": torch.float32, "default": dtype}
            with without_guardrail(cls):
                self.pipe = load_pipeline(cls, checkpoint.path, dtypes, vae=vae, **left_out)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{checkpoint.path}: its components cannot be loaded: {reason}. Download the checkpoint again, whole."
            ) from error
        self.vae = vae.to(device)
        self.pipe.to(device)
        usual = 0 if self.family.labels else text_length(self.pipe)
        self.length = usual if length is None else length
        if "encoder_hidden_states_image" in checkpoint.first_frame and self.length != FRAMED:
            raise ValueError(
                f"--text-length {self.length}: this network takes {FRAMED}, beside a picture. Leave it out."
            )
        factors = self.spatial, self._factor(TEMPORAL, 1)
        if self.family.compression not in (None, factors):
            raise ValueError(
                f"{checkpoint.path}: its VAE joins {factors[0]} x {factors[0]} pixels and {factors[1]} frames, and the "
                f"positions that training gives a {self.family.network} are for {self.family.compression}.\n"
                "Train with a call of your own: docs/trainer.md, A model of your own."
            )

    @cached_property
    def multiple(self) -> int:
        """What height and width in pixels are multiples of: the VAE's factor times the network's patch."""
        return self.spatial * self.patch

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

    @cached_property
    def spatial(self) -> int:
        """Pixels per side of a latent pixel."""
        return self._factor(SPATIAL, 2 ** (len(self.vae.config.get("block_out_channels", [0] * 4)) - 1))

    def _factor(self, names: Sequence[str], default: int) -> int:
        return next((int(getattr(self.pipe, name)) for name in names if hasattr(self.pipe, name)), default)

    def default(self, name: str) -> int | None:
        """What the pipeline's `__call__` takes for `height`, `width` or `num_frames`; None: it does not say."""
        value = self._default_of(name)
        return value if isinstance(value, int) else None

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width."""
        sides = (getattr(self.pipe, "default_sample_size", None), self.checkpoint.network.get("sample_size"))
        pixels = next((side * self.spatial for side in sides if isinstance(side, int)), DEFAULT_SIDE)
        if hasattr(self.pipe, "get_default_resolution"):  # PRX's default_sample_size is in pixels
            pixels = self.pipe.get_default_resolution()
        return self.default("height") or pixels, self.default("width") or pixels

    def tokens(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Along each axis of latents, of a picture or clip in pixels: frames, rows, columns."""
        return 1 + (frames - 1) // self.period, height // self.multiple, width // self.multiple

    @property
    def positions(self) -> Positions:
        return positions_of(self.family.network, self.checkpoint.network)

    @property
    def one_size(self) -> bool:
        """Whether the pipeline makes pictures of its default size only."""
        return "height" not in inspect.signature(self.pipe.__call__).parameters

    @property
    def default_frames(self) -> int:
        return (self.default("num_frames") or self.default("frames") or 1) if self.family.video else 1

    @property
    def default_guidance(self) -> float:
        """What a network that is told its guidance scale is told by the pipeline."""
        return self._default_number("guidance_scale")

    @property
    def negative_scale(self) -> float:
        """w of the pipeline's F_negative + w (F - F_negative); 1 where the network knows its scale, or is told it."""
        if self.checkpoint.told_guidance or self.pipe.config.get("is_distilled", False):
            return 1.0
        has = inspect.signature(self.pipe.__call__).parameters
        scale = self._default_number("true_cfg_scale" if "true_cfg_scale" in has else "guidance_scale")
        return scale + 1 - self.family.unguided

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
    def normalisation(self) -> tuple[PerChannel, PerChannel]:
        return normalisation(self.vae)

    def prompt(self, text: str) -> dict[str, Tensor]:
        """A prompt's conditions, each [...]; a label's, where there are labels. BadFile if there is no such label."""
        if self.family.labels is not None:
            return {self.family.labels: torch.tensor(self._label(text))}
        return encode_text(self.family, self.pipe, text, None, self.length)

    def negative(self, text: str) -> dict[str, Tensor]:
        """Those of a negative prompt; there is one for all labels, the number behind the last."""
        if self.family.labels is not None:
            if text:
                raise ValueError(
                    f"--negative {text!r}: a {self.checkpoint.pipeline} has labels, no prompts. Leave it out."
                )
            return {self.family.labels: torch.tensor(self._classes)}
        return encode_text(self.family, self.pipe, "", text, self.length)

    @property
    def _classes(self) -> int:
        return int(self.checkpoint.network.get("num_embeds_ada_norm") or 1000)

    def _label(self, text: str) -> int:
        """A class by its number or name."""
        text = text.strip()
        label = int(text) if text.isdecimal() else self.pipe.labels.get(text)
        if label is None or label >= self._classes:
            raise BadFile(f"{text!r} is neither a number below {self._classes} nor a label that the pipeline knows")
        return int(label)

    def first_frame(self, frames: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The conditions that come from a clip's first frame, each [...]; none for most families."""
        if not self.checkpoint.first_frame:
            return {}
        width, height = frames[0].size
        pixels = self.pipe.video_processor.preprocess(frames[0], height=height, width=width).to(self.device)
        latents = torch.zeros((), device=self.device)  # of the clip, which it would draw
        with torch.no_grad():
            _, known = self.pipe.prepare_latents(
                pixels,
                1,
                self.vae.config.z_dim,
                height,
                width,
                len(frames),
                torch.float32,
                self.device,
                latents=latents,
            )
            found = {"condition": known}
            if "encoder_hidden_states_image" in self.checkpoint.first_frame:
                found["encoder_hidden_states_image"] = self.pipe.encode_image(frames[0], self.device)
        return {name: value[0].float().cpu().contiguous() for name, value in found.items()}

    def latents(self, frames: Sequence[Image.Image]) -> Tensor:
        """Frames of one size -> latents as the VAE gives them, [C, h, w], or [C, T', h, w] of a family of videos."""
        width, height = frames[0].size
        processors = (getattr(self.pipe, name, None) for name in ("video_processor", "image_processor"))
        processor: Any = next(filter(None, processors), None)
        if self.family.video:
            pixels = processor.preprocess_video(list(frames), height=height, width=width)
        else:
            processor = processor or diffusers().image_processor.VaeImageProcessor(self.spatial)
            pixels = processor.preprocess(frames[0], height=height, width=width).unsqueeze(2)
        latents = encode(self.vae, pixels[0])
        return latents if self.family.video else latents.squeeze(1)

    def latent_shape(self, frames: int, height: int, width: int) -> list[int]:
        """The shape of `latents`, by trying a grey picture or clip of a few frames."""
        few = min(frames, 1 + self.period)
        shape = list(self.latents([Image.new("RGB", (width, height), "grey")] * few).shape)
        if self.family.video:
            shape[1] = 1 + (frames - 1) // self.period
        return shape


@contextmanager
def without_guardrail(cls: Any) -> Iterator[None]:
    """Cosmos' pipelines cannot be made without the package that looks at prompts and pictures, none of which are asked
    for or shown here."""
    known = vars(sys.modules[cls.__module__])
    before = known.get("CosmosSafetyChecker")
    if before is None:
        yield
        return
    known["CosmosSafetyChecker"] = lambda: None
    try:
        yield
    finally:
        known["CosmosSafetyChecker"] = before


def pipeline_of(options: Mapping[str, Any]) -> Path | None:
    """The folder of the pipeline that a run's teacher was loaded from, if that was one."""
    if not isinstance(options.get("path"), str | Path):
        return None
    path = Path(options["path"])
    return next((folder for folder in (path, path.parent) if (folder / "model_index.json").is_file()), None)
