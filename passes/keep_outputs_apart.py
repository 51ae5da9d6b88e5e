"""Separate outputs that the compiler has merged into one tensor, after its own passes on the joint graph.

Before: ``y = sin(x);  return y, y``, where the model has ``return y.detach() + torch.zeros(3), y``
After:  ``return clone(y), y``
Needs:
    note_outputs has run before the compiler's passes; ``val`` on nodes.
Keeps:
    Outputs that shared memory with each other, or with an input, from the start.
Numerics:
    The same. Of outputs that are one tensor AOTAutograd tells autograd once whether it is differentiable: where one of
    them is not, the gradient of the other is lost. And x for ``x + torch.zeros(3)`` would be written to with x. (Both
    as in plain torch.compile.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from jvpgraph.graph.meta import OUTPUTS_META
from jvpgraph.graph.outputs import owners_of_outputs
from jvpgraph.passes.context import Context

__all__ = ["keep_outputs_apart"]


def keep_outputs_apart(gm: fx.GraphModule, context: Context) -> None:
    """Copy every output that shares memory with something it did not share memory with when it was noted."""
    output = gm.graph.output_node()
    before = output.meta.get(OUTPUTS_META)
    if before is None:
        return
    outs = list(output.args[0])  # type: ignore[arg-type]
    if len(before) != len(outs):
        return
    now, copies = owners_of_outputs(output), dict[tuple[fx.Node, Any], fx.Node]()
    for i, node in enumerate(outs):
        if now[i] != before[i] and isinstance(node, fx.Node):
            key = node, before[i]  # what was one stays one
            outs[i] = copies[key] if key in copies else copies.setdefault(key, _copied(gm.graph, node))
    output.args = (tuple(outs),)


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(graph.output_node()):
        copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    value = node.meta["val"]
    with value.fake_mode:
        copy.meta = {**node.meta, "val": value.clone()}
    return copy
