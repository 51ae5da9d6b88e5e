"""What a legal graph is: one predicate and one message each, checked after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from jvpgraph.errors import VerifyError
from jvpgraph.linearize import TANGENT_META
from jvpgraph.markers import ARRIVED, MAKE_DUAL, TANGENT_OF

__all__ = ["INVARIANTS", "verify"]


def every_node_has_a_value(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.returns and "val" not in node.meta:
            yield node, "has no fake value"


def tangents_fit_their_primals(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    named = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        primal = named.get(node.meta.get(TANGENT_META, ""))
        value = primal.meta.get("val") if primal is not None else None
        if isinstance(value, Tensor):
            dot: Any = node.meta["val"]
            if dot.dtype != value.dtype or dot.dim() != value.dim():
                yield (
                    node,
                    f"is {dot.dtype} of {dot.dim()} dims, its primal {value.dtype} of {value.dim()} dims",
                )


def no_marker_is_left(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for target in (ARRIVED, MAKE_DUAL, TANGENT_OF):
        for node in graph.find_nodes(op="call_function", target=target):
            yield node, "is a marker that was not linearised"


def no_tangent_is_written(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            target = node.args[0] if node.args else None
            if isinstance(target, fx.Node) and target.meta.get(TANGENT_META):
                yield node, "writes into a tangent"


INVARIANTS: tuple[Callable[[fx.Graph], Iterator[tuple[fx.Node, str]]], ...] = (
    every_node_has_a_value,
    tangents_fit_their_primals,
    no_marker_is_left,
    no_tangent_is_written,
)


def verify(graph: fx.Graph, after: str) -> None:
    """Check all invariants.

    Raises:
        VerifyError: names the pass ``after`` which the graph is illegal, the node, and what is wrong.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"after pass {after}: {error}") from error
    for invariant in INVARIANTS:
        for node, message in invariant(graph):
            raise VerifyError(f"after pass {after}: {node.name} ({node.target}) {message}")
