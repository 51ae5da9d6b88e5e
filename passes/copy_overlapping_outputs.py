"""Copy outputs whose elements share memory, on the torch-level graph that Dynamo gives out.

Before: ``return x.unfold(0, 2, 1)``
After:  ``return x.unfold(0, 2, 1).clone()``
Needs:
    ``example_value`` on nodes.
Keeps:
    Every other output, also one that shares memory with an input that is not marked.
Numerics:
    The same. AOTAutograd brings the gradient of an output into the strides of the output, where elements that share
    memory overwrite each other (as in plain torch.compile, for views of what the model computed).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from jvpgraph.graph.strides import memory_of, overlaps
from jvpgraph.graph.torch_level import emit, has_marker
from jvpgraph.passes.context import Context

__all__ = ["copy_overlapping_outputs"]


def copy_overlapping_outputs(gm: fx.GraphModule, context: Context) -> None:
    """Insert the copies. Without a marked input, gm is left alone."""
    if not has_marker(gm):
        return
    output = gm.graph.output_node()
    inputs = {memory_of(node.meta.get("example_value")) for node in gm.graph.find_nodes(op="placeholder")}
    for node in output.all_input_nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.requires_grad and _overlaps(value) and memory_of(value) not in inputs:
            with gm.graph.inserting_before(output):
                copy = emit(node, torch.clone, node, memory_format=torch.contiguous_format)
            output.replace_input_with(node, copy)


def _overlaps(x: Tensor) -> bool:
    """For symbolic sizes AOTAutograd makes gradients contiguous."""
    return all(isinstance(n, int) for n in (*x.shape, *x.stride())) and x.numel() > 0 and overlaps(x)
