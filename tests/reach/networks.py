"""Networks with the constructs that repositories of diffusion models are full of. Nothing in them is theirs."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex  # by its module, where the oracle puts a dense one in its place
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.reach.base import images, network
from tests.zoo.base import Draw, pick

WIDTH = 16
log = logging.getLogger("tests.reach")


# ---------------------------------------------------------------------------------------------- parts that they share


class Times(nn.Module):
    """Sines and cosines of the time, through an MLP."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.width, self.mlp = width, nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(100.0) * torch.arange(self.width // 2, dtype=t.dtype) / (self.width // 2))
        angles = t[:, None] * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class Attention(nn.Module):
    """Of tokens [B, L, width], by the function that ``attend`` is: q, k, v [B, H, L, D] to the same."""

    def __init__(self, attend: Any = F.scaled_dot_product_attention, heads: int = 2):
        super().__init__()
        self.attend, self.heads = attend, heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return self.out(rearrange(self.attend(q, k, v), "b h l d -> b l (h d)"))


class Tokens(nn.Module):
    """Patches of an image, something on them, and back to an image."""

    def __init__(self, body: nn.Module | None = None):
        super().__init__()
        self.times, self.patches = Times(), nn.Conv2d(4, WIDTH, 2, 2)
        self.body, self.last = body, nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.patches(x)
        height = h.shape[-2]
        h = self.on_tokens(rearrange(h, "b c h w -> b (h w) c"), self.times(t), height)
        return rearrange(self.last(h), "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=2, q=2)

    def on_tokens(self, h: Tensor, emb: Tensor, height: int) -> Tensor:
        return h + self.body(h * (1 + emb[:, None]))


# ------------------------------------------------------------------------------------------------------------ images


@network("DiT, SiT (facebookresearch, willisma)", "adaLN-zero in six chunks, labels dropped by a mask")
class AdaLN(Tokens):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(approximate="tanh"), nn.Linear(32, WIDTH))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.labels = nn.Embedding(5, WIDTH)

    def on_tokens(self, h, emb, height):
        labels = torch.where(torch.arange(len(h)) < 1, 4, torch.arange(len(h)) % 4)
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(emb + self.labels(labels)).chunk(6, dim=1)
        h = h + gate.unsqueeze(1) * self.attention(self.norm(h) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        h = h + gate2.unsqueeze(1) * self.mlp(self.norm(h) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1))
        return torch.cat([h, h.sin()], dim=-1).chunk(2, dim=-1)[0]


@network("U-ViT (baofff)", "a stack of skip connections, the time as a token among others")
class LongSkips(Tokens):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(4))
        self.joins = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def on_tokens(self, h, emb, height):
        h, skips = torch.cat([emb.unsqueeze(1), h], dim=1), []
        for block in self.blocks[:2]:
            h = h + block(h)
            skips.append(h)
        for block, join in zip(self.blocks[2:], self.joins):
            h = join(torch.cat([h, skips.pop()], dim=-1))
            h = h + block(h)
        return h[:, 1:]


class Float32Norm(nn.GroupNorm):
    def forward(self, x):
        x_dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).type(x_dtype)


class Recompute(torch.autograd.Function):
    """Runs once more in its backward, and asks torch.autograd.grad."""

    @staticmethod
    def forward(ctx, run, count, *given):
        ctx.run, ctx.inputs, ctx.params = run, list(given[:count]), list(given[count:])
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*[x.view_as(x) for x in inputs])
        return None, None, *torch.autograd.grad(out, inputs + ctx.params, grads, allow_unused=True)


@network(
    "guided-diffusion, improved-diffusion (openai)",
    "a checkpoint of their own, norms in float32, sqrt(sqrt(d)) on q and k",
)
class OwnCheckpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.first, self.last = (
            Times(),
            nn.Conv2d(4, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, 4, 3, padding=1),
        )
        self.norm, self.qkv = Float32Norm(4, WIDTH), nn.Conv1d(WIDTH, 3 * WIDTH, 1)

    def attend(self, h):
        batch, channels, *spatial = h.shape
        q, k, v = (
            self.qkv(self.norm(h.reshape(batch, channels, -1)))
            .reshape(2 * batch, 3 * channels // 2, -1)
            .split(channels // 2, dim=1)
        )
        scale = 1 / math.sqrt(math.sqrt(channels // 2))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return h + torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, *spatial)

    def forward(self, x, t):
        h = self.first(x) + self.times(t)[..., None, None]
        params = [*self.norm.parameters(), *self.qkv.parameters()]
        return self.last(Recompute.apply(self.attend, 1, h, *params))


@network(
    "latent-diffusion, Stable Diffusion 1 (CompVis)",
    "cross attention by einsum, GEGLU, torch's checkpoint, a context that is a list",
)
class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.first, self.last = Times(), nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 1)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gate, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.GroupNorm(4, WIDTH)

    def block(self, h, context):
        q, k, v = (rearrange(x, "b n (h d) -> (b h) n d", h=2) for x in (self.q(h), self.k(context), self.v(context)))
        weight = (torch.einsum("b i d, b j d -> b i j", q, k) * 8**-0.5).softmax(dim=-1)
        h = h + rearrange(torch.einsum("b i j, b j d -> b i d", weight, v), "(b h) n d -> b n (h d)", h=2)
        value, gate = self.gate(h).chunk(2, dim=-1)
        return h + value * F.gelu(gate)

    def forward(self, x, t):
        h = self.first(x) + self.times(t)[..., None, None]
        context = torch.cat([self.times(t)[:, None], self.times(2 * t)[:, None]], 1)
        tokens = rearrange(self.norm(h), "b c h w -> b (h w) c").contiguous()
        tokens = checkpoint(self.block, tokens, context, use_reentrant=False)
        return self.last(h + rearrange(tokens, "b (h w) c -> b c h w", h=h.shape[2]).contiguous())


@functools.lru_cache(None)
def constant(value: float, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.as_tensor(np.float32(value)).expand(shape)


@network("EDM2 (NVlabs)", "weights normalised in forward, constants of numpy, sums that keep magnitudes")
class Magnitudes(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.gain = Times(), nn.Parameter(torch.ones([]))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in ((WIDTH, 5, 3, 3), (4, WIDTH, 3, 3)))

    @staticmethod
    def normal(weight):
        dims = list(range(1, weight.ndim))
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=wide)
        norm = torch.add(1e-4, norm, alpha=np.sqrt(norm.numel() / weight.numel()))
        return weight / norm.to(weight.dtype) / np.sqrt(weight[0].numel())

    def forward(self, x, t):
        h = torch.cat([x, torch.ones_like(x[:, :1]) * constant(0.5).to(x.dtype)], dim=1)
        h = F.conv2d(h, self.normal(self.weights[0]), padding=1)
        h = F.silu(h * (self.times(t)[..., None, None] + 1)) / 0.596
        h = torch.lerp(h, h.sin(), 0.3) / np.sqrt((1 - 0.3) ** 2 + 0.3**2)
        return F.conv2d(h, self.normal(self.weights[1] * self.gain), padding=1)


@network("EDM, SongUNet (NVlabs)", "resampling by grouped convolutions with a filter that is a buffer")
class Resampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.first, self.last = (
            Times(),
            nn.Conv2d(4, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, 4, 3, padding=1),
        )
        f = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0]))
        self.register_buffer("filter", f[None, None] / f.sum())

    def forward(self, x, t):
        h = F.silu(self.first(x) + self.times(t)[..., None, None])
        f = self.filter.to(h.dtype).tile([WIDTH, 1, 1, 1])
        down = F.conv2d(h, f, groups=WIDTH, stride=2, padding=1)
        up = F.conv_transpose2d(down, f * 4, groups=WIDTH, stride=2, padding=1)
        return self.last((h + up) * np.sqrt(0.5))


@dataclass
class Modulation:
    shift: Tensor
    scale: Tensor
    gate: Tensor


@network(
    "Flux (black-forest-labs)",
    "a dataclass of modulations, rotations as 2 x 2 matrices from an einsum of positions, QK norm",
)
class Rotations(Tokens):
    def __init__(self):
        super().__init__()
        self.modulate, self.qkv, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.scale = nn.Parameter(torch.ones(8))

    def rms(self, x):
        x_dtype, x = x.dtype, x.float()
        return (x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6)).to(x_dtype) * self.scale

    @staticmethod
    def turn(q, k, pe):
        parts = [x.float().reshape(*x.shape[:-1], -1, 1, 2) for x in (q, k)]
        q2, k2 = (pe[..., 0] * x[..., 0] + pe[..., 1] * x[..., 1] for x in parts)
        return q2.reshape(*q.shape).type_as(q), k2.reshape(*k.shape).type_as(k)

    def on_tokens(self, h, emb, height):
        positions = torch.arange(h.shape[1], dtype=torch.float32)[None]
        omega = 1.0 / (100 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8))
        out = torch.einsum("...n,d->...nd", positions, omega)
        pe = torch.stack([torch.cos(out), -torch.sin(out), torch.sin(out), torch.cos(out)], dim=-1)
        pe = rearrange(pe, "b n d (i j) -> b 1 n d i j", i=2, j=2)
        m = Modulation(*self.modulate(F.silu(emb))[:, None].chunk(3, dim=-1))
        q, k, v = rearrange(self.qkv((1 + m.scale) * h + m.shift), "B L (K H D) -> K B H L D", K=3, H=2)
        q, k = self.turn(self.rms(q), self.rms(k), pe)
        o = F.scaled_dot_product_attention(q, k, v)
        return h + m.gate * self.out(rearrange(o, "B H L D -> B L (H D)"))


@network(
    "Stable Diffusion 3 (Stability-AI)",
    "two streams that attend jointly and part again, outputs that are sometimes None",
)
class TwoStreams(Tokens):
    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def joint(self, text, image, only_image):
        parts = [layer(h).reshape(*h.shape[:2], 3, 2, -1) for layer, h in zip(self.qkv, (text, image))]
        q, k, v = torch.cat(parts, dim=1).unbind(2)
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.0)
        o = o.transpose(1, 2).flatten(2)
        of_text, of_image = o[:, : text.shape[1]], o[:, text.shape[1] :]
        return None if only_image else text + self.out[0](of_text), image + self.out[1](of_image)

    def on_tokens(self, h, emb, height):
        text = emb[:, None] * torch.linspace(0.5, 1.5, 3, dtype=h.dtype)[:, None]
        text, h = self.joint(text, h, False)
        text, h = self.joint(text, h, True)
        assert text is None
        return h


@network("MDT, MaskDiT (sail-sg, Anima-Lab)", "tokens that are left out by argsort and gather, and put back")
class Masked(Tokens):
    def __init__(self):
        super().__init__(Attention())
        self.missing = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def on_tokens(self, h, emb, height):
        batch, length, width = h.shape
        noise = (torch.arange(length) * 7 % length + torch.arange(batch)[:, None]) % length
        shuffle = torch.argsort(noise, dim=1, stable=True)
        restore = torch.argsort(shuffle, dim=1)
        keep = shuffle[:, : length // 2]
        seen = torch.gather(h, 1, keep.unsqueeze(-1).repeat(1, 1, width))
        seen = seen + self.body(seen + emb[:, None])
        whole = torch.cat([seen, self.missing.expand(batch, length - seen.shape[1], -1)], dim=1)
        return torch.gather(whole, 1, restore.unsqueeze(-1).expand(-1, -1, width))


@network(
    "SwinIR, ResShift, Swin-like DiTs",
    "windows that are shifted by roll, a mask of regions, biases of relative positions by index",
)
class ShiftedWindows(Tokens):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.zeros(9, 2))
        coords = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", relative[..., 0] * 3 + relative[..., 1])

    @staticmethod
    def windows(x):
        return rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=2, q=2)

    def on_tokens(self, h, emb, height):
        grid = rearrange(h + emb[:, None], "b (h w) c -> b h w c", h=height)
        rolled = torch.roll(grid, shifts=(-1, -1), dims=(1, 2))
        regions = torch.zeros(1, height, height, 1)
        for n, rows in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
            regions[:, rows] += n
            regions[:, :, rows] += 3 * n
        of = self.windows(regions).squeeze(-1)
        mask = (of.unsqueeze(1) - of.unsqueeze(2)).ne(0).to(h.dtype) * -100.0
        q, k, v = rearrange(self.qkv(self.windows(rolled)), "n l (k h d) -> k n h l d", k=3, h=2)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        scores = scores.view(h.shape[0], -1, 2, 4, 4) + mask[None, :, None]
        o = scores.view(-1, 2, 4, 4).softmax(dim=-1) @ v
        n = height // 2
        o = rearrange(o, "(b h w) k (p q) d -> b (h p) (w q) (k d)", h=n, w=n, p=2)
        o = torch.roll(o, shifts=(1, 1), dims=(1, 2))
        return h + self.out(rearrange(o, "b h w c -> b (h w) c"))


@network("Sana, LinearDiT (NVlabs)", "linear attention with a padded column of ones, a depthwise GLU convolution")
class LinearAttention(Tokens):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Conv2d(WIDTH, 32, 1), nn.Conv2d(16, WIDTH, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def on_tokens(self, h, emb, height):
        q, k, v = rearrange(self.qkv(h + emb[:, None]), "b l (k h d) -> k b h d l", k=3, h=2)
        q, k, v = F.relu(q), F.relu(k), F.pad(v.float(), (0, 0, 0, 1), mode="constant", value=1.0)
        o = torch.matmul(torch.matmul(v, k.float().transpose(-1, -2)), q.float())
        o = (o[:, :, :-1] / (o[:, :, -1:] + 1e-6)).to(h.dtype)
        h = h + self.out(rearrange(o, "b h d l -> b l (h d)"))
        image = self.depthwise(F.silu(self.up(rearrange(h, "b (h w) c -> b c h w", h=height))))
        value, gate = torch.chunk(image, 2, dim=1)
        return h + rearrange(self.down(value * F.silu(gate)), "b c h w -> b (h w) c")


@network(
    "DiT-MoE, Switch-DiT (feizc)",
    "experts chosen by topk, all of them computed and weighed by one-hot sums, an auxiliary output",
)
class Experts(Tokens):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(4, WIDTH, 32)), nn.Parameter(torch.randn(4, 32, WIDTH))

    def on_tokens(self, h, emb, height):
        scores = self.router(h + emb[:, None]).softmax(dim=-1, dtype=torch.float32)
        weight, index = torch.topk(scores, k=2, dim=-1, sorted=False)
        weight = (weight / (weight.sum(-1, keepdim=True) + 1e-20)).to(h.dtype)
        hidden = F.silu(torch.einsum("blc,ecd->bled", h, self.w1) / 4)
        outs = torch.einsum("bled,edc->blec", hidden, self.w2) / 6
        chosen = F.one_hot(index, 4).to(h.dtype)
        return h + torch.einsum("blec,blke,blk->blc", outs, chosen, weight)


# ------------------------------------------------------------------------------------------------------------- videos


def videos(draw: Draw, variant: int) -> dict[str, Any]:
    batch, frames, side = pick(variant, (2, 2, 4), (3, 3, 6))
    return {"x": draw.normal(batch, 4, frames, side, side), "t": draw.time(batch, high=1.0)}


class Video(nn.Module):
    """Patches of a video, and back."""

    def __init__(self, body: nn.Module | None = None):
        super().__init__()
        self.times, self.patches = Times(), nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.body, self.last = body, nn.Linear(WIDTH, 16)

    def forward(self, x, t):
        h = self.patches(x)
        grid = tuple(h.shape[2:])
        h = self.on_tokens(h.flatten(2).transpose(1, 2), self.times(t), grid)
        f, n, m = grid
        return rearrange(self.last(h), "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=n, w=m, p=2, q=2)


@network(
    "Wan 2.1, Wan 2.2, SkyReels (Wan-Video)",
    "sizes of grids through a tensor and .tolist(), one sample after the other, complex rotations in float64",
    videos,
)
class GridSizes(Video):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        freqs = torch.outer(torch.arange(16), 1.0 / torch.pow(100, torch.arange(0, 8, 2).to(torch.float64).div(8)))
        self.freqs = torch.polar(torch.ones_like(freqs), freqs)

    def rotate(self, x, sizes):
        n, c = x.size(2), x.size(3) // 2
        freqs = self.freqs.split([c - 2 * (c // 3), c // 3, c // 3], dim=1)
        output = []
        for i, (f, h, w) in enumerate(sizes.tolist()):
            length = f * h * w
            turned = torch.view_as_complex(x[i, :length].to(torch.float64).reshape(length, n, -1, 2))
            factors = torch.cat(
                [
                    freqs[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
                    freqs[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
                    freqs[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
                ],
                dim=-1,
            ).reshape(length, 1, -1)
            turned = torch.view_as_real(turned * factors).flatten(2)
            output.append(torch.cat([turned, x[i, length:]]))
        return torch.stack(output).type_as(x)

    def on_tokens(self, h, emb, grid):
        sizes = torch.stack([torch.tensor(grid, dtype=torch.long) for _ in range(len(h))])
        q, k, v = (x.view(*h.shape[:2], 2, -1) for x in self.qkv(h + emb[:, None]).chunk(3, dim=-1))
        q, k = self.rotate(q, sizes), self.rotate(k, sizes)
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return h + self.out(o.transpose(1, 2).flatten(2))


@network(
    "Latte, Open-Sora 1 (Vchitect, hpcaitech)",
    "attention in space and in time by turns, times repeated for frames",
    videos,
)
class SpaceAndTime(Video):
    def __init__(self):
        super().__init__()
        self.space, self.time = Attention(), Attention()

    def on_tokens(self, h, emb, grid):
        f = grid[0]
        h = rearrange(h, "b (f n) c -> (b f) n c", f=f)
        h = h + self.space(h + repeat(emb, "b c -> (b f) 1 c", f=f))
        h = rearrange(h, "(b f) n c -> (b n) f c", f=f)
        h = h + self.time(h)
        return rearrange(h, "(b n) f c -> b (f n) c", n=grid[1] * grid[2])


@network(
    "LTX-Video (Lightricks)",
    "positions made in forward and kept on the module, times per token, print and warnings",
    videos,
)
class KeptPositions(Video):
    def __init__(self):
        super().__init__(Attention())
        self.kept = None

    def on_tokens(self, h, emb, grid):
        if self.kept is None or self.kept.shape[0] != h.shape[1]:
            self.kept = torch.linspace(0, 1, h.shape[1])
        if h.shape[1] > 10_000:
            warnings.warn("a long sequence", stacklevel=2)
        log.debug("grid %s", grid)
        cos, sin = (fn(self.kept).to(h.dtype)[:, None] for fn in (torch.cos, torch.sin))
        first, second = h.unflatten(-1, (-1, 2)).unbind(-1)
        h = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
        return h + self.body(h + emb[:, None].expand(-1, h.shape[1], -1))


@network(
    "CausVid, Self-Forcing (tianweiy, guandeh17)",
    "flex attention with a mask that is causal by frames, made in forward",
    videos,
)
class CausalByFrames(Video):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def on_tokens(self, h, emb, grid):
        per_frame, length = grid[1] * grid[2], h.shape[1]

        def seen(b, head, q, k):
            return k // per_frame <= q // per_frame

        mask = flex.create_block_mask(seen, B=None, H=None, Q_LEN=length, KV_LEN=length, device="cpu", _compile=False)
        q, k, v = rearrange(self.qkv(h + emb[:, None]), "b l (k h d) -> k b h l d", k=3, h=2)
        o = flex.flex_attention(q, k, v, block_mask=mask)
        return h + self.out(rearrange(o, "b h l d -> b l (h d)"))


class Cache(NamedTuple):
    k: Tensor
    v: Tensor


@network(
    "autoregressive video (Self-Forcing, MAGI-1)",
    "keys and values of earlier frames in a dict of caches that is written to",
    videos,
)
class Cached(Video):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def on_tokens(self, h, emb, grid):
        per_frame, (batch, length, _) = grid[1] * grid[2], h.shape
        zeros = torch.zeros(batch, 2, length, WIDTH // 2, dtype=h.dtype)
        caches = {"layer": Cache(zeros, zeros.clone()), "end": 0}
        outs = []
        for frame in h.split(per_frame, dim=1):
            q, k, v = rearrange(self.qkv(frame + emb[:, None]), "b l (k h d) -> k b h l d", k=3, h=2)
            start, end = caches["end"], caches["end"] + per_frame
            caches["layer"].k[:, :, start:end] = k
            caches["layer"].v[:, :, start:end] = v
            caches["end"] = end
            outs.append(F.scaled_dot_product_attention(q, *(x[:, :, :end].clone() for x in caches["layer"])))
        return h + self.out(rearrange(torch.cat(outs, dim=2), "b h l d -> b l (h d)"))


# ------------------------------------------------------------------------------------------------------ other networks


def sequences(draw: Draw, variant: int) -> dict[str, Any]:
    batch, length = pick(variant, (2, 6), (3, 9))
    return {"x": draw.normal(batch, length, WIDTH), "t": draw.time(batch, high=1.0)}


@network(
    "MDM, motion diffusion (GuyTevet)",
    "nn.TransformerEncoder with padded keys, tokens first, positions in a buffer",
    sequences,
)
class TorchEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, activation="gelu")
        self.times, self.encoder = Times(), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("positions", torch.randn(32, 1, WIDTH))

    def forward(self, x, t):
        h = torch.cat([self.times(t)[None], x.permute(1, 0, 2)], dim=0)
        padded = torch.zeros(h.shape[1], h.shape[0], dtype=torch.bool)
        padded[0, -2:] = True
        h = self.encoder(h + self.positions[: h.shape[0]], src_key_padding_mask=padded)
        return h[1:].permute(1, 0, 2)


@network(
    "Diffusion Policy (real-stanford)",
    "FiLM by conditions in an OrderedDict, nn.MultiheadAttention, Mish, transposed convolutions",
    sequences,
)
class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = Times(), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv, self.up = nn.Conv1d(WIDTH, WIDTH, 5, padding=2), nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x, t):
        conditions = OrderedDict(time=self.embed(t), other=self.embed(3 * t))
        h = self.attention(x, x, x, need_weights=False)[0].mT
        for value in conditions.values():
            scale, bias = self.film(value).unsqueeze(-1).chunk(2, dim=1)
            h = F.mish(F.group_norm(self.conv(h), 4)) * (1 + scale) + bias
        return self.up(h).mT


@network(
    "DiffWave, Grad-TTS (lmnt-com)", "dilated convolutions with weight_norm, gated tanh, skips summed up", sequences
)
class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.times = Times()
        dilations = (1, 2, 4)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(WIDTH, 2 * WIDTH, 3, padding=d, dilation=d)) for d in dilations
        )
        self.outs = nn.ModuleList(spectral_norm(nn.Conv1d(WIDTH, 2 * WIDTH, 1)) for _ in dilations)

    def forward(self, x, t):
        h, skips = x.mT, []
        for conv, out in zip(self.convs, self.outs):
            gate, value = conv(h + self.times(t)[..., None]).chunk(2, dim=1)
            residual, skip = torch.chunk(out(torch.sigmoid(gate) * torch.tanh(value)), 2, dim=1)
            h = (h + residual) / math.sqrt(2.0)
            skips.append(skip)
        return (torch.sum(torch.stack(skips), dim=0) / math.sqrt(len(skips))).mT


@network(
    "DiM, DiffuSSM (state spaces)",
    "a recurrence over the sequence in Python, discretised by exp of products",
    sequences,
)
class StateSpace(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.project, self.out = Times(), nn.Linear(WIDTH, WIDTH + 8), nn.Linear(WIDTH, WIDTH)
        self.log_a, self.d = nn.Parameter(torch.zeros(WIDTH, 4)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, t):
        delta, b, c = self.project(x + self.times(t)[:, None]).split([WIDTH, 4, 4], dim=-1)
        delta = F.softplus(delta)
        decay = torch.exp(delta.unsqueeze(-1) * -torch.exp(self.log_a))
        drive = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        state, outs = torch.zeros_like(drive[:, 0]), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + drive[:, i]
            outs.append((state * c[:, i].unsqueeze(1)).sum(-1))
        return self.out(torch.stack(outs, dim=1) + self.d * x)


@network(
    "EDM for molecules, EGNN (ehoogeboom)",
    "distances of all pairs, messages summed by index_add, a centre of mass taken out",
    sequences,
)
class Molecules(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.edge, self.node = Times(), nn.Linear(2 * WIDTH + 1, 8), nn.Linear(WIDTH + 8, WIDTH)

    def forward(self, x, t):
        batch, length, _ = x.shape
        h, places = x + self.times(t)[:, None], x[..., :3] - x[..., :3].mean(dim=1, keepdim=True)
        rows, cols = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
        rows, cols = rows.reshape(-1), cols.reshape(-1)
        apart = ((places[:, rows] - places[:, cols]) ** 2).sum(-1, keepdim=True)
        message = F.silu(self.edge(torch.cat([h[:, rows], h[:, cols], apart.add(1e-8).sqrt()], dim=-1)))
        gathered = torch.zeros(batch, length, 8, dtype=x.dtype).index_add_(1, rows, message / length)
        return self.node(torch.cat([h, gathered], dim=-1))


@network(
    "AlphaFold 3, RFdiffusion (Google DeepMind, RosettaCommons)",
    "distances by cdist and in bins, pairs multiplied along triangles, attention in their rows with biases of pairs",
    sequences,
)
class Triangles(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.single, self.pair = Times(), nn.Linear(WIDTH, 16), nn.Linear(8 + 4, 8)
        self.left, self.right, self.gate, self.bias = (nn.Linear(8, width) for width in (8, 8, 8, 2))
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, WIDTH)
        self.register_buffer("edges", torch.linspace(0.5, 4, 3))

    @functools.cached_property
    def scale(self):
        return self.norm.normalized_shape[0] ** -0.5

    def forward(self, x, t):
        h = x + self.times(t)[:, None]
        places = h[..., :3] - h[..., :3].mean(dim=1, keepdim=True)
        places = places.to(torch.promote_types(places.dtype, torch.float32))  # cdist has no half precision on CPUs
        apart = torch.cdist(places, places).unsqueeze(-1).to(h.dtype)
        bins = F.one_hot((apart.detach() > self.edges.to(h.dtype)).sum(-1), 4).to(h.dtype)
        a, b = self.single(h).chunk(2, dim=-1)
        z = self.pair(torch.cat([(a[:, :, None] + b[:, None]) / (1 + apart), bins], dim=-1))
        known = torch.arange(h.shape[1]) < h.shape[1] - 1
        normal = self.norm(z)
        left, right = (side(normal) * (known[:, None] & known)[..., None] for side in (self.left, self.right))
        z = z + torch.einsum("... i k d, ... j k d -> ... i j d", left, right) * self.gate(normal).sigmoid()
        q = rearrange(z, "b i j (h d) -> b i h j d", h=2)
        bias = rearrange(self.bias(z), "b j k h -> b 1 h j k") + torch.where(known, 0.0, -1e4).to(h.dtype)
        weight = torch.softmax(torch.einsum("bihqd,bihkd->bihqk", q * self.scale, q) + bias, dim=-1)
        rows = torch.einsum("bihqk,bihkd->bihqd", weight, q)
        return h + self.out(rearrange(rows, "b i h j d -> b i j (h d)").mean(2))


class Batch(UserDict):
    """As tokenizers return."""


def conditioned(draw: Draw, variant: int) -> dict[str, Any]:
    return images(draw, variant) | {"cond": {"text": draw.normal(pick(variant, 2, 3), 5, WIDTH)}}


@network(
    "Lumina, HunyuanDiT (Alpha-VLLM, Tencent)",
    "grouped keys, masked pooling of text, a gate by tanh, text in a dict of dicts",
    conditioned,
)
class GroupedKeys(Tokens):
    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.text, self.gate = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(2))

    def forward(self, x, t, cond):
        text = Batch(cond)["text"]
        mask = torch.arange(text.shape[1]) < 3
        self_text = self.text((text * mask[:, None]).sum(1) / mask.sum())
        h = rearrange(self.patches(x), "b c h w -> b (h w) c")
        h = self.mixed(h + (self.times(t) + self_text)[:, None], text)
        return rearrange(self.last(h), "b (h w) (p q c) -> b c (h p) (w q)", h=x.shape[2] // 2, p=2, q=2)

    def mixed(self, h, text):
        q = self.q(h).view(*h.shape[:2], 2, -1).transpose(1, 2)
        own, cross = (
            self.kv(y).view(*y.shape[:2], 1, 2, -1).expand(-1, -1, 2, -1, -1).permute(3, 0, 2, 1, 4) for y in (h, text)
        )
        o = F.scaled_dot_product_attention(q, *own)
        o = o + F.scaled_dot_product_attention(q, *cross) * self.gate.tanh().view(1, -1, 1, 1)
        return h + self.out(o.transpose(1, 2).flatten(2))


@network(
    "k-diffusion, HDiT (crowsonkb)",
    "small functions under torch.compile with defaults, cosine attention with a learned scale",
)
class CompiledParts(Tokens):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.full([2], 10.0))

    @staticmethod
    @torch.compile
    def rms_norm(x, scale, eps=1e-6):
        dtype = functools.reduce(torch.promote_types, (x.dtype, scale.dtype, torch.float32))
        mean_sq = torch.mean(x.to(dtype) ** 2, dim=-1, keepdim=True)
        return x * (scale.to(dtype) * torch.rsqrt(mean_sq + eps)).to(x.dtype)

    def on_tokens(self, h, emb, height):
        h = self.rms_norm(h, emb[:, None] + 1)
        q, k, v = rearrange(self.qkv(h), "n l (t nh e) -> t n nh l e", t=3, e=WIDTH // 2)
        scale = torch.sqrt(self.scale.to(h.dtype))[:, None, None]
        q, k = (x * (scale / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)) for x in (q, k))
        return h + self.out(rearrange(F.scaled_dot_product_attention(q, k, v, scale=1.0), "n nh l e -> n l (nh e)"))


@network(
    "networks with adapters (LoRA, ControlNet)",
    "residuals of a second trunk in a list, low-rank updates in forward hooks",
)
class Adapted(Tokens):
    def __init__(self):
        super().__init__(Attention())
        self.control = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.body.out.register_forward_hook(lambda module, args, out: out + self.up(self.down(args[0])))

    def on_tokens(self, h, emb, height):
        residuals, c = [], h
        for layer in self.control:
            c = F.silu(layer(c + emb[:, None]))
            residuals.append(c)
        while residuals:
            h = h + self.body(h) + residuals.pop()
        return h


class Options(dict):
    """Settings of a network, as attributes."""

    __getattr__ = dict.__getitem__


@network(
    "REPA, REG (sihyun-yu, Martinser)",
    "features that a hook keeps while its block runs under a checkpoint, settings in a dict with attributes",
)
class KeptFeatures(Tokens):
    def __init__(self):
        super().__init__()
        self.options, self.kept = Options(depth=3, kept_at=1), []
        self.blocks = nn.ModuleList(Attention() for _ in range(self.options.depth))
        self.project = nn.Sequential(nn.Linear(WIDTH, 8), nn.SiLU(), nn.Linear(8, WIDTH))
        self.blocks[self.options.kept_at].register_forward_hook(lambda module, args, out: self.kept.append(out))

    def on_tokens(self, h, emb, height):
        for block in self.blocks[: self.options.depth]:
            h = h + checkpoint(block, h * (1 + emb[:, None]), use_reentrant=False)
        return h + self.project(self.kept.pop())
