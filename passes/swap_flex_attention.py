"""Swap flex_attention for our attention op with a block mask, on the torch-level graph that Dynamo gives out.

Before: ``out, lse, _ = flex_attention(q, k, v, score_mod, block_mask, scale, ...)``
After:  ``map, places = jvpgraph::block_map(kv_num_blocks, kv_indices, ...)``, the nodes of mask_mod on these places,
        ``o, _ = jvpgraph::attention(q, k, v, None, False, scale, block_map=map, partial_blocks=...)``
Needs:
    A score_mod that changes nothing, and only ``out`` used: otherwise the call is left, with the reason.
Keeps:
    Every other node; calls that no marked input reaches.
Numerics:
    The same maths, and the same tiles. The bytes of a tile are made where mask_mod decides on it; how many these are is
    known when the graph runs, which on a GPU waits for it, once for each mask.

A block mask lists, for each block of queries, the blocks of keys that are seen whole (``full``), and those that its
mask_mod decides on. mask_mod is a graph of 0-dim indices; on indices that broadcast it gives the bytes of all tiles.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from jvpgraph.graph.emit_attention import emit_attention
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import active_graphs, emit, fake_mode_of
from jvpgraph.kernels.block_mask import positions_of
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context

__all__ = ["swap_flex_attention"]

FLEX = torch.ops.higher_order.flex_attention
NO_TILES = 1 << 20  # flex attention without a block mask has one tile of 2^30 queries and keys
FORMS = {True: "flex_attention with a block mask", False: "flex_attention"}


def swap_flex_attention(gm: fx.GraphModule, context: Context) -> None:
    """Replace active calls of flex_attention by jvpgraph::attention, in gm and the bodies of its higher-order ops."""
    for body, nodes in active_graphs(gm):
        for node in [n for n in body.graph.find_nodes(op="call_function", target=FLEX) if n in nodes]:
            try:
                has_mask = _swap(body, node)
            except ValueError as refusal:
                context.report.left.append((node.name, source_line(node), str(refusal)))
            else:
                context.report.swapped.append((node.name, source_line(node), FORMS[has_mask]))


def _swap(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Swap one call, or raise ValueError with the reason why not. Whether it has a mask."""
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
    mask_mod = getattr(gm, str(block_mask[-1].target))  # type: ignore[index, union-attr]
    _check_is_pointwise(mask_mod, captured)
    with node.graph.inserting_before(node):
        mask = _block_mask(node, q, k, block_mask, mask_mod, captured)  # type: ignore[arg-type]
        o = emit_attention(node, q, k, v, None, False, float(scale), value.dtype, mask)  # type: ignore[arg-type]
    outs[0].replace_all_uses_with(o)
    for unused in (*outs.values(), node):
        node.graph.erase_node(unused)
    return mask is not None


def _known(scale: Any) -> Any:
    """A number, also where Dynamo computed it from a size that turned out not to be symbolic."""
    value = scale.meta.get("example_value") if isinstance(scale, fx.Node) else scale
    expression = value.node.expr if isinstance(value, torch.SymFloat) else None
    return float(expression) if expression is not None and expression.is_number else value


def _is_identity(mod: fx.GraphModule) -> bool:
    score, *_ = mod.graph.find_nodes(op="placeholder")
    return mod.graph.output_node().args[0] in (score, (score,))


def _block_mask(
    node: fx.Node, q: fx.Node, k: fx.Node, block_mask: Any, mask_mod: fx.GraphModule, captured: Any
) -> tuple[fx.Node, fx.Node] | None:
    """map and partial of jvpgraph.kernels.block_mask.BlockMask; None where all is seen."""

    def do(target: Any, *args: Any, **kwargs: Any) -> Any:
        return emit(node, target, *args, **kwargs)

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
    return block_map, do(torch.logical_and, inside, _inlined(node, mask_mod, (*indices, *captured)))


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _fresh_sizes_of(x: fx.Node) -> AbstractContextManager[Any]:
    """Inside, sizes that depend on data are known to belong to example values, which nobody returns."""
    return fake_mode_of(x.meta["example_value"]).shape_env.ignore_fresh_unbacked_symbols()


def _returns_ones(body: fx.GraphModule) -> bool:
    """Whether a mask_mod is that of a block mask without one: it lets every query see every key."""
    result = body.graph.output_node().args[0]
    (result,) = result if isinstance(result, (tuple, list)) else (result,)
    return isinstance(result, fx.Node) and result.target in ("new_ones", torch.ones)


def _check_is_pointwise(body: fx.GraphModule, captured: Any) -> None:
    """Raise ValueError unless each node that depends on an index is one of numbers, so that its ops broadcast. A row of
    a table, or a sum, would be another on tensors of indices."""
    placeholders = body.graph.find_nodes(op="placeholder")
    fake_mode = fake_mode_of(placeholders[0].meta["example_value"])
    known = dict(zip(placeholders[4:], (x.meta["example_value"] for x in captured)))
    with fake_mode, torch.no_grad():
        shapes = ((2, 1, 1, 1), (3, 1, 1), (5, 1), (7,))
        known |= {p: torch.zeros(s, dtype=torch.int32, device=_device_of(p)) for p, s in zip(placeholders, shapes)}
        of_index = set(placeholders[:4])
        for inner in body.graph.nodes:
            if inner.op not in ("call_function", "call_method"):
                continue
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), known.__getitem__)
            run = getattr(args[0], inner.target) if inner.op == "call_method" else inner.target
            given = [x for x in inner.all_input_nodes if x in of_index]
            try:
                known[inner] = run(*(args[1:] if inner.op == "call_method" else args), **kwargs)
                pointwise = not given or known[inner].shape in (
                    torch.broadcast_shapes(*(known[x].shape for x in given)),
                    torch.Size(()) if inner.target in ("new_ones", "new_zeros", "new_full", "new_tensor") else None,
                )
            except Exception as error:
                raise ValueError(f"flex_attention whose mask_mod has {inner.name}, {error}") from error
            if not pointwise:
                raise ValueError(
                    f"flex_attention whose mask_mod has {inner.name} ({inner.target}), which is not pointwise in the "
                    "indices: index tables by all of their dims at once, as in table[q, k]"
                )
            if given:
                of_index.add(inner)


def _device_of(placeholder: fx.Node) -> torch.device:
    return placeholder.meta["example_value"].device


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
