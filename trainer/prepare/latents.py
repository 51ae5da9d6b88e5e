"""Pixels to latents and back, by a checkpoint's VAE: x0 = (latents - shift) * scale has about unit variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.data.shards import PerChannel, per_channel
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.loading import check_complete, diffusers


def load_vae(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The VAE of a pipeline's folder, frozen.

    Raises:
        ValueError: there is none.
    """
    file = checkpoint / "vae" / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} holds no VAE: {file} does not exist. "
            "Give the folder of a whole pipeline, as its save_pretrained writes it."
        )
    name = read_json(file).get("_class_name", "a VAE without _class_name")
    cls = getattr(diffusers(), name, None)
    if cls is None:
        raise ValueError(f"{file}: diffusers has no {name}. Install the version that the checkpoint was saved with.")
    vae, found = cls.from_pretrained(checkpoint / "vae", torch_dtype=dtype, output_loading_info=True)
    check_complete(checkpoint / "vae", vae, **found)
    return vae.requires_grad_(False).eval()


def normalisation(vae: Any) -> tuple[PerChannel, PerChannel]:
    """shift and scale by the VAE's configuration: numbers, or lists of one per channel, or of one per frame in each."""
    config = vae.config
    factor = getattr(config, "scaling_factor", None) or 1.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    buffers = dict(vae.named_buffers(recurse=False))
    if "latents_mean" in buffers:  # LTX keeps them with its weights
        mean, std = buffers["latents_mean"].tolist(), buffers["latents_std"].tolist()
    if mean is not None and std is not None:
        frames = len(mean) // (getattr(config, "latent_channels", None) or len(mean))
        scale = [factor / deviation for deviation in std]
        return (list(mean), scale) if frames < 2 else (in_frames(mean, frames), in_frames(scale, frames))  # Cosmos 1
    return float(getattr(config, "shift_factor", None) or 0.0), float(factor)


def in_frames(values: Sequence[float], frames: int) -> list[list[float]]:
    """[C T] -> [C][T]."""
    return [list(values[i : i + frames]) for i in range(0, len(values), frames)]


def place_norms(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation [C, h, w] for latents [..., C, h, w], by the batch norm of Flux 2's VAE over patches of 2 x 2.

    They repeat from patch to patch.
    """
    if not hasattr(vae, "bn"):
        return None
    tiles = 1, latents.shape[-2] // 2, latents.shape[-1] // 2
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    mean, deviation = (x.reshape(-1, 2, 2).repeat(tiles) for x in (vae.bn.running_mean, deviation))
    return mean, deviation


def takes_frames(vae: Any) -> bool:
    """Whether the VAE's convolutions see frames: all but the image VAEs."""
    return any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [3, T, H, W] in [-1, 1] -> the most likely latents as the VAE gives them, [C, T', h, w], float32, CPU.

    Those of a VAE with a batch norm are normalised by it.
    """
    pixels = pixels[None].to(vae.device, vae.dtype)
    output = vae.encode(pixels if takes_frames(vae) else pixels.squeeze(2))
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
    if norms := place_norms(vae, latents):
        latents = (latents - norms[0]) / norms[1]
    if not takes_frames(vae):
        latents = latents.unsqueeze(2)
    return latents[0].float().cpu()


@torch.no_grad()
def decode(vae: Any, x0: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w] or [B, C, T', h, w] -> pixels [B, 3, H, W] or [B, 3, T, H, W] in [0, 1].

    Float32, sample by sample, as one video's decoding fills a GPU.
    """
    shift, scale = (per_channel("the VAE's", value, x0.shape[1:]).to(x0.device) for value in normalisation(vae))
    latents = x0.float() / scale + shift
    if norms := place_norms(vae, latents):
        latents = latents * norms[1] + norms[0]
    as_video = takes_frames(vae) and x0.dim() == 4
    more = {}
    if getattr(vae.config, "timestep_conditioning", False):
        more["temb"] = torch.zeros(1, device=vae.device, dtype=vae.dtype)  # the pipelines' own default
    pixels = []
    for one in latents.to(vae.device, vae.dtype).split(1):
        image = vae.decode(one.unsqueeze(2) if as_video else one, **more, return_dict=False)[0]
        pixels.append(image.squeeze(2) if as_video else image)
    return (torch.cat(pixels).float() / 2 + 0.5).clamp(0, 1)


def decoder(checkpoint: str | Path, dtype: str = "float32") -> Callable[[Tensor], Tensor]:
    """For `sampling.decode`: latents [B, C, ...] -> pictures or videos in [0, 1], by the VAE of a pipeline's folder.

    The VAE follows the latents to their device.
    """
    vae = load_vae(Path(checkpoint), getattr(torch, dtype))

    def pictures(x0: Tensor) -> Tensor:
        return decode(vae.to(x0.device), x0)

    return pictures
