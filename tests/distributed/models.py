"""The three models of the tests on process groups, what they should give in one process, and the table of errors.

    net = MODELS["wan"]
    model, inputs, tangents = net.build(), net.inputs(), net.tangents()
    want = reference("wan")                 # value, tangent and gradients of one process
    errors(got, want)                       # relative, of each
    check("TP", "wan", run(4, function))    # in pytest: puts the worst rank into the table, fails above 1e-9

Heads, batch, tokens and hidden widths divide by 4. B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jvpgraph.tree import leaves
from tests.zoo.base import QUIET, Draw, grid_ids, model_class, randomise
from tests.zoo.oracle import AllDouble, float_leaves, forward_ad, oracle_grads, random_tangents
from tests.zoo.run import DoubleBackend

__all__ = [
    "MODELS",
    "QUIET",
    "TABLE",
    "TOLERANCE",
    "Answer",
    "Errors",
    "Net",
    "backend",
    "check",
    "dots_of",
    "errors",
    "float_leaves",
    "full",
    "gradients",
    "loss",
    "printed",
    "reference",
    "worst",
]

TOLERANCE = 1e-9


# ---------------------------------------------------------------------------------------------------- models


class PlainBlock(nn.Module):
    """adaLN, self-attention, cross-attention to the text, MLP. Heads are counted from the width at hand."""

    def __init__(self, width: int, heads: int, text: int):
        super().__init__()
        self.head_dim = width // heads
        self.modulation = nn.Linear(width, 2 * width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.text_q, self.text_out = nn.Linear(width, width), nn.Linear(width, width)
        self.text_k, self.text_v = nn.Linear(text, width), nn.Linear(text, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, q_BND: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q_BND, k_BND, v_BND))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def forward(self, x_BND: Tensor, c_BD: Tensor, text_BLE: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(c_BD)).unsqueeze(1).chunk(2, -1)
        h = self.norm1(x_BND) * (1 + scale) + shift
        x_BND = x_BND + self.to_out(self.attend(self.to_q(h), self.to_k(h), self.to_v(h)))
        h = self.norm2(x_BND)
        to_text = (self.text_q(h), self.text_k(text_BLE), self.text_v(text_BLE))
        x_BND = x_BND + self.text_out(PlainBlock.attend(self, *to_text))  # also where a subclass splits the tokens
        return x_BND + self.down(F.gelu(self.up(self.norm3(x_BND))))


class PlainDiT(nn.Module):
    """x [B, N, channels], t [B], text [B, L, E] -> [B, N, channels]."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, channels: int = 4, text: int = 12):
        super().__init__()
        self.embed, self.time = nn.Linear(channels, width), nn.Linear(2, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, text) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, channels)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.time(torch.stack([t.sin(), t.cos()], 1))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c, text)
        return self.head(self.norm(x))


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
FLUX = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 4),
}
BATCH = 4


def _plain_inputs(draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(BATCH, 16, 4), "t": draw.time(BATCH, high=1.0), "text": draw.normal(BATCH, 8, 12)}


def _wan_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(BATCH, 4, 2, 4, 8),
        "timestep": draw.time(BATCH),
        "encoder_hidden_states": draw.normal(BATCH, 8, 12),
        "return_dict": False,
    }


def _flux_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(BATCH, 16, 8),
        "encoder_hidden_states": draw.normal(BATCH, 8, 12),
        "pooled_projections": draw.normal(BATCH, 12),
        "timestep": draw.time(BATCH, high=1.0),
        "img_ids": grid_ids(4, 4),
        "txt_ids": torch.zeros(8, 3, dtype=torch.float64),
        "guidance": draw.time(BATCH, high=5.0),
        "return_dict": False,
    }


@dataclass(frozen=True)
class Net:
    """A model, its inputs, and which of them carry a tangent."""

    make: Callable[..., nn.Module]
    draw: Callable[[Draw], dict[str, Any]]
    active: tuple[str, ...] = ("hidden_states", "timestep")
    config: dict[str, Any] = field(default_factory=dict)

    def build(self, **changes: Any) -> nn.Module:
        """In float64, in eval mode, the same weights on every rank; ``changes`` of the constructor's arguments."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make(**{**self.config, **changes}).double().eval()
        randomise(model, 0)
        return model

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of forward."""
        return self.draw(Draw(0))

    def tangents(self) -> dict[str, Tensor]:
        return random_tangents(self.inputs(), self.active)


MODELS = {
    "dit": Net(PlainDiT, _plain_inputs, ("x", "t")),
    "wan": Net(lambda **config: model_class("WanTransformer3DModel")(**config), _wan_inputs, config=WAN),
    "flux": Net(lambda **config: model_class("FluxTransformer2DModel")(**config), _flux_inputs, config=FLUX),
}


def backend(compiler: str = "eager", config: Any = None) -> DoubleBackend:
    """For ``transform(model, backend=...)``: without the models' own casts to float32."""
    return DoubleBackend(compiler, config)


# ------------------------------------------------------------------------------------------------- comparing


class Answer(NamedTuple):
    """What a layout is compared by; all tensors whole, gradients of :func:`loss` by parameter."""

    value: Tensor
    tangent: Tensor
    gradients: dict[str, Tensor]


class Errors(NamedTuple):
    """Largest deviations: of value and tangent relative to their largest entry, of gradients to the largest of all."""

    value: float
    tangent: float
    gradient: float


@functools.cache
def reference(name: str, **changes: Any) -> Answer:
    """In one process by torch.func.jvp and autograd with the math attention, which share nothing with jvpgraph."""
    net = MODELS[name]
    model, inputs = net.build(**changes), net.inputs()
    with AllDouble():
        (value,), (tangent,) = forward_ad(model, inputs, net.tangents())
        return Answer(value, tangent, oracle_grads(model, inputs))


def loss(output: Any) -> Tensor:
    """sum(y * w) with a standard normal w: the scalar whose gradients ``reference`` has. Takes the whole output."""
    (y,) = float_leaves(output)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (y * weight).sum()


def gradients(model: nn.Module, rename: Callable[[str], str] = lambda name: name) -> dict[str, Tensor]:
    """What backward left in the parameters, gathered; without what no gradient reached."""
    found = {rename(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: full(grad).detach().clone() for name, grad in found.items()}


def dots_of(out_dot: Any) -> Tensor:
    """The one tangent among the outputs of a transformed model."""
    (dot,) = [dot for _path, dot in leaves(out_dot) if dot is not None]
    return dot


def full(x: Tensor) -> Tensor:
    """A DTensor gathered; other tensors as they are."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def errors(got: Answer, want: Answer) -> Errors:
    """Infinite where a shape differs, a number is not finite, or gradients reach other parameters."""
    scale = max(w.abs().max().item() for w in want.gradients.values())
    if set(got.gradients) == set(want.gradients):
        worst_gradient = max(_deviation(g, want.gradients[name]) for name, g in got.gradients.items())
    else:
        worst_gradient = float("inf")
    relative = (_deviation(g, w) / w.abs().max().item() for g, w in zip(got[:2], want[:2]))
    return Errors(*relative, worst_gradient / scale)


def _deviation(got: Tensor, want: Tensor) -> float:
    got = full(got).detach()
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return (got - want).abs().max().item()


def worst(found: Iterable[Errors]) -> Errors:
    """Of all ranks."""
    return Errors(*(max(column) for column in zip(*found, strict=True)))


# ------------------------------------------------------------------------------------------------- the table

TABLE: dict[tuple[str, int], dict[str, Errors | str]] = {}  # (layout, ranks) -> model -> errors, or why not


def check(layout: str, name: str, found: list[Errors], tolerance: float = TOLERANCE) -> None:
    """Put the errors of all ranks into the table; fail above the tolerance."""
    error = worst(found)
    TABLE.setdefault((layout, len(found)), {})[name] = error
    assert max(error) <= tolerance, f"{layout}, {name}, {len(found)} ranks: {error}"


def printed() -> list[str]:
    """The table as lines: value / tangent / gradient."""
    if not TABLE:
        return []
    names = list(MODELS) + sorted({name for row in TABLE.values() for name in row} - set(MODELS))
    lines = [f"{'layout':30s} ranks " + "".join(f"{name:27s}" for name in names)]
    for (layout, ranks), row in sorted(TABLE.items()):
        cells = (row.get(name, "") for name in names)
        shown = (c if isinstance(c, str) else " ".join(f"{e:.1e}" for e in c) for c in cells)
        lines.append(f"{layout:30s} {ranks:5d} " + "".join(f"{cell:27s}" for cell in shown))
    return lines
