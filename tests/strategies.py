"""Random test inputs, one strategy per concept.

shapes, dtypes      sizes from 1 up, floating types
tensors             normal numbers in a drawn layout: dense, transposed, strided, expanded
dit_like_modules    a diffusion transformer with random parts, and inputs for it
op_graphs           a random program of torch ops, printed as the Python that it is

Everything is drawn as small integers and choices, so that hypothesis shrinks an example to the shortest
program or the plainest transformer that still fails.
"""

from __future__ import annotations

import linecache
import math
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["DiT", "DiTCase", "Graph", "Spec", "dit_like_modules", "dtypes", "op_graphs", "shapes", "tensors"]

LAYOUTS = ("dense", "transposed", "strided", "expanded")
seeds = st.integers(0, 2**16)


# --------------------------------------------------------------------------------------------- tensors


def shapes(min_dims: int = 0, max_dims: int = 4, max_size: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Sizes in 1..max_size: empty tensors have no tangent to be wrong about."""
    return st.lists(st.integers(1, max_size), min_size=min_dims, max_size=max_dims).map(tuple)


def dtypes(*of: torch.dtype) -> st.SearchStrategy[torch.dtype]:
    """One of the given types, by default of those that models compute in."""
    return st.sampled_from(of or (torch.float64, torch.float32, torch.bfloat16))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in another layout; expanded: its first slice, repeated without memory."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, 77.0)], -1)[..., 0]
    if layout == "expanded" and x.dim():
        return x[:1].contiguous().expand_as(x)
    return x.contiguous()


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Standard normal numbers in any layout."""
    shape = shape if isinstance(shape, tuple) else draw(shape)
    return laid_out(normal(draw(seeds), shape, dtype), draw(st.sampled_from(LAYOUTS)))


# ------------------------------------------------------------------------------------------- transformers
# B batch, N tokens, C width, H heads, D head width


@dataclass(frozen=True)
class Spec:
    """The parts of a DiT. The first value of each choice is the plainest."""

    depth: int = 1
    heads: int = 2
    head_dim: int = 4
    norm: str = "layer"  # layer, layer_affine, rms, rms_by_hand, group
    adaln: bool = True
    attention: str = "sdpa"  # sdpa, by_hand, by_hand_float, gqa, padding_mask, additive_mask, causal
    qk_norm: bool = False
    rope: str = "none"  # none, real, complex
    cross: bool = False
    mlp: str = "gelu"  # gelu, gelu_tanh, silu, geglu, swiglu
    patchify: str = "conv"  # conv, linear
    time: str = "sinusoid"  # sinusoid, fourier, linear
    skip: str = "none"  # none, long
    in_place: bool = False
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class TokenGroupNorm(nn.GroupNorm):
    def forward(self, x_BNC: Tensor) -> Tensor:
        return super().forward(x_BNC.transpose(1, 2)).transpose(1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda c: nn.LayerNorm(c, elementwise_affine=False),
    "layer_affine": nn.LayerNorm,
    "rms": lambda c: nn.RMSNorm(c, eps=1e-6),
    "rms_by_hand": RMSNorm,
    "group": lambda c: TokenGroupNorm(2, c),
}


class TimeEmbedding(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.kind, half = spec.time, spec.width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(100.0) * torch.arange(half) / half))
        self.first = nn.Linear(1 if spec.time == "linear" else 2 * half, spec.width)
        self.second = nn.Linear(spec.width, spec.width)

    def forward(self, t_B: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.second(F.silu(self.first(t_B[:, None])))
        scale = 2 * math.pi if self.kind == "fourier" else 10.0
        angles = scale * t_B[:, None] * self.frequencies
        return self.second(F.silu(self.first(torch.cat([angles.cos(), angles.sin()], dim=-1))))


def rotated(x_BHND: Tensor, angles_ND: Tensor, kind: str) -> Tensor:
    """Rotary embedding: pairs of features turned by the angle of their token."""
    if kind == "complex":
        z = torch.view_as_complex(x_BHND.reshape(*x_BHND.shape[:-1], -1, 2))
        return torch.view_as_real(z * torch.polar(torch.ones_like(angles_ND), angles_ND)).flatten(-2)
    if kind == "real":
        a, b = x_BHND.chunk(2, dim=-1)
        cos, sin = angles_ND.cos(), angles_ND.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return x_BHND


class Attention(nn.Module):
    def __init__(self, spec: Spec, kind: str, rope: str):
        super().__init__()
        self.spec, self.kind, self.rope = spec, kind, rope
        self.kv_heads = 1 if kind == "gqa" else spec.heads
        self.q = nn.Linear(spec.width, spec.width)
        self.kv = nn.Linear(spec.width, 2 * self.kv_heads * spec.head_dim)
        self.q_norm = nn.RMSNorm(spec.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(spec.head_dim, eps=1e-6) if spec.qk_norm else nn.Identity()
        self.out = nn.Linear(spec.width, spec.width)

    def forward(self, x_BNC: Tensor, context_BMC: Tensor) -> Tensor:
        D = self.spec.head_dim
        q_BHND = self.q_norm(self.q(x_BNC).unflatten(-1, (self.spec.heads, D)).transpose(1, 2))
        k_BMHD, v_BMHD = self.kv(context_BMC).unflatten(-1, (2, self.kv_heads, D)).unbind(2)
        k_BHMD, v_BHMD = self.k_norm(k_BMHD.transpose(1, 2)), v_BMHD.transpose(1, 2)
        N, M = q_BHND.shape[2], k_BHMD.shape[2]
        if self.rope != "none":
            slopes_D = 0.5 ** torch.arange(D // 2, dtype=x_BNC.dtype)
            angles_ND = torch.arange(N, dtype=x_BNC.dtype)[:, None] * slopes_D
            q_BHND, k_BHMD = (rotated(x, angles_ND, self.rope) for x in (q_BHND, k_BHMD))
        o_BHND = self.attend(q_BHND, k_BHMD, v_BHMD, N, M)
        return self.out(o_BHND.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, N: int, M: int) -> Tensor:
        if self.kind == "by_hand":
            return ((q @ k.transpose(-2, -1)) * self.spec.head_dim**-0.5).softmax(-1) @ v
        if self.kind == "by_hand_float":  # as models for half precision write it, with a mask
            scores = torch.einsum("bhnd,bhmd->bhnm", q * self.spec.head_dim**-0.5, k).to(torch.float64)
            hidden = torch.ones(N, M, dtype=torch.bool).triu(1 + max(M - N, 0))
            scores = scores.masked_fill(hidden, -math.inf)
            return torch.einsum("bhnm,bhmd->bhnd", F.softmax(scores, dim=-1).to(v.dtype), v)
        mask = None
        if self.kind == "padding_mask":  # the last key of the first example is padding
            mask = (torch.arange(M) < max(M - 1, 1)).view(1, 1, 1, M).expand(q.shape[0], 1, 1, M)
        if self.kind == "additive_mask":
            mask = -0.1 * (torch.arange(N)[:, None] - torch.arange(M)).abs().to(q.dtype)
        causal, gqa = self.kind == "causal", self.kind == "gqa"
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)


class MLP(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.kind, gated = spec.mlp, spec.mlp in ("geglu", "swiglu")
        self.up = nn.Linear(spec.width, (4 if gated else 2) * spec.width)
        self.down = nn.Linear(2 * spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.kind in ("geglu", "swiglu"):
            h, gate = h.chunk(2, dim=-1)
            return self.down(h * (F.gelu(gate) if self.kind == "geglu" else F.silu(gate)))
        if self.kind == "silu":
            return self.down(F.silu(h))
        return self.down(F.gelu(h, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Block(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.norm1, self.norm2 = NORMS[spec.norm](spec.width), NORMS[spec.norm](spec.width)
        self.attention = Attention(spec, spec.attention, spec.rope)
        self.cross = Attention(spec, "sdpa", "none") if spec.cross else None
        self.mlp = MLP(spec)
        self.modulation = nn.Linear(spec.width, 6 * spec.width) if spec.adaln else None

    def forward(self, x_BNC: Tensor, emb_BC: Tensor, text_BMC: Tensor) -> Tensor:
        if self.modulation is None:
            h = self.norm1(x_BNC + emb_BC[:, None])
            x_BNC = x_BNC + self.attention(h, h)
            x_BNC = x_BNC + self.mlp(self.norm2(x_BNC))
        else:
            parts = self.modulation(F.silu(emb_BC))[:, None].chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            h = self.norm1(x_BNC) * (1 + scale1) + shift1
            x_BNC = x_BNC + gate1 * self.attention(h, h)
            x_BNC = x_BNC + gate2 * self.mlp(self.norm2(x_BNC) * (1 + scale2) + shift2)
        if self.cross is not None:
            update = self.cross(x_BNC, text_BMC)
            x_BNC = update.add_(x_BNC) if self.spec.in_place else x_BNC + update
        return x_BNC


class DiT(nn.Module):
    """(x: B 3 S S, t: B, text: B M C) -> B 3 S S."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        C = spec.width
        self.patchify: nn.Module = nn.Conv2d(3, C, 2, stride=2) if spec.patchify == "conv" else nn.Linear(12, C)
        self.time = TimeEmbedding(spec)
        self.blocks = nn.ModuleList([Block(spec) for _ in range(spec.depth)])
        self.join = nn.Linear(2 * C, C) if spec.skip == "long" else None
        self.norm = NORMS[spec.norm](C)
        self.unpatchify = nn.Linear(C, 12)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        B, _, S, _ = x.shape
        patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B 3 S/2 2 S/2 2
        if self.spec.patchify == "conv":
            h_BNC = self.patchify(x).flatten(2).transpose(1, 2)
        else:
            h_BNC = self.patchify(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        emb_BC, first_BNC = self.time(t), h_BNC
        for block in self.blocks:
            h_BNC = block(h_BNC, emb_BC, text)
        if self.join is not None:
            h_BNC = self.join(torch.cat([first_BNC, h_BNC], dim=-1))
        out = self.unpatchify(self.norm(h_BNC)).view(B, S // 2, S // 2, 3, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, S, S)


@dataclass(frozen=True)
class DiTCase:
    """A module, its inputs by name, and tangents for some of them."""

    spec: Spec
    module: DiT
    inputs: dict[str, Tensor]
    tangents: dict[str, Tensor]

    def __repr__(self) -> str:
        layouts = ", ".join(f"{k} {tuple(x.shape)} strides {x.stride()}" for k, x in self.inputs.items())
        return f"{self.spec}, {layouts}, tangents of {', '.join(self.tangents)}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


def specs() -> st.SearchStrategy[Spec]:
    return st.builds(
        Spec,
        depth=st.integers(1, 2),
        heads=st.integers(1, 3),
        head_dim=st.sampled_from((4, 2, 6)),
        norm=st.sampled_from(tuple(NORMS)),
        adaln=st.booleans(),
        attention=st.sampled_from(
            ("sdpa", "by_hand", "by_hand_float", "gqa", "padding_mask", "additive_mask", "causal")
        ),
        qk_norm=st.booleans(),
        rope=st.sampled_from(("none", "real", "complex")),
        cross=st.booleans(),
        mlp=st.sampled_from(("gelu", "gelu_tanh", "silu", "geglu", "swiglu")),
        patchify=st.sampled_from(("conv", "linear")),
        time=st.sampled_from(("sinusoid", "fourier", "linear")),
        skip=st.sampled_from(("none", "long")),
        in_place=st.booleans(),
        seed=seeds,
    )


@st.composite
def dit_like_modules(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> DiTCase:
    """A DiT of random parts with random weights, inputs in any layout, and tangents for a subset of them."""
    spec = draw(specs())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        module = DiT(spec).to(dtype)
        for p in module.parameters():
            if p.dim() == 1:  # no weight is 1, no bias 0
                nn.init.normal_(p, mean=float(p[0].item() == 1), std=0.2)
    B, S, M = draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = {"x": (B, 3, S, S), "t": (B,), "text": (B, M, spec.width)}
    inputs = {name: draw(tensors(size, dtype)) for name, size in sizes.items()}
    active = draw(st.sets(st.sampled_from(["x", "t"] + ["text"] * spec.cross), min_size=1))
    return DiTCase(spec, module, inputs, {name: draw(tensors(sizes[name], dtype)) for name in sorted(active)})


# --------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Graph:
    """A function of tensors as Python source, with inputs and tangents (None for an inactive input)."""

    source: str
    inputs: tuple[Tensor, ...]
    tangents: tuple[Tensor | None, ...]
    middle: int = 0  # the line of the source before which it may be cut in two
    reads_numbers: bool = False

    @property
    def narrow(self) -> torch.dtype | None:
        """The narrowest type that it casts to."""
        bfloat16, float32 = "bfloat16" in self.source, "float32" in self.source or "float()" in self.source
        return torch.bfloat16 if bfloat16 else torch.float32 if float32 else None

    @property
    def widened(self) -> Callable[..., Any]:
        """The same function with every cast to float64."""
        wide = self.source
        for cast in (".float()", ".bfloat16()"):
            wide = wide.replace(cast, ".double()")
        return _compiled(wide.replace("torch.float32", "torch.float64").replace("torch.bfloat16", "torch.float64"))

    @property
    def halves(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """``second(*first(*inputs))`` is the function.

        The second has no dead code, and what it does not use is no output of the first: a compiled graph's backward has
        zeros for its gradient where PyTorch's has none, and zero times infinity is NaN.
        """
        head, *body = self.source.splitlines()
        names = re.findall(r"\bx\d\b", head) + re.findall(r"(?m)^ +(y\d+) =", "\n".join(body[: self.middle]))
        used: set[str] = set()
        second: list[str] = []
        for line in reversed(body[self.middle :]):
            made = re.match(r" {4}(\w+) = ", line)
            if made is None or made[1] in used:
                used |= set(re.findall(r"\w+", line))
                second.insert(0, line)
        live = ", ".join(name for name in dict.fromkeys(names) if name in used)
        first = "\n".join([head, *body[: self.middle], f"    return {live},", ""])
        return _compiled(first), _compiled("\n".join([f"def f({live}):", *second, ""]))

    @property
    def fn(self) -> Callable[..., Any]:
        """A new function object each time, with the source where tracebacks find it."""
        return _compiled(self.source)

    def __repr__(self) -> str:
        shown = [f"{tuple(x.shape)} strides {x.stride()}" for x in self.inputs]
        active = [f"x{i}" for i, dot in enumerate(self.tangents) if dot is not None]
        return f"inputs {', '.join(shown)}, active {', '.join(active)}\n{self.source}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


def _compiled(source: str) -> Callable[..., Any]:
    name = f"<program {zlib.crc32(source.encode()):08x}>"  # the same in each replay of an example
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"torch": torch, "F": F, "math": math}
    exec(compile(source, name, "exec"), namespace)
    return namespace["f"]


def _templates(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", ";").split(";") if part.strip())


# {a} is the operand, {b} and {c} broadcast with it, {d} is one of its dims. Values of order one remain so.
UNARY = _templates("""
    torch.sin({a}); torch.cos({a}); torch.tanh({a}); torch.sigmoid({a}); -{a}; {a} * 0.5; 2 - {a}; {a}.clone()
    F.gelu({a}); F.gelu({a}, approximate='tanh'); F.silu({a}); F.softplus({a}); F.mish({a}); F.logsigmoid({a})
    torch.erf({a}); torch.exp(-{a} * {a}); torch.sqrt({a} * {a} + 1); torch.rsqrt({a} * {a} + 1)
    torch.log1p({a} * {a}); torch.atan({a}); 1 / (2 + torch.sin({a})); torch.expm1(torch.tanh({a}))
    F.relu({a}); torch.abs({a}); F.leaky_relu({a}); F.elu({a}); F.hardswish({a}); torch.clamp({a}, -0.9, 1.1)
    torch.tanh({a}) ** 3; torch.pow(2.0, torch.tanh({a})); {a}.square().tanh(); torch.sinh(torch.tanh({a}))
    torch.asin(0.9 * torch.tanh({a})); torch.acos(0.9 * torch.tanh({a})); torch.nan_to_num({a})
    {a} * ({a} > 0); {a} * torch.arange({a}.shape[-1]); ({a} > 0).sum() * {a}
    {a} + torch.ones_like({a}).bool()
""")
BINARY = _templates("""
    {a} + {b}; {a} - {b}; {a} * {b}; {a} / ({b} * {b} + 1); torch.atan2({a}, {b} * {b} + 1)
    torch.add({a}, {b}, alpha=2); torch.sub({a}, {b}, alpha=0.5); torch.hypot({a}, {b}.exp())
    torch.maximum({a}, {b}); torch.minimum({a}, {b}); torch.where({a} > {b}, {a}, {b} * 2)
    torch.where({b} > 0, {a}, 0.0); torch.where({b} > 0, 0.5, {a}); torch.fmod({a}, 2.0) * {b}
    torch.lerp({a}, {b}, 0.3); torch.lerp({a}, {b}, {c}); torch.addcmul({a}, {b}, {c}, value=0.5)
    torch.addcdiv({a}, {b}, {c} * {c} + 1); (1 + {a} * {a}) ** torch.tanh({b})
""")
REDUCTIONS = _templates("""
    {a}.mean({d}); {a}.sum({d}, keepdim=True); {a}.amax({d}); {a}.amin({d}, keepdim=True); {a}.mean()
    {a}.max()
    torch.logsumexp({a}, {d}); ({a} * {a} + 1).sum({d}).sqrt(); torch.linalg.vector_norm({a}, dim={d})
    F.softmax({a}, {d}); F.log_softmax({a}, {d}); torch.cumsum({a}, {d}); ({a} / (1 + {a} * {a})).prod({d})
    {a}.max({d}).values; {a}.min({d}, keepdim=True)[0]; torch.sort({a}, {d}).values
    torch.topk({a}, 1, {d}).values; F.normalize({a}, dim={d}); {a}.var({d}, correction=0)
    (torch.cat([{a}, {a} + 1], {d})).std({d}); torch.var_mean({a}, {d}, correction=0)[0]
    F.layer_norm({a}, {a}.shape[-1:], eps=0.1); F.rms_norm({a}, {a}.shape[-1:], eps=0.1)
""")
VIEWS = _templates("""
    {a}.transpose({d}, -1); {a}.flatten(); {a}.unsqueeze({d}); {a}.squeeze({d}); {a}.movedim({d}, 0)
    {a}[..., :1]; {a}[0]; {a}[..., -1]; {a}[::2]; {a}[None]; {a}.narrow({d}, 0, 1); {a}.select({d}, 0)
    {a}.unbind({d})[0]; {a}.flip({d}); {a}.roll(1, {d}); {a}.reshape(-1, 1); {a}.chunk(2, {d})[0]
    {a}.split(1, {d})[-1]; {a}.unsqueeze(0).expand(2, *{a}.shape); torch.tril(torch.atleast_2d({a}))
    F.pad({a}, (1, 0), value=0.5); {a}.repeat_interleave(2, {d}); {a}.tile(2); {a}.contiguous(); {a}.detach()
    torch.diagonal(torch.atleast_2d({a})); torch.atleast_2d({a}).mT; {a}.permute(*reversed(range({a}.dim())))
    {a}.as_strided({a}.shape, {a}.stride()); {a}.view_as({a}); {a}.unfold({d}, 1, 1)
""")
INDEXING = _templates("""
    {a}[torch.tensor([0, 0])]; {a}.index_select({d}, torch.tensor([0, 0])); torch.take({a}, torch.tensor([0]))
    {a}.gather({d}, torch.zeros_like({a}, dtype=torch.long)); {a}.gather({d}, {a}.argmax({d}, keepdim=True))
    {a}[..., torch.arange({a}.shape[-1]).flip(0)]; {a}.index_add({d}, torch.arange({a}.shape[{d}]) * 0, {a})
    {a}.scatter({d}, torch.zeros_like({a}[:1], dtype=torch.long), 0.5); {a}.masked_fill({a} > 1, 0.25)
    {a}.scatter_add({d}, torch.zeros_like({a}, dtype=torch.long), {a}); {a}.gather({d}, {a}.argsort({d}))
    F.one_hot(({a} > 0).long(), 2) * {a}.unsqueeze(-1)
    {a}.index_select({d}, {a}.flatten().argmax().clamp(max=0))
""")
JOINS = _templates("""
    torch.cat([{a}, {a}.tanh()], {d}); torch.stack([{a}, {b} + {a}], {d}); torch.cat([{a}, {a} * {b}], {d})
    torch.cat([torch.zeros_like({a}), {a}], {d}); torch.hstack([{a}, torch.ones_like({a})])
    torch.meshgrid({a}.flatten(), {b}.flatten(), indexing='ij')[1]
""")
PRODUCTS = _templates("""
    torch.atleast_2d({a}) @ torch.atleast_2d({a}).mT / {a}.shape[-1]
    torch.atleast_2d({a}).mT @ torch.tanh(torch.atleast_2d({a}))
    F.linear({a}, {a}.reshape(-1, {a}.shape[-1]).tanh()); torch.outer({a}.flatten(), {b}.flatten()).tanh()
    F.linear({a}, {a}.new_full((2, {a}.shape[-1]), 0.5), {a}.new_ones(2))
    torch.einsum('...i,...i->...', {a}, {a} + 1); torch.einsum('i,j->ij', {a}.flatten(), {b}.flatten()).tanh()
    F.scaled_dot_product_attention(torch.atleast_3d({a}), torch.atleast_3d({a}).tanh(), torch.atleast_3d({a}))
    torch.softmax(torch.atleast_2d({a}) @ torch.atleast_2d({a}).mT, -1) @ torch.atleast_2d({a})
    F.conv1d({a}.reshape(1, 1, -1), {a}.new_full((1, 1, 2), 0.5), padding=1)
""")
COMPLEX = _templates("""
    torch.polar(1 + {a} * {a}, {a}).imag; torch.view_as_real(torch.complex({a}, {a}.cos())).sum(-1)
    torch.view_as_real(torch.view_as_complex(torch.stack([{a}, {a}.sin()], -1)) * 1j).select(-1, 0)
    torch.abs(torch.complex({a}, 1 + {a} * {a}))
    (torch.complex({a}, {a} + 1) * torch.complex({a}.cos(), {a})).real
    torch.exp(1j * {a}).conj().imag; torch.fft.fft({a}).real.tanh(); torch.fft.rfft({a}, dim={d}).real.tanh()
    torch.angle(torch.complex(2 + torch.sin({a}), {a}))
    (torch.exp(1j * {a}) / torch.complex({b} + 3, {b})).imag
""")
# {y} is a fresh copy of {a}.
IN_PLACE = _templates("""
    {y}.add_({b}); {y}.mul_({b}); {y}.mul_(2).sub_(1); {y}.sin_(); {y}.copy_({b}); {y}.relu_(); {y}.zero_()
    {y}[..., 0] = 2 * {y}[..., -1]; {y}[0] = 0.5; {y}.masked_fill_({y} > 0, 0.5); {y}.clamp_(-1, 1)
    {y} *= {b}
    {y}.transpose(0, -1).add_(1).tanh_(); {y}.select({d}, 0).mul_(3); {y}.narrow({d}, 0, 1).sigmoid_()
    {y} += {a}
    {y}.view(-1)[:1].add_({a}.sum()); {y}.index_fill_({d}, torch.tensor([0]), 0.5); {y}.div_(2 + {b}.abs())
    {y}.addcmul_({b}, {b}); {y}.lerp_({b}, 0.5); {y}.view(-1)[{y}.view(-1) > 0.5] = 0.1; {y}.neg_()
    {y}[..., :1] += {y}[..., -1:]
    {y}.unsqueeze(0)[0, ...].sigmoid_(); {y}.fill_(0.5); {y}[...] = {b}; {y}[:1] = {b}
    {y}.scatter_({d}, torch.zeros_like({y}, dtype=torch.long), 2 * {a})
    {y}.t_().sin_()
""")
CASTS = _templates("""
    {a}.float().tanh().double(); {a}.to(torch.bfloat16).sin().to(torch.float64); {a}.float(); {a}.bfloat16()
    ({a}.float() @ {a}.float().mT).tanh().double(); F.softmax({a}, {d}, dtype=torch.float32).to({a}.dtype)
    F.layer_norm({a}.float(), {a}.shape[-1:]).type_as({a}); {a}.to({b}.dtype); {a}.to(torch.bfloat16).sum({d}).double()
""")
# What takes several lines. {y} is the result.
BLOCKS = (
    "with torch.no_grad():\n    {y} = {a}.sin() * {b}",
    "with torch.no_grad():\n    s = {a}.abs().amax().detach() + 1\n{y} = {a} / s",
    "{y} = {a} + ({b} - {b}.detach())",
    "{y} = {a} * {b}.detach().tanh()",
    "q = torch.atleast_2d({a})\n"
    "m = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)\n"
    "{y} = (q @ q.mT).masked_fill(m, -1e9).softmax(-1) @ q",
    "q = torch.atleast_2d({a})\n"
    "m = torch.zeros(q.shape[-2], q.shape[-2]).masked_fill(torch.eye(q.shape[-2]).bool(), -math.inf)\n"
    "{y} = torch.softmax(q @ q.mT * 0.5 + m.to(q.dtype), -1).nan_to_num() @ q",
    "q = torch.atleast_2d({a})\n"
    "{y} = torch.softmax((q @ q.mT / math.sqrt(q.shape[-1])).float(), -1).to(q.dtype) @ q.tanh()",
    "q = torch.atleast_3d({a})\n"
    "m = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()\n"
    "{y} = F.scaled_dot_product_attention(q, q.sin(), q, attn_mask=m, scale=0.3)",
    "{y} = {a}.clone()\nv = {y}[..., :1]\nv.mul_(2)\nv += {y}[..., -1:]",
    "{y} = {a}.clone()\nfor i in range({y}.shape[{d}]):\n    {y}.select({d}, i).sin_()",
    "with torch.no_grad():\n    {y} = torch.empty_like({a})\n    torch.mul({a}, 2, out={y})",
    "{y} = torch.zeros_like({a})\n{y}.add_({a}).mul_({b})",
    "p, q = torch.var_mean({a}, {d}, correction=0, keepdim=True)\n{y} = ({a} - q) * torch.rsqrt(p + 0.1)",
    "p, q = torch.cat([{a}, {a}.cos()], {d}).chunk(2, {d})\n{y} = p * q",
    "p = [{a}, {b}, {a}.tanh()]\n{y} = torch.stack(torch.broadcast_tensors(*p)).sum(0)",
    "m = {a} > 0\n{y} = torch.where(m, {a}, {b}) * m",
    "{y} = {a}.clone()\n{y}[{y} > 0.5] *= 2",
    "p = torch._foreach_mul([{a}, {b}], 2.0)\n{y} = p[0] + p[1]",
)
# A number read from a tensor: refused, or right.
NUMBERS = _templates("""
    {a} * {b}.sum().item(); {a} + float({b}.mean()); torch.full_like({a}, {b}.amax().item()); {a} * {b}.tolist()[0]
    {a}.clamp(max={b}.mean().item()); {a} * int(({b} > 0).sum()); {a}.masked_fill({a} > 0, {b}.sum().item())
    {a} * torch.tensor([{b}.mean().item()], dtype={a}.dtype); {a} if {b}.sum() > 0 else -{a}
""")
KINDS = (UNARY, BINARY, REDUCTIONS, VIEWS, INDEXING, JOINS, PRODUCTS, COMPLEX, IN_PLACE, CASTS, BLOCKS)
KINDS_WITH_NUMBERS = (*KINDS, NUMBERS)
MAX_NUMEL = 256


@st.composite
def op_graphs(draw: st.DrawFn, max_steps: int = 8, numbers: bool = False) -> Graph:
    """A program of one to ``max_steps`` random ops on up to three inputs; it returns one to three tensors.

    Args:
        numbers: it may read Python numbers from tensors.
    """
    base = draw(shapes(min_dims=1, max_dims=3))
    inputs = [draw(tensors(_broadcastable(draw, base))) for _ in range(draw(st.integers(1, 3)))]
    # Shapes are found by running the program so far; a step that does not fit them is left out.
    values = {f"x{i}": x for i, x in enumerate(inputs)}
    body: list[str] = []
    starts, reads = [0], False
    for _ in range(draw(st.integers(1, max_steps))):
        kind = draw(st.sampled_from(KINDS_WITH_NUMBERS if numbers else KINDS))
        lines, name, value = _step(draw, values, kind)
        if lines:
            body += lines
            values[name] = value
            starts.append(len(body))
            reads = reads or kind is NUMBERS
    results = draw(st.lists(st.sampled_from(list(values)[-3:]), min_size=1, max_size=3, unique=True))
    head = f"def f({', '.join(f'x{i}' for i in range(len(inputs)))}):"
    source = "\n".join([head, *(f"    {line}" for line in body), f"    return {', '.join(results)}", ""])
    active = draw(st.sets(st.integers(0, len(inputs) - 1), min_size=1))
    dots = [draw(tensors(tuple(x.shape))) if i in active else None for i, x in enumerate(inputs)]
    return Graph(source, tuple(inputs), tuple(dots), draw(st.sampled_from(starts)), reads)


def _broadcastable(draw: st.DrawFn, base: tuple[int, ...]) -> tuple[int, ...]:
    kept = tuple(1 if draw(st.booleans()) and draw(st.booleans()) else n for n in base)
    return kept[draw(st.integers(0, len(base) - 1)) :]


def _step(draw: st.DrawFn, values: dict[str, Tensor], kind: tuple[str, ...]) -> tuple[list[str], str, Any]:
    template = draw(st.sampled_from(kind))
    names = st.sampled_from(list(values)[::-1])  # the newest first: long chains
    a = draw(names)
    fitting = [n for n, x in values.items() if _broadcast(x, values[a]) is not None]
    into = [n for n in fitting if _broadcast(values[n], values[a]) == values[a].shape]
    operands = st.sampled_from(into if kind is IN_PLACE else fitting)
    y = f"y{len(values)}"
    given = {
        "a": a,
        "b": draw(operands),
        "c": draw(operands),
        "y": y,
        "d": -draw(st.integers(1, values[a].dim() or 1)),
    }
    line = template.format(**given)
    lines = line.splitlines() if kind is BLOCKS else [f"{y} = {line}"]
    if kind is IN_PLACE:
        lines = [f"{y} = {a}.clone()", line]
    namespace: dict[str, Any] = {"torch": torch, "F": F, "math": math, **values}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given once in a process: as errors, drawing would depend on it
            exec("\n".join(lines), namespace)
    except (RuntimeError, IndexError, TypeError, ValueError):  # the shape does not suit the op
        return [], y, None
    out = namespace[y]
    fine = out.numel() and out.numel() <= MAX_NUMEL and out.dim() <= 5 and bool(out.isfinite().all())
    return (lines, y, out) if fine else ([], y, None)


def _broadcast(x: Tensor, y: Tensor) -> tuple[int, ...] | None:
    try:
        return torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return None
