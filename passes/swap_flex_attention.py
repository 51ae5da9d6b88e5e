"""Swap flex_attention for our attention op with a dense mask, on the torch-level graph that Dynamo gives out.

Before: ``out, lse, _ = flex_attention(q, k, v, score_mod, block_mask, scale, ...)``
After:  ``o, _ = jvpgraph::attention(q, k, v, mask, False, scale)``
Needs:
    A score_mod that changes nothing, and only ``out`` used: otherwise the call is left, with the reason.
Keeps:
    Every other node; calls that no marked input reaches.
Numerics:
    The same maths. The mask is boolean [B | 1, H | 1, Lq, Lkv]: a byte for each pair of a query and a key, which flex
    attention does without, and blocks that it would skip are computed.

A block mask lists, for each block of queries, the blocks of keys that are seen whole (``full``), and those that its
mask_mod decides on. mask_mod is a graph of 0-dim indices; on indices that broadcast it gives the mask as a whole.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.emit_attention import emit_attention
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import active_graphs, emit
from jvpgraph.passes.context import Context

__all__ = ["swap_flex_attention"]

FLEX = torch.ops.higher_order.flex_attention


def swap_flex_attention(gm: fx.GraphModule, context: Context) -> None:
    """Replace active calls of flex_attention by jvpgraph::attention, in gm and the bodies of its higher-order ops."""
    for body, nodes in active_graphs(gm):
        for node in [n for n in body.graph.find_nodes(op="call_function", target=FLEX) if n in nodes]:
            try:
                _swap(body, node)
            except ValueError as refusal:
                context.report.left.append((node.name, source_line(node), str(refusal)))
            else:
                context.report.swapped.append((node.name, source_line(node), "flex_attention, with a dense mask"))


def _swap(gm: fx.GraphModule, node: fx.Node) -> None:
    q, k, v, score_mod, block_mask, scale, _, _, captured = node.args
    outs = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(outs) != len(node.users) or any(out.users for index, out in outs.items() if index != 0):
        raise ValueError("flex_attention whose logsumexp or maximum is used")
    if not _is_identity(getattr(gm, str(score_mod.target))):  # type: ignore[union-attr]
        raise ValueError("flex_attention with a score_mod")
    scale = _known(scale)
    if not isinstance(scale, (int, float)):
        raise ValueError("scale is not a number")
    value = outs[0].meta["example_value"]
    with node.graph.inserting_before(node):
        mask = _dense(gm, node, q, k, block_mask, captured)  # type: ignore[arg-type]
        o = emit_attention(node, q, k, v, mask, False, float(scale), value.dtype)  # type: ignore[arg-type]
    outs[0].replace_all_uses_with(o)
    for unused in (*outs.values(), node):
        node.graph.erase_node(unused)


def _known(scale: Any) -> Any:
    """A number, also where Dynamo computed it from a size that turned out not to be symbolic."""
    value = scale.meta.get("example_value") if isinstance(scale, fx.Node) else scale
    expression = value.node.expr if isinstance(value, torch.SymFloat) else None
    return float(expression) if expression is not None and expression.is_number else value


def _is_identity(mod: fx.GraphModule) -> bool:
    score, *_ = mod.graph.find_nodes(op="placeholder")
    return mod.graph.output_node().args[0] in (score, (score,))


def _dense(gm: fx.GraphModule, node: fx.Node, q: fx.Node, k: fx.Node, block_mask: Any, captured: Any) -> fx.Node:
    """The mask of a block mask, [B | 1, H | 1, Lq, Lkv]."""

    def do(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(node, target, *args, **kwargs)

    _, _, count, index, full_count, full_index, *_, block_q, block_k, mask_mod = block_mask
    device = q.meta["example_value"].device
    n_q, n_k = do("size", q, 2), do("size", k, 2)

    def positions(n: Any, *ones: int) -> fx.Node:
        """0, 1, ... of a dim of n, with dims of size one behind it."""
        return do("view", do(_arange_like, q, n, device), -1, *ones)

    def seen(count: fx.Node, index: fx.Node) -> fx.Node:
        """[B | 1, H | 1, Lq, Lkv]: the pairs in the blocks of keys that each block of queries lists."""
        listed = do(_listed, count, index, do(_blocks, n_k, block_k))
        of_q, of_k = (do(operator.floordiv, positions(n), size) for n, size in ((n_q, block_q), (n_k, block_k)))
        return do(torch.index_select, do(torch.index_select, listed, -2, of_q), -1, of_k)

    mask = seen(count, index)
    body = getattr(gm, mask_mod.target)
    batch, heads = do("size", q, 0), do("size", q, 1)
    indices = (positions(batch, 1, 1, 1), positions(heads, 1, 1), positions(n_q, 1), positions(n_k))
    mask = do(operator.and_, mask, _inlined(node, body, (*indices, *captured)))
    if full_count is not None:
        mask = do(operator.or_, mask, seen(full_count, full_index))
    return mask


def _arange_like(x: Tensor, n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device, dtype=torch.int32)


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _listed(count: Tensor, index: Tensor, blocks: int) -> Tensor:
    """[B, H, blocks of queries, blocks of keys]: those among the first `count` of each row of `index`."""
    there = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    dense = torch.zeros(*index.shape[:-1], blocks, device=index.device, dtype=torch.int32)
    return dense.scatter_add(-1, index.long(), there.int()) > 0


def _inlined(node: fx.Node, body: fx.GraphModule, arguments: tuple[Any, ...]) -> fx.Node:
    """The nodes of body, with arguments in place of its placeholders."""
    known = dict(zip(body.graph.find_nodes(op="placeholder"), arguments))
    for inner in body.graph.nodes:
        if inner.op == "output":
            (result,) = inner.args[0] if isinstance(inner.args[0], (tuple, list)) else inner.args
            return known[result]
        if inner.op == "placeholder":
            continue
        if inner.op not in ("call_function", "call_method"):
            raise ValueError(f"the mask_mod of a flex_attention has a {inner.op} in its graph")
        args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), known.__getitem__)
        known[inner] = emit(node, inner.target, *args, **kwargs)
    raise AssertionError("a graph without an output")
