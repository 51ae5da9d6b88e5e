"""Replace the copies and zeros that derived rules write by what has a gradient."""

from __future__ import annotations

from torch import fx

from jvpgraph.graph.recorder import Recorder
from jvpgraph.graph.writes import WRITES
from jvpgraph.passes.context import Context

__all__ = ["write_out_copies"]


def write_out_copies(gm: fx.GraphModule, context: Context) -> None:
    """Replace them.

    Before: ``abs_dot = copy(zeros, x)``
    After:  ``abs_dot = clone(expand(x))``
    """
    graph = gm.graph
    recorder = Recorder(graph)
    for op, instead in WRITES.items():
        for node in graph.find_nodes(op="call_function", target=op):
            with recorder.behind(node, node.meta, reuse=False):
                new = recorder.node_of(instead(*recorder.stand_ins(node.args[:2])))
            node.replace_all_uses_with(new, propagate_meta=False)
            graph.erase_node(node)
