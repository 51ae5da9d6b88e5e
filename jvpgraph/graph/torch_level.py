"""Reading and editing the torch-level graphs that Dynamo gives out.

Their nodes call functions and methods of torch as the user wrote them, with ``example_value`` in place of ``val``. The
bodies of higher-order ops (activation checkpointing, compiled regions) are graphs of their own.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from jvpgraph.graph.meta import INHERITED_META
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.rules.apply import bind

__all__ = [
    "STOPS",
    "active_graphs",
    "active_nodes",
    "bodies",
    "emit",
    "fake_mode_of",
    "graphs_in",
    "has_marker",
    "inherit",
    "inputs_of_body",
    "is_in_place",
    "is_of_numpy",
    "same_shape",
    "wants_gradients_of_tangents",
]

GET_DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]  # what Dynamo makes of x.data
STOPS: tuple[Any, ...] = (
    *("detach", "detach_", torch.detach, torch.detach_, torch.Tensor.detach, torch.Tensor.detach_),
    *("new_tensor", torch.Tensor.new_tensor, torch.tensor, torch.ops.aten.detach.default, GET_DATA),
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
)
IN_PLACE_OPERATORS = (
    *(operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul),
)
IN_PLACE_OF_NUMPY = {
    f"wrapped_{name}"
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"),
        *("__setitem__", "fill", "sort", "partition", "put", "itemset", "copyto", "place", "putmask", "fill_diagonal"),
    )
}
NUMPY = tuple(
    value for name, value in vars(torch._dynamo.utils).items() if name.startswith("numpy_") and "wrapper" in name
)


def wants_gradients_of_tangents(gm: fx.GraphModule) -> bool:
    """Whether a ``tangent_of`` in gm is to be differentiable."""
    asked = gm.graph.find_nodes(op="call_function", target=TANGENT_OF)
    return any(bind(TANGENT_OF, node.args, node.kwargs)["differentiable"] for node in asked)


# -------------------------------------------------------------------------------------------------- activity


def active_nodes(gm: fx.GraphModule, inputs: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes that depend on a marked input (jvpgraph::make_dual), or on one of `inputs`.

    Mutation counts: what is written to becomes active, with the tensors it is a view of. This errs on the
    side of active.
    """
    seeds = [n for n in gm.graph.nodes if _is_marker(n) or any(has_marker(m) for _, m in bodies(gm, n))]
    pending, found = [*seeds, *(inputs or ())], set()
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        pending += node.users
        if is_in_place(node):
            target = node.args[0] if node.args else None
            while isinstance(target, fx.Node):
                pending.append(target)
                may_be_view = target.op == "call_method" or target.target in (operator.getitem, getattr)
                may_be_view &= target.target != "detach"  # has no tangent to hand on: see mark_stop_gradients
                target = target.args[0] if may_be_view and target.args else None
    return found


def active_graphs(
    gm: fx.GraphModule, active: set[fx.Node] | None = None
) -> Iterator[tuple[fx.GraphModule, set[fx.Node]]]:
    """gm and every body that an active higher-order op in it runs, each once, with its active nodes."""
    active = active_nodes(gm) if active is None else active
    yield gm, active
    inputs: dict[fx.GraphModule, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node not in active:
            continue
        for index, body in bodies(gm, node):
            inputs.setdefault(body, set()).update(inputs_of_body(node, index, body, active))
    for body, marked in inputs.items():
        yield from active_graphs(body, active_nodes(body, marked))


def inputs_of_body(node: fx.Node, index: int, body: fx.GraphModule, given: set[fx.Node]) -> set[fx.Node]:
    """The placeholders of a body, the argument at index of node, for which node passes one of `given`."""
    placeholders = body.graph.find_nodes(op="placeholder")
    operands = [x for x in _leaves(node.args[index + 1 :]) if not isinstance(x, str)]
    if len(operands) != len(placeholders):  # not known which is which: all of them
        return set(placeholders) if not given.isdisjoint(node.all_input_nodes) else set()
    return {p for p, x in zip(placeholders, operands) if x in given}


def bodies(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[int, fx.GraphModule]]:
    """(position, graph) of each argument of node that is itself a graph."""
    if node.op != "call_function":
        return
    for index, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = getattr(gm, str(arg.target), None)
            if isinstance(body, fx.GraphModule):
                yield index, body


def has_marker(gm: fx.GraphModule) -> bool:
    """Whether gm, or a body in it, marks an input."""
    return any(_is_marker(n) or any(has_marker(m) for _, m in bodies(gm, n)) for n in gm.graph.nodes)


def _is_marker(node: fx.Node) -> bool:
    return node.target is MAKE_DUAL


def is_in_place(node: fx.Node) -> bool:
    """Whether node writes to its first argument."""
    if _asked_for_in_place(node) or node.kwargs.get("out") is not None:
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, str):
        return (node.target.endswith("_") and not node.target.endswith("__")) or node.target == "__setitem__"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.target in (operator.or_, operator.and_, operator.not_):
        return False  # the underscore is not torch's
    name = getattr(node.target, "__name__", "")
    if is_of_numpy(node):
        return name in IN_PLACE_OF_NUMPY
    return node.target in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def is_of_numpy(node: fx.Node) -> bool:
    """Whether node is a function, method or operator of numpy's, of which Dynamo makes ops."""
    return type(node.target) in NUMPY


def _asked_for_in_place(node: fx.Node) -> bool:
    """By ``inplace=True``, or by its place, as in ``F.relu(x, True)``."""
    names = list(inspect.signature(node.target).parameters) if isinstance(node.target, FunctionType) else []
    return bool({**dict(zip(names, node.args)), **node.kwargs}.get("inplace"))


def _leaves(args: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(args)


# --------------------------------------------------------------------------------------------------- editing


def emit(origin: fx.Node, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call of a method (by name) or function at the graph's cursor, with its example value."""
    graph = origin.graph
    node = (
        graph.call_method(target, args, kwargs)
        if isinstance(target, str)
        else graph.call_function(target, args, kwargs)
    )
    inherit(node, origin)

    values, settings = fx.node.map_arg((args, kwargs), lambda x: x.meta["example_value"])
    inputs = [*node.all_input_nodes, *origin.all_input_nodes]  # the latter for what is made of sizes alone
    fake_mode = next(mode for x in inputs if (mode := fake_mode_of(x.meta.get("example_value"))) is not None)
    with fake_mode, torch.no_grad():
        run = getattr(values[0], target) if isinstance(target, str) else target
        node.meta["example_value"] = run(*(values[1:] if isinstance(target, str) else values), **settings)
    return node


def inherit(node: fx.Node, origin: fx.Node) -> None:
    meta: Mapping[str, Any] = origin.meta
    node.meta.update({key: meta[key] for key in INHERITED_META if key in meta})


def fake_mode_of(x: Any) -> Any:
    """Of a fake tensor, or of a DTensor that holds one; None of anything else."""
    inside = getattr(x, "_local_tensor", x)
    return inside.fake_mode if isinstance(inside, FakeTensor) else None


def same_shape(x: Tensor, y: Tensor) -> bool:
    """Whether two shapes are known to agree, without a guard on symbolic sizes."""
    return x.dim() == y.dim() and all(statically_known_true(a == b) for a, b in zip(x.shape, y.shape))


def graphs_in(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """gm and the bodies of all higher-order ops in it."""
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
