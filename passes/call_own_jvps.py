"""Let an autograd.Function with a jvp of its own provide its tangent, on the torch-level graph from Dynamo.

Before: ``y = Function(x)``, one node, see :mod:`jvpgraph.autograd_function`
After:  ``y = make_dual(Function(x), Function.jvp(tangent_of(x)))``, one node for AOTAutograd to write out
Needs:
    The graph before AOTAutograd.
Keeps:
    Every other node, and calls that no marked input reaches.
Numerics:
    The same value and gradients.
"""

from __future__ import annotations

from torch import fx

from jvpgraph.autograd_function import OWN_JVP, call_own_jvp
from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import active_graphs, wants_gradients_of_tangents
from jvpgraph.passes.context import Context

__all__ = ["call_own_jvps"]


def call_own_jvps(gm: fx.GraphModule, context: Context) -> None:
    """Replace what the active calls in gm, and in the bodies of its higher-order ops, run.

    Raises:
        UnsupportedOp: the tangent is to have gradients, for which the Function would need a backward of its jvp.
    """
    calls = [
        node
        for body, active in active_graphs(gm)
        for node in body.graph.nodes
        if node in active and node.op == "call_function" and hasattr(node.target, OWN_JVP)
    ]
    if calls and wants_gradients_of_tangents(gm):
        reason = "a gradient of the tangent would need a backward of this autograd.Function's own jvp"
        raise UnsupportedOp(
            [UnsupportedNode("autograd.Function", node.name, (), source_line(node), reason) for node in calls]
        )
    for node in calls:
        call_own_jvp(node)
