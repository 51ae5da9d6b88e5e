"""Outputs that the compiler made one tensor become two again, after its own passes on the joint graph.

Before: ``y = sin(x);  return y, y``, where the model has ``return y.detach() + torch.zeros(3), y``
After:  ``return clone(y), y``
Needs:
    :func:`note_outputs` has run before the compiler's passes, and ``val`` on nodes.
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
from torch import Tensor, fx

__all__ = ["keep_outputs_apart", "note_outputs"]

NOTED = "jvpgraph_memory_of_outputs"


def note_outputs(graph: fx.Graph) -> None:
    """Note on the output node which outputs share memory, for later."""
    output = graph.output_node()
    output.meta[NOTED] = _firsts(output)


def keep_outputs_apart(graph: fx.Graph) -> None:
    """Copy every output that shares memory with something it did not share memory with when it was noted."""
    output = graph.output_node()
    before, outs = output.meta.get(NOTED), list(output.args[0])  # type: ignore[arg-type]
    if before is None or len(before) != len(outs):
        return
    now = _firsts(output)
    for i, node in enumerate(outs):
        if now[i] == before[i] or not isinstance(node, fx.Node):
            continue
        with graph.inserting_before(output):
            outs[i] = graph.call_function(torch.ops.aten.clone.default, (node,))
        value = node.meta["val"]
        with value.fake_mode:
            outs[i].meta = {**node.meta, "val": value.clone()}
    output.args = (tuple(outs), *output.args[1:])


def _firsts(output: fx.Node) -> list[Any]:
    """Per output what has its memory: an input, by name, or the first output that does."""
    owner: dict[Any, Any] = {_memory(node): node.name for node in output.graph.find_nodes(op="placeholder")}
    return [owner.setdefault(_memory(x) or i, i) for i, x in enumerate(output.args[0])]  # type: ignore[arg-type]


def _memory(node: Any) -> Any:
    """None where that is not known; a storage's address is no small number, as positions are."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    dense = isinstance(value, Tensor) and hasattr(value, "fake_mode") and value.layout is torch.strided
    return value.untyped_storage()._cdata if dense and isinstance(value, Tensor) else None
