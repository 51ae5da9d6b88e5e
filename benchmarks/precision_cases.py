"""Networks in bfloat16 whose tangents are compared in benchmarks/precision.py, with random weights of realistic scale
or with what trained networks have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.trainer.demo import configure
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.adapters import keep_time_exact
from jvpgraph.trainer.model.dit import DiT, DiTConfig, dit
from jvpgraph.trainer.train import train

__all__ = ["INGREDIENTS", "Case", "digits_teacher", "flux", "own", "wan"]

SIDE, BATCH, WIDTH = 32, 2, 256  # pixels, of which a token has 2 x 2: more rows than a thin product has; images
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network, a call of it, and by "x" and "t" what a tangent is along: the argument and the direction."""

    net: nn.Module
    inputs: Inputs
    dots: dict[str, tuple[str, Tensor]]


def _random(net: nn.Module) -> nn.Module:
    """Weights of a deviation of 0.7 / sqrt(fan-in): values keep their size through depth."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    return net.to(torch.bfloat16).requires_grad_(False)


# ---- What trained networks have (Sun et al. 2024, arXiv 2402.17762, on massive activations)


def _channels(net: DiT) -> None:
    """Three channels of the residual stream are a hundred times larger than the others."""
    for block in net.blocks:
        block.mlp[-1].weight[:3] *= 100


def _gains(net: DiT) -> None:
    """Shifts, scales and gates of modulation, up to ten."""
    for block in net.blocks:
        block.modulation.weight *= 10


def _sharp(net: DiT) -> None:
    """Logits of attention with a deviation of 16: a head looks at a few keys."""
    for block in net.blocks:
        block.attention.q_norm.weight *= 4
        block.attention.k_norm.weight *= 4


def _sinks(net: DiT) -> None:
    """One token has four channels of 300, and all heads look at it."""
    net.positions[0, :4] = 300


INGREDIENTS: dict[str, Callable[[DiT], None]] = {
    "channels": _channels,
    "gains": _gains,
    "sharp": _sharp,
    "sinks": _sinks,
}


def own(depth: int, *ingredients: str, width: int = WIDTH, side: int = SIDE) -> Case:
    """The trainer's DiT."""
    net = _random(DiT(DiTConfig(image_size=side, width=width, depth=depth, heads=width // 64)))
    with torch.no_grad():
        for name in ingredients:
            INGREDIENTS[name](net)  # type: ignore[arg-type]
    return _pictures(net, side)


def _pictures(net: nn.Module, side: int) -> Case:
    x = torch.randn(BATCH, 1, side, side, dtype=torch.bfloat16)
    inputs = {"x": x, "t": torch.rand(BATCH), "labels": torch.arange(BATCH)}
    return Case(net, inputs, {"x": ("x", torch.randn_like(x)), "t": ("t", torch.ones(BATCH))})


def wan() -> Case:
    """Wan's network with 4 of its layers, 4 heads of 64, and clips of 3 x 16 x 16 latents."""
    from diffusers import WanTransformer3DModel

    net = _random(
        WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=64, num_layers=4, ffn_dim=1024, text_dim=64, freq_dim=256
        )
    )
    x = torch.randn(BATCH, 16, 3, 16, 16, dtype=torch.bfloat16)
    text = torch.randn(BATCH, 12, 64, dtype=torch.bfloat16)
    inputs = {"hidden_states": x, "timestep": 1000 * torch.rand(BATCH), "encoder_hidden_states": text}
    return _moving(net, inputs, 1000 * torch.ones(BATCH))


class _ExactTime(nn.Module):
    """Flux's network, whose time is not rounded on its way in; as the trainer calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        keep_time_exact(net.time_text_embed.time_proj)  # type: ignore[union-attr, arg-type]

    def forward(self, timestep: Tensor, **others: Any) -> Any:
        self.net.time_text_embed.time_proj.exact_time = 1000 * timestep  # type: ignore[union-attr]
        return self.net(timestep=timestep, **others)


def flux(exact_time: bool) -> Case:
    """Flux's network with 2 double and 4 single layers, 4 heads of 64, 256 tokens of a picture and 12 of text."""
    from diffusers import FluxTransformer2DModel

    net = _random(
        FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(16, 24, 24),
            guidance_embeds=False,
        )
    )
    rows = torch.arange(256)
    inputs = {
        "hidden_states": torch.randn(BATCH, 256, 64, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(BATCH, 12, 64, dtype=torch.bfloat16),
        "pooled_projections": torch.randn(BATCH, 32, dtype=torch.bfloat16),
        "timestep": torch.rand(BATCH),
        "img_ids": torch.stack([0 * rows, rows // 16, rows % 16], 1).float(),
        "txt_ids": torch.zeros(12, 3),
    }
    return _moving(_ExactTime(net) if exact_time else net, inputs, torch.ones(BATCH))


def _moving(net: nn.Module, inputs: Inputs, t_dot: Tensor) -> Case:
    x_dot = torch.randn_like(inputs["hidden_states"])
    return Case(net, inputs | {"return_dict": False}, {"x": ("hidden_states", x_dot), "t": ("timestep", t_dot)})


def digits_teacher(folder: Path) -> Case:
    """The demo's teacher, trained in two minutes if it is not in the folder."""
    found = folder / "net"
    if not found.exists():
        export_run(train(configure("digits_teacher", folder, 0, quick=False)), found)
    net = dit(path=found, dtype="bfloat16").net
    return _pictures(net.requires_grad_(False), 8)
