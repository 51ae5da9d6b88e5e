"""What a legal graph is at each stage: one predicate and one message each, checked after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from jvpgraph.errors import VerifyError
from jvpgraph.graph.meta import TANGENT_META
from jvpgraph.graph.torch_level import graphs_in
from jvpgraph.markers import ARRIVED, MAKE_DUAL, TANGENT_OF
from jvpgraph.precision import widened

__all__ = ["ATEN", "LOWERED", "TORCH_LEVEL", "Invariant", "verify"]

Invariant = Callable[[fx.Graph], Iterator[tuple[fx.Node, str]]]


def every_op_has_an_example(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Dynamo gives every call one that returns a tensor; what a step inserts has to have one too."""
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.returns and "example_value" not in node.meta:
            yield node, "has no example value"


def marked_inputs_fit_their_tangents(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.find_nodes(op="call_function", target=MAKE_DUAL):
        x, x_dot = (given.meta.get("example_value") for given in node.args[:2])
        if isinstance(x, Tensor) and isinstance(x_dot, Tensor) and not _fits(x, x_dot):
            yield node, f"marks {x.dtype} of {x.dim()} dims with a tangent that is {x_dot.dtype} of {x_dot.dim()} dims"


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
            if not _fits(value, dot):
                yield (
                    node,
                    f"is {dot.dtype} of {dot.dim()} dims, its primal {value.dtype} of {value.dim()} dims",
                )


def _fits(value: Tensor, dot: Tensor) -> bool:
    """Of as many dims, and in the dtype of the primal; or in float32, where that has half precision."""
    return dot.dim() == value.dim() and dot.dtype in (value.dtype, widened(value.dtype))


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


TORCH_LEVEL: tuple[Invariant, ...] = (every_op_has_an_example, marked_inputs_fit_their_tangents)
LOWERED: tuple[Invariant, ...] = (every_node_has_a_value, tangents_fit_their_primals, no_tangent_is_written)
ATEN: tuple[Invariant, ...] = (*LOWERED, no_marker_is_left)


def verify(gm: fx.GraphModule, invariants: Sequence[Invariant], after: str) -> None:
    """Check gm, and the bodies of its higher-order ops.

    Raises:
        VerifyError: names the step ``after`` which the graph is illegal, the node, and what is wrong.
    """
    for graph in (module.graph for module in graphs_in(gm)):
        try:
            graph.lint()
        except RuntimeError as error:
            raise VerifyError(f"after pass {after}: {error}") from error
        for invariant in invariants:
            for node, message in invariant(graph):
                raise VerifyError(f"after pass {after}: {node.name} ({node.target}) {message}")
