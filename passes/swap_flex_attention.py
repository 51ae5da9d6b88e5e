"""Swap flex_attention for our attention op with a block mask, on the torch-level graph that Dynamo gives out.

Before: ``out, lse, _ = flex_attention(q, k, v, score_mod, block_mask, scale, ...)``
After:  ``map, places = jvpgraph::block_map(kv_num_blocks, kv_indices, ...)``, the nodes of mask_mod on these places,
        ``bias = score_mod(0, b, h, i, j)``,
        ``o, _ = jvpgraph::attention(q, k, v, bias, False, scale, block_map=map, partial_blocks=...)``
        For a score_mod that does more than add (a softcap): ``softmax(score_mod(scale * q k^T, b, h, i, j)) v``.
Needs:
    Only ``out`` used, and functions that are pointwise in the indices: otherwise the call is left, with the reason.
Keeps:
    Every other node; calls that no marked input reaches.
Numerics:
    The same maths, and the same tiles. The bytes of a tile are made where mask_mod decides on it; how many these are is
    known when the graph runs, which on a GPU waits for it, once for each mask. A bias is in float32, and as large as
    the indices that it depends on; what is written out is as large as the scores, and computed in float32.

A block mask lists, for each block of queries, the blocks of keys that are seen whole (``full``), and those that its
mask_mod decides on. mask_mod is a graph of 0-dim indices; on indices that broadcast it gives the bytes of all tiles.
So is score_mod, of which the rules that all ops have give the tangent.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.emit_attention import emit_attention
from jvpgraph.graph.index_functions import adds_to_the_score, check_is_pointwise, inlined, result_of
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import active_graphs, emit, fake_mode_of
from jvpgraph.kernels.block_mask import BlockMask, positions_of
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context

__all__ = ["swap_flex_attention"]

FLEX = torch.ops.higher_order.flex_attention
NO_TILES = 1 << 20  # flex attention without a block mask has one tile of 2^30 queries and keys
WRITTEN_OUT = "flex_attention whose score_mod does more than add to the score: written out, in memory for all scores"


def swap_flex_attention(gm: fx.GraphModule, context: Context) -> None:
    """Replace active calls of flex_attention by jvpgraph::attention, in gm and the bodies of its higher-order ops."""
    for body, nodes in active_graphs(gm):
        for node in [n for n in body.graph.find_nodes(op="call_function", target=FLEX) if n in nodes]:
            name, line = node.name, source_line(node)
            try:
                form = _swap(body, node)
            except ValueError as refusal:
                context.report.left.append((name, line, str(refusal)))
            else:
                (context.report.left if form is WRITTEN_OUT else context.report.swapped).append((name, line, form))


def _swap(gm: fx.GraphModule, node: fx.Node) -> str:
    """Swap one call, and say what it was, or raise ValueError with the reason why not."""
    q, k, v, score_mod, block_mask, scale, _, of_score, of_mask = node.args
    outs = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(outs) != len(node.users) or any(out.users for index, out in outs.items() if index != 0):
        raise ValueError("flex_attention whose logsumexp or maximum is used")
    scale = _known(scale)
    if not isinstance(scale, (int, float)):
        raise ValueError("scale is not a number")
    score_mod = getattr(gm, str(score_mod.target))  # type: ignore[union-attr]
    mask_mod = getattr(gm, str(block_mask[-1].target))  # type: ignore[index, union-attr]
    check_is_pointwise(mask_mod, of_mask, "mask_mod")  # type: ignore[arg-type]
    check_is_pointwise(score_mod, of_score, "score_mod")  # type: ignore[arg-type]
    dtype = outs[0].meta["example_value"].dtype
    with node.graph.inserting_before(node):
        mask = _block_mask(node, q, k, block_mask, mask_mod, of_mask)  # type: ignore[arg-type]
        form = "flex_attention with a block mask" if mask else "flex_attention"
        bias = None
        if adds_to_the_score(score_mod):
            if not _is_identity(score_mod):
                bias, form = _bias(node, q, k, score_mod, of_score), f"{form}{' and' if mask else ' with'} a bias"  # type: ignore[arg-type]
            o = emit_attention(node, q, k, v, bias, False, float(scale), dtype, mask)  # type: ignore[arg-type]
        else:
            o = _written_out(node, q, k, v, score_mod, of_score, float(scale), dtype, mask)  # type: ignore[arg-type]
            form = WRITTEN_OUT
    outs[0].replace_all_uses_with(o)
    for unused in (*outs.values(), node):
        node.graph.erase_node(unused)
    return form


def _inside(x: fx.Node) -> torch.dtype:
    """What scores are computed in."""
    return torch.float64 if x.meta["example_value"].dtype == torch.float64 else torch.float32


def _indices(node: fx.Node, q: fx.Node, k: fx.Node) -> list[fx.Node]:
    """Batch entries [B, 1, 1, 1], heads [H, 1, 1], queries [Lq, 1] and keys [Lkv]."""
    device, indices = q.meta["example_value"].device, []
    for x, dim, more in ((q, 0, 3), (q, 1, 2), (q, 2, 1), (k, 2, 0)):
        index = emit(node, torch.arange, emit(node, "size", x, dim), dtype=torch.int32, device=device)
        indices.append(emit(node, "view", index, -1, *[1] * more) if more else index)
    return indices


def _bias(node: fx.Node, q: fx.Node, k: fx.Node, score_mod: fx.GraphModule, captured: Sequence[fx.Node]) -> fx.Node:
    nothing = emit(node, "new_zeros", q, (1, 1, 1, 1), dtype=_inside(q))
    bias = inlined(node, score_mod, (nothing, *_indices(node, q, k), *captured))
    return emit(node, "to", bias, _inside(q))


def _written_out(
    node: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    score_mod: fx.GraphModule,
    captured: Sequence[fx.Node],
    scale: float,
    dtype: torch.dtype,
    mask: tuple[fx.Node, fx.Node] | None,
) -> fx.Node:
    """softmax(score_mod(scale * q k^T)) v; zero where a query sees nothing."""
    do: Callable[..., Any] = functools.partial(emit, node)
    heads, groups = (x.meta["example_value"].shape[1] for x in (q, k))
    indices = _indices(node, q, k)
    if heads != groups:
        k, v = (do("repeat_interleave", x, heads // groups, 1) for x in (k, v))
    q, k, v = (do("to", x, _inside(x)) for x in (q, k, v))
    score = do(operator.mul, do(torch.matmul, q, do("transpose", k, -2, -1)), scale)
    score = do("to", inlined(node, score_mod, (score, *indices, *captured)), _inside(q))
    if mask is not None:
        seen = do(_dense, *mask, *(do("size", x, 2) for x in (q, k)))
        score = do(torch.where, seen, score, -math.inf)
    sees = do("any", do(operator.ne, score, -math.inf), -1, True)  # NaN is seen
    p = do(torch.where, sees, do("softmax", score, -1), 0.0)
    return do("to", do(torch.matmul, p, v), dtype)


def _dense(map: Tensor, partial: Tensor, length_q: int, length_kv: int) -> Tensor:
    one_more = partial.new_zeros(1, *partial.shape[1:])  # how many there are is not known, perhaps none
    return BlockMask(map, torch.cat((partial, one_more))).dense(length_q, length_kv)


def _known(scale: Any) -> Any:
    """A number, also where Dynamo computed it from a size that turned out not to be symbolic."""
    value = scale.meta.get("example_value") if isinstance(scale, fx.Node) else scale
    expression = value.node.expr if isinstance(value, torch.SymFloat) else None
    return float(expression) if expression is not None and expression.is_number else value


def _is_identity(mod: fx.GraphModule) -> bool:
    score, *_ = mod.graph.find_nodes(op="placeholder")
    return result_of(mod) is score


def _block_mask(
    node: fx.Node, q: fx.Node, k: fx.Node, block_mask: Any, mask_mod: fx.GraphModule, captured: Any
) -> tuple[fx.Node, fx.Node] | None:
    """map and partial of jvpgraph.kernels.block_mask.BlockMask; None where all is seen."""
    do: Callable[..., Any] = functools.partial(emit, node)
    _, _, count, index, full_count, full_index, *_, block_q, block_k, _ = block_mask
    n_q, n_k = do("size", q, 2), do("size", k, 2)
    sees_all = _returns_ones(mask_mod)
    if all(isinstance(size, int) and size >= NO_TILES for size in (block_q, block_k)):
        if sees_all and full_count is None:
            return None
        block_q, block_k = n_q, n_k
    # mask_mod is asked for each batch entry and head, whether or not the lists tell these apart
    asked = [bool(x.users) for x in mask_mod.graph.find_nodes(op="placeholder")[:2]]
    batch, heads = (do("size", q if ask else count, i) for i, ask in enumerate(asked))
    rows, columns = do(_tiles, n_q, block_q), do(_tiles, n_k, block_k)
    lists = (count, index, full_count, full_index, batch, heads, rows, columns, sees_all)
    with _fresh_sizes_of(q):
        listed = do(OPS.block_map.default, *lists)
    block_map, places = do(operator.getitem, listed, 0), do(operator.getitem, listed, 1)
    if sees_all:
        return block_map, do("new_empty", block_map, (0, block_q, block_k), dtype=torch.bool)
    at = do(positions_of, places, block_q, block_k, n_q, n_k)
    *indices, inside = (do(operator.getitem, at, i) for i in range(5))
    return block_map, do(torch.logical_and, inside, inlined(node, mask_mod, (*indices, *captured)))


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _fresh_sizes_of(x: fx.Node) -> AbstractContextManager[Any]:
    """Inside, sizes that depend on data are known to belong to example values, which nobody returns."""
    return fake_mode_of(x.meta["example_value"]).shape_env.ignore_fresh_unbacked_symbols()


def _returns_ones(body: fx.GraphModule) -> bool:
    """Whether a mask_mod is that of a block mask without one: it lets every query see every key."""
    return getattr(result_of(body), "target", None) in ("new_ones", torch.ones)
