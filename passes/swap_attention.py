"""Swap scaled_dot_product_attention for our attention op, on the torch-level graph that Dynamo gives out.

Before: ``o = scaled_dot_product_attention(q, k, v, mask, is_causal=..., scale=...)``
After:  ``o, lse = jvpgraph::attention(q, k, v, mask, is_causal, scale)``
Needs:
    The graph before AOTAutograd, where a call is one node whichever kernel it chooses; ``example_value`` on
    nodes.
Keeps:
    Every other node; calls that no marked input reaches; calls that the op does not take, each with a reason.
Numerics:
    The same maths; on a CPU the same kernel.

What Dynamo has traced in place of other packages' attention (jvpgraph.foreign) is our op already, and reported here.
The bodies of higher-order ops (activation checkpointing, compiled regions) are graphs of their own, treated
likewise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from jvpgraph.graph.emit_attention import emit_attention, with_layout_of
from jvpgraph.graph.meta import source_line, traced_for
from jvpgraph.graph.torch_level import active_graphs, same_shape
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context

__all__ = ["swap_attention"]

SDPA = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def swap_attention(gm: fx.GraphModule, context: Context) -> None:
    """Replace active calls of scaled_dot_product_attention by jvpgraph::attention, in gm and its bodies."""
    for body, nodes in active_graphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=OPS.attention.default):
            if node in nodes and (function := traced_for(node)):
                context.report.swapped.append((node.name, source_line(node), function))
        for node in [n for n in body.graph.nodes if n.op == "call_function" and n.target in SDPA and n in nodes]:
            try:
                form = _swap(node)
            except ValueError as refusal:
                context.report.left.append((node.name, source_line(node), str(refusal)))
            else:
                context.report.swapped.append((node.name, source_line(node), form))


def _swap(node: fx.Node) -> str:
    """Swap one call, or raise ValueError with the reason why not."""
    given: dict[str, Any] = dict(zip(SDPA_ARGUMENTS, node.args)) | node.kwargs
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    dropout, is_causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
    scale = given.get("scale")
    if not isinstance(dropout, (int, float)) or dropout != 0:
        raise ValueError(f"dropout_p is {dropout}")
    if not isinstance(is_causal, bool):
        raise ValueError("is_causal is not known")
    if is_causal and mask is not None:
        raise ValueError("is_causal together with attn_mask, which torch refuses as well")
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError("scale is not a number")
    scale = None if scale is None else float(scale)
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise ValueError("its shape is not known")
    with node.graph.inserting_before(node):
        o = emit_attention(node, q, k, v, mask, is_causal, scale, value.dtype)
        if not same_shape(o.meta["example_value"], value):
            for unused in (o, *o.all_input_nodes):
                node.graph.erase_node(unused)
            raise ValueError(f"the result is {tuple(value.shape)}: some dims broadcast")
        o = with_layout_of(node, o)
    node.replace_all_uses_with(o)
    node.graph.erase_node(node)
    parts = ["scaled_dot_product_attention"]
    parts += ["mask"] * (mask is not None) + ["causal"] * is_causal
    return " ".join(parts)
