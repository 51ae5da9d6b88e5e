"""A small diffusion transformer: DiT (Peebles & Xie 2023), adaLN-zero, RMS-normalised queries and keys.

Shape letters: B images, N tokens, C channels of a token, H heads, D channels of a head.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from jvpgraph.context_parallel import ContextParallel
from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.additions import EMBEDDED, TimeInput, added
from jvpgraph.trainer.model.embedded_scale import embed_scale
from jvpgraph.trainer.settings import from_dict
from jvpgraph.trainer.trigflow import Call, TrigFlow


@dataclass(frozen=True)
class DiTConfig:
    """Size of the network; the defaults suit images of 8x8 pixels."""

    image_size: int = 8  # pixels per side
    patch_size: int = 2  # pixels per side: 16 tokens
    width: int = 96  # channels of a token
    depth: int = 4  # blocks
    heads: int = 4
    mlp_ratio: int = 4  # DiT
    classes: int = 10  # label `classes` (10) stands for "no label"
    max_frequency: float = 64.0  # rad per unit of s; low, so that dF/dt stays tame (sCM, section 4.1)
    second_time: bool = False  # without the other end of the interval that is t, and F a velocity
    guidance_scale: bool = False  # it was given its guidance scale, see embed_scale


def modulate(x_BNC: Tensor, shift_BC: Tensor, scale_BC: Tensor) -> Tensor:
    return x_BNC * (1 + scale_BC[:, None]) + shift_BC[:, None]


class TimeEmbedding(nn.Module):
    """Time [B] -> [B, C]: waves at log-spaced frequencies, then two layers. Angles are float32 or wider."""

    frequencies: Tensor

    def __init__(self, width: int, max_frequency: float) -> None:
        super().__init__()
        frequencies = torch.logspace(0, math.log10(max_frequency), width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * (width // 2), width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        assert t_B.dtype in (torch.float32, torch.float64), t_B.dtype
        angles = t_B[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.context: ContextParallel | None = None

    def forward(self, x_BNC: Tensor) -> Tensor:
        q_BHND, k_BHND, v_BHND = self.qkv(x_BNC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attend = F.scaled_dot_product_attention if self.context is None else self.context.attention
        o_BHND = attend(self.q_norm(q_BHND), self.k_norm(k_BHND), v_BHND)
        return self.out(o_BHND.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates start at zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.norm_1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, config.heads)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BNC: Tensor, c_BC: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(c_BC)).chunk(6, dim=-1)
        x_BNC = x_BNC + gate_1[:, None] * self.attention(modulate(self.norm_1(x_BNC), shift_1, scale_1))
        return x_BNC + gate_2[:, None] * self.mlp(modulate(self.norm_2(x_BNC), shift_2, scale_2))


class DiT(nn.Module):
    """Predicts one value per pixel from a noisy image, its time and its class."""

    time_input = TimeInput("time")

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        tokens, pixels = (config.image_size // config.patch_size) ** 2, config.patch_size**2
        self.patch_in = nn.Linear(pixels, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, config.width))
        self.time = TimeEmbedding(config.width, config.max_frequency)
        self.interval = TimeEmbedding(config.width, config.max_frequency)  # silent until MeanFlow trains it
        self.label = nn.Embedding(config.classes + 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.patch_out = nn.Linear(config.width, pixels)
        self.context: ContextParallel | None = None
        for layer in (self.modulation, self.patch_out, self.interval.mlp[-1]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, r: Tensor | None = None) -> Tensor:
        """x [B, 1, S, S], t [B] (the model's own time), labels [B] in 0..classes -> [B, 1, S, S].

        `r` [B]: the other end of the interval, for an average velocity (MeanFlow).
        """
        c_BC = self.time(t) + self.label(labels)
        if r is not None:
            c_BC = c_BC + self.interval(t - r)
        h_BNC = self.patch_in(self.patchify(x)) + self.positions
        if self.context is not None:
            h_BNC = self.context.shard(h_BNC, dim=1)
        for block in self.blocks:
            h_BNC = block(h_BNC, c_BC)
        shift, scale = self.modulation(F.silu(c_BC)).chunk(2, dim=-1)
        pixels_BNC = self.patch_out(modulate(self.norm(h_BNC), shift, scale))
        return self.unpatchify(pixels_BNC if self.context is None else self.context.gather(pixels_BNC, dim=1))

    def with_second_time(self) -> Call:
        """Its call from now on; what `add_second_time` asks for."""
        self.config = replace(self.config, second_time=True)
        return call_with_second_time

    def split_tokens(self, context: ContextParallel) -> None:
        """From now on each process of `context` works on its part of the tokens."""
        self.context = context
        for module in self.modules():
            if isinstance(module, Attention):
                module.context = context

    @property
    def tp_plan(self) -> dict[str, ParallelStyle]:
        """Of tensor parallel. A contiguous part of the rows of `qkv` is no set of heads, so its columns are split."""
        return {
            "blocks.*.attention.qkv": RowwiseParallel(input_layouts=Replicate()),
            "blocks.*.attention.out": RowwiseParallel(input_layouts=Replicate()),
            "blocks.*.mlp.0": ColwiseParallel(),
            "blocks.*.mlp.2": RowwiseParallel(),
            "blocks.*.modulation": ColwiseParallel(output_layouts=Replicate()),
        }

    def patchify(self, x: Tensor) -> Tensor:
        """[B, 1, S, S] -> [B, N, P * P]."""
        p, n = self.config.patch_size, self.config.image_size // self.config.patch_size
        return x.reshape(-1, n, p, n, p).transpose(2, 3).reshape(-1, n * n, p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, P * P] -> [B, 1, S, S]."""
        p, n = self.config.patch_size, self.config.image_size // self.config.patch_size
        return x.reshape(-1, n, n, p, p).transpose(2, 3).reshape(-1, 1, n * p, n * p)

    def save_pretrained(self, folder: Path | str) -> None:
        """config.json and model.safetensors, as `dit` reads them."""
        folder, config = Path(folder), replace(self.config, guidance_scale=EMBEDDED in added(self))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / "model.safetensors")


def call_dit(net: nn.Module, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor | None = None) -> Tensor:
    return net(x, time, cond["labels"], time_r)


def call_with_second_time(
    net: nn.Module, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor | None = None
) -> Tensor:
    return net(x, time, cond["labels"], time if time_r is None else time_r)


def dit(path: Path | str | None = None, seed: int = 0, dtype: str = "float32", **config: int | float) -> TrigFlow:
    """A DiT that predicts the velocity of rectified flow.

    Args:
        path: a folder that `save_pretrained` wrote; without one the network starts at random.
        seed: of the random start.
        dtype: of the parameters.
        config: fields of DiTConfig, for a random start.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return called(DiT(from_dict(DiTConfig, config, "model.options")), dtype)
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: `path` must be a folder written by save_pretrained")
    model = called(DiT(DiTConfig(**read_json(file))), dtype)
    model.net.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return model


def called(net: DiT, dtype: str) -> TrigFlow:
    call = call_with_second_time if net.config.second_time else call_dit
    model = TrigFlow(net.to(getattr(torch, dtype)), call)
    return embed_scale(model) if net.config.guidance_scale else model
