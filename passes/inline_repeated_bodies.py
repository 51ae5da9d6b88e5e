"""Write out the bodies of ``torch.compiler.nested_compile_region``, where gradients are needed.

Before: ``y = invoke_subgraph(body, "name", x)``
After:  the nodes of ``body`` on ``x``
Needs:
    The graph as Dynamo gives it out.
Keeps:
    Calls in a graph without gradients, whose bodies are compiled once.
Numerics:
    The same. Inductor takes each output of a body for a tensor of its own, although what autograd keeps of it for the
    backward may be a view of an operand, and writes over that: gradients are off by their own size, with plain
    torch.compile as well (torch 2.13). To compile equal blocks once, use regions.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.torch_level import graphs_in
from jvpgraph.passes.context import Context

__all__ = ["inline_repeated_bodies"]

INVOKE = torch.ops.higher_order.invoke_subgraph


def inline_repeated_bodies(gm: fx.GraphModule, context: Context) -> None:
    """In gm and in the bodies of its higher-order ops."""
    inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return
    for part in graphs_in(gm):
        written_out: dict[fx.Node, str] = {}
        while calls := part.graph.find_nodes(op="call_function", target=INVOKE):
            for node in calls:
                written_out[node.args[0]] = str(node.args[0].target)
                _inline(part, node)
        for body_of in written_out:
            part.graph.erase_node(body_of)
        for name in set(written_out.values()):
            part.delete_submodule(name)


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    body_of, _, *operands = node.args
    body: Any = getattr(gm, str(body_of.target))  # type: ignore[union-attr]
    known: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    for inner in body.graph.nodes:
        if inner.op in ("placeholder", "output"):
            continue
        if inner.target == "item" and _is_number(given := known[inner.args[0]]):
            known[inner] = given  # to the body a number may have been a tensor
            continue
        with gm.graph.inserting_before(node):
            known[inner] = gm.graph.node_copy(inner, known.__getitem__)
        if inner.op == "get_attr":
            name = next(n for i in itertools.count() if not hasattr(gm, n := f"{inner.target}_{i}"))
            setattr(gm, name, getattr(body, inner.target))
            known[inner].target = name
    outs: Any = fx.node.map_arg(body.graph.output_node().args[0], known.__getitem__)
    for item in list(node.users):
        assert item.target is operator.getitem
        item.replace_all_uses_with(outs[item.args[1]], propagate_meta=False)
        gm.graph.erase_node(item)
    gm.graph.erase_node(node)


def _is_number(x: Any) -> bool:
    return isinstance(
        x.meta["example_value"] if isinstance(x, fx.Node) else x, (int, float, torch.SymInt, torch.SymFloat)
    )
