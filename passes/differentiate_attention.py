"""Let attention keep what the gradients of its tangents need."""

from __future__ import annotations

from torch import fx

from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind

__all__ = ["differentiate_attention"]


def differentiate_attention(gm: fx.GraphModule, context: Context) -> None:
    """Ask every attention_jvp for it.

    Before: ``attention_jvp(q, k, v, q_dot, ...)``
    After:  ``attention_jvp(q, k, v, q_dot, ..., differentiable_tangent=True)``
    """
    graph = gm.graph
    names = [argument.name for argument in OPS.attention_jvp.default._schema.arguments]
    for node in graph.find_nodes(op="call_function", target=OPS.attention_jvp.default):
        arguments = bind(OPS.attention_jvp.default, node.args, node.kwargs) | {"differentiable_tangent": True}
        node.args, node.kwargs = tuple(arguments[name] for name in names), {}
