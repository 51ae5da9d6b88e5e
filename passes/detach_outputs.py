"""Keep outputs without gradients apart from those with, on the torch-level graph that Dynamo gives out.

Before: ``return y.detach(), y.view(-1)``
After:  ``return y.detach().clone(), y.view(-1)``
Before: ``with torch.no_grad(): v = y.view(-1)``;  ``return v``
After:  ``return v.detach()``
Needs:
    ``example_value`` on nodes; mark_stop_gradients has run, as these detaches stop no tangent.
Keeps:
    Tangents, which are asked of the outputs as they were; what shares memory with an input that is not marked.
Numerics:
    The same. Inductor returns one tensor for both of the first, and AOTAutograd tells autograd that it is not
    differentiable: the gradient of the other is lost. An output that is a view AOTAutograd makes anew from what it
    views, and then with gradients, where PyTorch lets none arrive. (Both as in plain torch.compile.)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from jvpgraph.graph.strides import memory_of
from jvpgraph.graph.torch_level import emit, has_marker
from jvpgraph.passes.context import Context

__all__ = ["detach_outputs"]


def detach_outputs(gm: fx.GraphModule, context: Context) -> None:
    """Insert the detaches and copies. Without a marked input, gm is left alone."""
    if not has_marker(gm):
        return
    output = gm.graph.output_node()
    values = {x: v for x in output.all_input_nodes if isinstance(v := x.meta.get("example_value"), FakeTensor)}
    with_gradients = {memory_of(v) for v in values.values() if v.requires_grad and not _is_constant_view(v)}
    with_gradients -= {memory_of(x.meta.get("example_value")) for x in gm.graph.find_nodes(op="placeholder")}
    for node, value in values.items():
        constant = node
        with gm.graph.inserting_before(output):
            if _is_constant_view(value):
                constant = emit(constant, torch.detach, constant)
            if (constant is not node or not value.requires_grad) and memory_of(value) in with_gradients:
                constant = emit(constant, torch.clone, constant)
        if constant is not node:
            output.replace_input_with(node, constant)


def _is_constant_view(x: Tensor) -> bool:
    """Whether it is a view made while gradients were off: it requires some, as what it views does, without history."""
    return x.requires_grad and x._is_view() and x.grad_fn is None
