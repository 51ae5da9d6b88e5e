"""Remove tangents that nobody reads."""

from __future__ import annotations

from torch import fx

from jvpgraph.graph.meta import INSERTED_META
from jvpgraph.passes.context import Context

__all__ = ["drop_dead_tangents"]


def drop_dead_tangents(gm: fx.GraphModule, context: Context) -> None:
    """Erase inserted nodes without users, backwards, until none is left.

    Before: ``sin_dot = cos * x_dot`` with no reader
    After:  nothing

    Needs linearize. Touches only nodes that linearize inserted; numerics stay.
    """
    graph = gm.graph
    for node in reversed(graph.nodes):
        if INSERTED_META in node.meta and not node.users:
            graph.erase_node(node)
