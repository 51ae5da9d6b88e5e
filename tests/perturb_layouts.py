"""A debugging pass: other strides with the same numbers, which must change nothing.

Before: ``o, lse = attention(q, k, v);  dq = attention_backward(g, q, k, v, o, lse)``
After:  ``o, lse = attention(odd(q), odd(k), odd(v));  dq = attention_backward(odd(g), odd(q), ..., odd(o), odd(lse))``

``odd`` copies into another layout: dims in reverse order, every second element, or rows with room behind them. It is
put on every tensor that an op of the package takes, and between every node of the forward and the nodes of the
backward that use it. Inductor chooses such layouts by itself; here each run is made to meet them.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.passes.context import Context
from jvpgraph.passes.decompose import decompose
from jvpgraph.passes.pipeline import AFTER_AUTOGRAD, ON_ATEN_GRAPH, Stage

BACKEND = importlib.import_module("jvpgraph.dynamo_backend")
__all__ = ["odd", "perturb_layouts", "perturbed"]

# Kernels of ATen that take layouts for granted without looking. Whoever calls them sees to it: Inductor of attention by
# constraints of its own, autograd's formulas of norms, whose statistics are contiguous as the forward made them and
# whose other operands are made so by ops in the graph. Inductor takes norms apart.
LEFT_ALONE = (
    *("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    *("aten::native_layer_norm_backward", "aten::native_group_norm", "aten::_weight_norm_interface_backward"),
)


def odd(x: Tensor, kind: int) -> Tensor:
    """The same numbers in other strides."""
    if not x.dim():
        return x.clone()
    reverse = list(reversed(range(x.dim())))
    if kind % 3 == 0:
        return x.permute(reverse).clone(memory_format=torch.contiguous_format).permute(reverse)
    if kind % 3 == 1:
        return torch.stack([x, torch.ones_like(x)], -1).select(-1, 0)
    return torch.cat([x, torch.ones_like(x)], -1).narrow(-1, 0, x.shape[-1])


def perturb_layouts(gm: fx.GraphModule, context: Context) -> None:
    """Insert copies in other layouts: see the module."""
    graph = gm.graph
    backward = _backward(graph)
    recorder = Recorder(graph)
    for i, node in enumerate(list(graph.nodes)):
        if node.op == "output" or not isinstance(node.meta.get("val"), Tensor) or _may_be_empty(value_of(node)):
            continue
        crosses = node not in backward
        users = [user for user in node.users if _takes_any_layout(user) or (crosses and user in backward)]
        users = [user for user in users if _op(user) and not str(user.target._schema.name).startswith(LEFT_ALONE)]
        if users:
            with recorder.behind(node, reuse=False):
                copy = recorder.node_of(odd(recorder.stand_in(node), i))
            for user in users:
                user.replace_input_with(node, copy)


def _may_be_empty(x: Tensor) -> bool:
    return not statically_known_true(x.numel() > 0)


def _op(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target._schema.is_mutable


def _takes_any_layout(node: fx.Node) -> bool:
    return _op(node) and node.target.namespace == "jvpgraph"


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the gradients of the outputs."""
    found = {node for node in graph.find_nodes(op="placeholder") if node.name.startswith("tangents_")}
    for node in graph.nodes:
        if any(x in found for x in node.all_input_nodes) and (
            isinstance(node.target, OpOverload) or node.target is operator.getitem
        ):
            found.add(node)
    return found


@contextmanager
def perturbed() -> Iterator[None]:
    """Whatever is compiled in this context goes through the pass, last before the compiler's own decompositions."""

    def with_it(stage: Stage) -> Stage:
        at = stage.steps.index(decompose)
        return replace(stage, steps=(*stage.steps[:at], perturb_layouts, *stage.steps[at:]))

    with (
        patch.object(BACKEND, "ON_ATEN_GRAPH", with_it(ON_ATEN_GRAPH)),
        patch.object(BACKEND, "AFTER_AUTOGRAD", with_it(AFTER_AUTOGRAD)),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        torch._dynamo.reset()  # graphs from before would be taken
        yield
