"""What one rank computes, sends and holds in a block of Wan 14B, by layout of up to 512 ranks.

    python -m benchmarks.scaling --table docs/scaling.md

Nothing is computed and nothing is sent: the block is on the meta device, the process group is torch's "fake" one. Its
graph is the one that training would compile: torch's parallelize_module and diffusers' context parallelism, captured
by Dynamo, differentiated by AOTAutograd, linearized and paired by jvpgraph, partitioned by AOTAutograd. B batch, N
tokens, L text tokens, D width.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.costs import Traffic, bytes_of, flops, input_bytes, peak_memory, saved, traffic
from jvpgraph.config import Config
from jvpgraph.diffusers_parallel import make_traceable
from jvpgraph.dual_forward import dual_forward
from jvpgraph.dynamo import first_cause, own_errors
from jvpgraph.dynamo_backend import Backend
from jvpgraph.passes.pipeline import JointPasses

__all__ = [
    "LAYOUTS",
    "WAN_14B",
    "Cost",
    "Layout",
    "Shape",
    "capture",
    "fake_ranks",
    "fsdp_traffic",
    "main",
    "measure",
    "page",
]

DTYPE = torch.bfloat16
REDUCE_DTYPE = torch.float32  # in which FSDP adds gradients up


@dataclass(frozen=True)
class Shape:
    """The sizes of a block and of one sample."""

    tokens: int
    width: int = 5120
    heads: int = 40
    ffn: int = 13824
    text: int = 512


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of a mesh."""

    dp: int  # samples at a time
    cp: int  # ranks that share the tokens of a sample
    tp: int  # ranks that share its heads and the hidden units of the MLP

    @property
    def ranks(self) -> int:
        return self.dp * self.cp * self.tp

    def split(self, shape: Shape) -> tuple[int, int]:
        """cp as (ring, ulysses): as much Ulysses as the heads allow, since it sends less.

        Raises:
            ValueError: heads, hidden units or tokens do not divide.
        """
        for what, size, axis, ranks in (
            ("heads", shape.heads, "tp", self.tp),
            ("hidden units of the MLP", shape.ffn, "tp", self.tp),
            ("tokens", shape.tokens, "cp", self.cp),
        ):
            if size % ranks:
                raise ValueError(f"{size:,} {what} do not divide by {axis} = {ranks}")
        ulysses = math.gcd(shape.heads // self.tp, self.cp)
        return self.cp // ulysses, ulysses


WAN_14B = {"480p": Shape(32_760), "720p": Shape(75_600)}  # 81 frames: 21 latent ones of 30 x 52 or 45 x 80 patches
LAYOUTS = (
    *(Layout(8, 1, 1), Layout(4, 2, 1), Layout(2, 2, 2), Layout(1, 8, 1), Layout(1, 1, 8)),
    *(Layout(64, 1, 1), Layout(16, 4, 1), Layout(8, 8, 1), Layout(8, 4, 2), Layout(4, 4, 4), Layout(4, 16, 1)),
    *(Layout(4, 1, 16), Layout(64, 8, 1), Layout(64, 4, 2), Layout(32, 8, 2), Layout(16, 8, 4)),
)


# --------------------------------------------------------------------------------------------------- the block


class ShardedRMSNorm(nn.Module):
    """RMSNorm over a width that tensor parallel has split: the mean square is that of all ranks. x [B, N, D / tp]."""

    def __init__(self, norm: nn.RMSNorm, mesh: DeviceMesh):
        super().__init__()
        self.eps, self.mesh = norm.eps, mesh
        (self.width,) = norm.normalized_shape
        self.weight = nn.Parameter(distribute_tensor(norm.weight, mesh, [Shard(0)]))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = DTensor.from_local(wide.square().sum(-1, keepdim=True), self.mesh, [Partial()])
        # Each rank's heads give a part of the gradient of the sum over all heads.
        total = squares.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        scaled = wide * torch.rsqrt(total / self.width + self.eps)
        return scaled.type_as(x) * self.weight.to_local()


def tensor_parallel(block: nn.Module, mesh: DeviceMesh) -> None:
    """Columns of q, k, v and the MLP's first layer, rows of what follows; norms of q and k over all heads."""
    whole = Replicate()
    plan: dict[str, Any] = {"ffn.net.0.proj": ColwiseParallel(), "ffn.net.2": RowwiseParallel()}
    for name, text in (("attn1", None), ("attn2", whole)):
        attention = block.get_submodule(name)
        attention.heads //= mesh.size()
        attention.norm_q = ShardedRMSNorm(attention.norm_q, mesh)
        attention.norm_k = ShardedRMSNorm(attention.norm_k, mesh)
        # Made replicated once for q, k and v, so that the backward adds their gradients before it reduces.
        inputs = (whole, text, None, None)
        plan[name] = PrepareModuleInput(input_layouts=inputs, desired_input_layouts=inputs)
        plan |= {f"{name}.{projection}": ColwiseParallel() for projection in ("to_q", "to_k", "to_v")}
        plan[f"{name}.to_out.0"] = RowwiseParallel()
    parallelize_module(block, mesh, plan)


def context_parallel(block: nn.Module, mesh: DeviceMesh) -> None:
    """diffusers' own, on the self-attention. Cross-attention is local: every rank has all of the text."""
    ring, ulysses = mesh.shape
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses))
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("meta"), mesh=mesh)
    processor = block.get_submodule("attn1").processor
    processor._parallel_config = config
    processor._attention_backend = AttentionBackendName._NATIVE_FLASH  # the default one cannot merge a ring


def build(shape: Shape, layout: Layout) -> tuple[nn.Module, tuple[Any, ...]]:
    """The block of rank 0 on the meta device, and its arguments: what a block in the middle of a model gets."""
    ring, ulysses = layout.split(shape)
    mesh = init_device_mesh(
        "cpu", (layout.dp, ring, ulysses, layout.tp), mesh_dim_names=("dp", "ring", "ulysses", "tp")
    )
    tokens = shape.tokens // layout.cp
    with torch.device("meta"):
        block = WanTransformerBlock(shape.width, shape.ffn, shape.heads, cross_attn_norm=True).to(DTYPE)
        x_BND, text_BLD, time_B6D = (
            torch.empty(1, n, shape.width, dtype=DTYPE, requires_grad=True) for n in (tokens, shape.text, 6)
        )
        rotary = tuple(torch.empty(1, tokens, 1, shape.width // shape.heads) for _ in range(2))
    if layout.tp > 1:
        tensor_parallel(block, mesh["tp"])
    if layout.cp > 1:
        context_parallel(block, mesh["ring", "ulysses"])
    make_traceable(block)
    return block, (x_BND, text_BLD, time_B6D, rotary)


@contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    """A process group of so many ranks, of which this process is the first and the only one there is."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # a mesh equal to one of these would get their groups


# ------------------------------------------------------------------------------------------------- its graphs


class Captured(Exception):
    """Ends a compilation that has gone as far as it is needed."""


class Capture(Backend):
    """jvpgraph's backend up to the partition into forward and backward, which it keeps."""

    forward: fx.Graph
    backward: fx.Graph
    results: int  # the first outputs of the forward; what it saves for the backward follows

    def __init__(self, config: Config | None = None):
        super().__init__("eager", config)

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], passes: JointPasses) -> Any:
        def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
            passes(joint.graph)
            joint.recompile()
            halves = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
            self.forward, self.backward = (half.graph for half in halves)
            self.results = num_fwd_outputs
            raise Captured

        aot_module_simplified(gm, example_inputs, fw_compiler=None, partition_fn=partition, decompositions={})


def capture(block: nn.Module, inputs: tuple[Any, ...], with_tangent: bool, config: Config | None = None) -> Capture:
    """The graphs of the block for training, alone or with the tangents of x and of the time embedding."""
    x_BND, _text, time_B6D, _rotary = inputs
    dots = {"args.0": torch.empty_like(x_BND).detach(), "args.2": torch.empty_like(time_B6D).detach()}
    dual = dual_forward(block)

    def primal(*arguments: Any) -> Any:
        """The markers are there, so that attention is swapped as it is for the dual; nobody asks for a tangent."""
        return dual(*arguments)[0]

    backend = Capture(config)
    torch._dynamo.reset()
    try:
        with own_errors():
            torch.compile(dual if with_tangent else primal, backend=backend, fullgraph=True, dynamic=False)(
                inputs, {}, dots
            )
    except Exception as error:
        if first_cause(error, Captured) is None:
            raise
    return backend


# ------------------------------------------------------------------------------------------------- what it costs


@dataclass
class Cost:
    """Of one block and one sample per dp rank, on rank 0."""

    ring: int
    ulysses: int
    primal_flops: int  # of the forward
    tangent_flops: int
    backward_flops: int
    primal: Traffic  # the forward without tangents
    dual: Traffic  # the forward with them
    backward: Traffic
    primal_peak: int  # bytes of activations at once in the forward
    dual_peak: int
    primal_saved: int  # bytes kept for the backward
    dual_saved: int
    fsdp: Traffic  # of forward and backward: computed from parameter sizes, not captured
    parameters: int  # bytes that rank 0 keeps


def measure(shape: Shape, layout: Layout, config: Config | None = None) -> Cost:
    """Capture the block and count.

    Raises:
        ValueError: the shape does not divide.
    """
    ring, ulysses = layout.split(shape)
    with fake_ranks(layout.ranks):
        block, inputs = build(shape, layout)
        primal, dual = (capture(block, inputs, with_tangent, config) for with_tangent in (False, True))
        (primal_flops, *_), (same, tangent_flops, _) = flops(primal.forward), flops(dual.forward)
        assert primal_flops == same, "the tangent has changed the primal half"
        local = [p.to_local() if isinstance(p, DTensor) else p for p in block.parameters()]
        given = input_bytes(inputs)
        dots = bytes_of(inputs[0]) + bytes_of(inputs[2])
        return Cost(
            ring,
            ulysses,
            primal_flops,
            tangent_flops,
            sum(flops(dual.backward)),
            traffic(primal.forward),
            traffic(dual.forward),
            traffic(dual.backward),
            given + peak_memory(primal.forward),
            given + dots + peak_memory(dual.forward),
            saved(primal.forward, primal.results),
            saved(dual.forward, dual.results),
            fsdp_traffic(local, layout),
            kept_elements(local, layout) * DTYPE.itemsize,
        )


def kept_elements(parameters: Sequence[Tensor], layout: Layout) -> int:
    """How many of its tensor-parallel share rank 0 keeps under FSDP over dp x cp: rows, with FSDP2's padding."""
    return sum(-(-len(p) // (layout.dp * layout.cp)) * p[0].numel() for p in parameters)


def fsdp_traffic(parameters: Sequence[Tensor], layout: Layout) -> Traffic:
    """FSDP2, resharded after the forward: parameters are gathered twice, gradients are reduced and scattered once."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return Traffic()
    once = (ranks - 1) * kept_elements(parameters, layout)
    return Traffic(
        Counter({"all_gather": 2 * once * DTYPE.itemsize, "reduce_scatter": once * REDUCE_DTYPE.itemsize}), launches=3
    )


# ------------------------------------------------------------------------------------------------------ the page

TEXT = """# What a rank computes, sends and holds

One block of Wan 14B ({width:,} wide, {heads} heads, MLP {ffn:,}, {text} text tokens, bfloat16) under FSDP x context
parallel x tensor parallel, on up to 512 ranks that need not exist. This page is made by

    make scaling        # python -m benchmarks.scaling --table docs/scaling.md

with torch {torch} and diffusers {diffusers}. Nothing is run: diffusers' block is on the meta device, the process group
is torch's `fake` one, and the figures are read off the graphs that training would compile on rank 0: captured by
Dynamo, differentiated by AOTAutograd, `linearize`, `fuse_attention`, `pair_collectives`, partitioned into forward and
backward. Tangents enter with the hidden states and the time embedding; inputs and parameters have gradients, as in the
middle of a model. One sample per dp rank.

## Columns

* **dp x cp x tp**: FSDP shards over dp x cp. cp is ring x Ulysses, as much Ulysses as the heads of a rank allow. A
  layout that does not divide evenly is listed with its error.
* **TFLOP**: matrix products and attention (a multiply-add counts 2); pointwise ops count nothing. *primal* and
  *tangent* are the forward's; *backward* includes what it recomputes.
* **MB sent** (10^6 bytes) by this rank, for a collective of n ranks: all-reduce 2 (n - 1) / n of its buffer;
  all-gather (n - 1) / n of what it gathers to; reduce-scatter (n - 1) / n of what it reduces; all-to-all what goes to
  others, which is (n - 1) / n of its buffer when split evenly. *primal* is what the graph without tangents sends in the
  forward, *tangent* what the graph with them sends in addition.
* **launches** of collectives in the forward, *primal* without tangents and *dual* with them, and in the backward.
* **FSDP**: modelled, not captured, because its hooks run outside of the graph: the rank's tensor-parallel share of the
  parameters is gathered over dp x cp in bfloat16 for the forward and again for the backward, and its gradients are
  reduced and scattered in float32. FSDP2's padding is included: it deals out rows, so the modulation table, which has
  one row, is padded to one per rank. `tests/test_scaling.py` compares the model with what FSDP2 sends. Parameters have
  no tangent, so a tangent adds nothing.
* **peak GiB**: activations alive at once in the forward, *primal* without tangents and *dual* with them: the block's
  inputs, and every result from the op that makes it to its last reader, in the order of the graph. What the backward
  needs stays until the end. It is assumed that each ATen op writes its result, part of which Inductor's fusion avoids,
  and that kernels need no workspace: read it as an upper bound without activation checkpointing, for comparing layouts.
* **saved GiB**: what the forward keeps for the backward, as AOTAutograd's min-cut partition chooses: the same with
  tangents and without.
* **params MiB**: of the block, kept by this rank in bfloat16.

Tensor parallel is torch's `parallelize_module`: columns of q, k, v and of the MLP's first layer, rows of what
follows. Wan normalises q and k across all heads, so under tensor parallel the mean square is summed over the ranks: 4
all-reduces of one float32 per token in addition to the 3 of [tokens, {width:,}]. Context parallel is diffusers' own, on
the self-attention; its ring gathers the keys and values of all its ranks at once, and its backward passes their
gradients round in float32 (an all-to-all in the graph, all of which goes to one neighbour). Keys and values of the text
are computed on every cp rank, which is why cp ranks together need slightly more FLOPs than one.
"""

HEAD = (
    "ranks | dp x cp x tp | ring x Ulysses | TFLOP primal | tangent | backward | MB sent primal | tangent | backward |"
    " launches primal | dual | backward | peak GiB primal | dual | saved GiB | params MiB"
)
KINDS = ("all_reduce", "all_to_all", "all_gather", "reduce_scatter")
KINDS_HEAD = "dp x cp x tp | all-reduce | all-to-all | all-gather | reduce-scatter | FSDP all-gather | reduce-scatter"


def page(shapes: dict[str, Shape], layouts: Sequence[Layout], config: Config | None = None) -> str:
    """docs/scaling.md."""
    (first, *_), versions = shapes.values(), {"torch": torch.__version__, "diffusers": diffusers.__version__}
    text = TEXT.format(width=first.width, heads=first.heads, ffn=first.ffn, text=first.text, **versions)
    parts = [text]
    for name, shape in shapes.items():
        costs = {layout: _measured(shape, layout, config) for layout in layouts}
        counted = {layout: cost for layout, cost in costs.items() if isinstance(cost, Cost)}
        parts.append(f"## {name}, 81 frames: {shape.tokens:,} tokens\n")
        parts.append(_markdown(HEAD, [_row(layout, cost) for layout, cost in costs.items()]))
        parts.append("\nMB sent, by kind: primal + tangent + backward.\n")
        parts.append(_markdown(KINDS_HEAD, [_kinds_row(layout, cost) for layout, cost in counted.items()]) + "\n")
    return "\n".join(parts)


def _measured(shape: Shape, layout: Layout, config: Config | None) -> Cost | str:
    try:
        return measure(shape, layout, config)
    except ValueError as refusal:
        return str(refusal)


def _row(layout: Layout, cost: Cost | str) -> list[str]:
    cells = [str(layout.ranks), _axes(layout)]
    if isinstance(cost, str):
        return [*cells, cost, *[""] * (HEAD.count("|") - 2)]
    flops = (cost.primal_flops, cost.tangent_flops, cost.backward_flops)
    sent = (cost.primal.total, cost.dual.total - cost.primal.total, cost.backward.total)
    launches = (cost.primal.launches, cost.dual.launches, cost.backward.launches)
    memory = (cost.primal_peak, cost.dual_peak, cost.dual_saved)
    return [
        *cells,
        f"{cost.ring} x {cost.ulysses}",
        *(f"{x / 1e12:.2f}" for x in flops),
        *(_megabytes(x) for x in sent),
        *map(str, launches),
        *(f"{x / 2**30:.2f}" for x in memory),
        f"{cost.parameters / 2**20:.1f}",
    ]


def _kinds_row(layout: Layout, cost: Cost) -> list[str]:
    def split(kind: str) -> str:
        primal, dual, backward = (half.sent[kind] for half in (cost.primal, cost.dual, cost.backward))
        return " + ".join(map(_megabytes, (primal, dual - primal, backward))) if dual or backward else "0"

    fsdp = [_megabytes(cost.fsdp.sent[kind]) for kind in ("all_gather", "reduce_scatter")]
    return [_axes(layout), *map(split, KINDS), *fsdp]


def _axes(layout: Layout) -> str:
    return f"{layout.dp} x {layout.cp} x {layout.tp}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size else "0"


def _markdown(head: str, rows: list[list[str]]) -> str:
    lines = [head, "|".join(["---"] * (head.count("|") + 1)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path("docs/scaling.md"), help="the page to write")
    arguments = parser.parse_args()
    arguments.table.write_text(page(WAN_14B, LAYOUTS))


if __name__ == "__main__":
    main()
