"""Refuse tangents that use what PyTorch does not differentiate."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.graph.meta import INSERTED_META, source_line
from jvpgraph.graph.recorder import value_of
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import has_tangent

__all__ = ["check_gradients"]

IN_A_BODY = "a higher-order op, whose tangent has no gradients"
PLAIN = "Write it in plain Python, or call without differentiable_tangent."


def check_gradients(gm: fx.GraphModule, context: Context) -> None:
    """Refuse a graph in which a tangent uses an output that PyTorch says has no gradient, though it depends on inputs,
    or comes out of a higher-order op: nobody has looked into its body.

    Raises:
        UnsupportedOp: with every such output.
    """
    refused = []
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        (source,) = node.all_input_nodes
        used = any(INSERTED_META in user.meta for user in node.users)
        if isinstance(source.target, HigherOrderOperator):
            if used or INSERTED_META in node.meta:
                refused.append(
                    UnsupportedNode(str(source.target), source.name, (), source_line(source), IN_A_BODY, PLAIN)
                )
        elif used and has_tangent(value_of(node)) and not _has_gradient(source, node.args[1]):
            reason = f"the tangent depends on its output {node.args[1]}, which PyTorch does not differentiate"
            refused.append(UnsupportedNode(str(source.target), source.name, (), source_line(source), reason))
    if refused:
        raise UnsupportedOp(refused)


def _has_gradient(node: fx.Node, index: Any) -> bool:
    """Whether autograd differentiates an output of node, found out on stand-ins."""

    def stand_in(x: fx.Node) -> Any:
        value = value_of(x)
        return torch.empty_like(value, requires_grad=has_tangent(value)) if isinstance(value, Tensor) else value

    fake_mode = value_of(node)[index].fake_mode
    with fake_mode, torch.enable_grad():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), stand_in)
        return node.target(*args, **kwargs)[index].requires_grad  # type: ignore[operator]
