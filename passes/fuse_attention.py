"""Compute attention and its tangent by one kernel."""

from __future__ import annotations

from typing import Any

from torch import fx

from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind

__all__ = ["fuse_attention"]


def fuse_attention(gm: fx.GraphModule, context: Context) -> None:
    """Let the primal outputs come from the ``attention_jvp`` that computes the tangent.

    Before: ``o, lse = attention(q, k, v);  _, _, o_dot, lse_dot = attention_jvp(q, k, v, q_dot, ...)``
    After:  ``o, lse, o_dot, lse_dot = attention_jvp(q, k, v, q_dot, ...)``

    Needs linearize. Keeps every other node, the backward of attention included, which goes on using o and lse.
    Values of o and lse change by rounding only. The fused node carries no recomputation tag: activation
    checkpointing keeps o and lse rather than dragging the tangents into the backward.
    """
    graph = gm.graph
    for fused in graph.find_nodes(op="call_function", target=OPS.attention_jvp.default):
        both = bind(OPS.attention_jvp.default, fused.args, fused.kwargs)
        plain = next((n for n in both["q"].users if n.target is OPS.attention.default and _computes(n, both)), None)
        if plain is None:
            continue
        for item in list(plain.users):
            item.replace_input_with(plain, fused)
            item.meta.pop("recompute", None)
            fused.append(item)
        graph.erase_node(plain)
        context.report.fused += 1


def _computes(plain: fx.Node, arguments: dict[str, Any]) -> bool:
    """Whether ``plain`` is the primal half of an attention_jvp with these arguments."""
    own = bind(OPS.attention.default, plain.args, plain.kwargs)
    return all(arguments[name] == value for name, value in own.items())
