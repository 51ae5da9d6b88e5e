"""Swap scaled_dot_product_attention for our attention op, on the torch-level graph that Dynamo gives out.

Before: ``o = scaled_dot_product_attention(q, k, v, mask, is_causal=..., scale=...)``
After:  ``o, lse = jvpgraph::attention(q, k, v, mask, is_causal, scale)``
Needs:
    The graph before AOTAutograd, where a call is one node whichever kernel it chooses; ``example_value`` on
    nodes.
Keeps:
    Every other node; calls that no marked input reaches; calls that the op does not take, each with a reason.
Numerics:
    The same maths; on a CPU the same kernel.

The bodies of higher-order ops (activation checkpointing, compiled regions) are graphs of their own, treated
likewise.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from jvpgraph.kernels.ops import OPS
from jvpgraph.linearize import source_line
from jvpgraph.trace import INHERITED_META

__all__ = [
    "SwapReport",
    "active_graphs",
    "active_nodes",
    "bodies",
    "emit",
    "emit_attention",
    "has_marker",
    "inputs_of_body",
    "is_in_place",
    "is_of_numpy",
    "same_shape",
    "swap_attention",
    "with_layout_of",
]

SDPA = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
IN_PLACE_OPERATORS = (
    *(operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul),
)


@dataclass
class SwapReport:
    """What became of each attention: (node, source line, form or reason)."""

    swapped: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)


def swap_attention(gm: fx.GraphModule, active: set[fx.Node]) -> SwapReport:
    """Replace active calls of scaled_dot_product_attention by jvpgraph::attention, in gm and its bodies.

    Args:
        gm: Dynamo's graph; changed in place.
        active: its nodes that depend on a marked input, as active_nodes finds them.
    Returns:
        What was swapped, in which form, and what was left, for which reason.
    """
    report = SwapReport()
    for body, nodes in active_graphs(gm, active):
        for node in [n for n in body.graph.nodes if n.op == "call_function" and n.target in SDPA and n in nodes]:
            try:
                form = _swap(node)
            except ValueError as refusal:
                report.left.append((node.name, source_line(node), str(refusal)))
            else:
                report.swapped.append((node.name, source_line(node), form))
        body.recompile()
    return report


def _swap(node: fx.Node) -> str:
    """Swap one call, or raise ValueError with the reason why not."""
    given: dict[str, Any] = dict(zip(SDPA_ARGUMENTS, node.args)) | node.kwargs
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    dropout, is_causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
    scale = given.get("scale")
    if not isinstance(dropout, (int, float)) or dropout != 0:
        raise ValueError(f"dropout_p is {dropout}")
    if not isinstance(is_causal, bool):
        raise ValueError("is_causal is not known")
    if is_causal and mask is not None:
        raise ValueError("is_causal beside attn_mask, which torch does not take either")
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError("scale is not a number")
    scale = None if scale is None else float(scale)
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise ValueError("its shape is not known")
    with node.graph.inserting_before(node):
        o = emit_attention(node, q, k, v, mask, is_causal, scale, value.dtype)
        if not same_shape(o.meta["example_value"], value):
            for unused in (o, *o.all_input_nodes):
                node.graph.erase_node(unused)
            raise ValueError(f"the result is {tuple(value.shape)}: some dims broadcast")
        o = with_layout_of(node, o)
    node.replace_all_uses_with(o)
    node.graph.erase_node(node)
    parts = ["scaled_dot_product_attention"]
    parts += ["mask"] * (mask is not None) + ["causal"] * is_causal
    return " ".join(parts)


def emit_attention(
    origin: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    bias: fx.Node | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype,
) -> fx.Node:
    """Insert the attention op at the graph's cursor and return its o.

    Args:
        origin: whose source line the new nodes inherit.
        dtype: what q, k and v are computed in: theirs, or the one that autocast gives them.
    Raises:
        ValueError: the op does not take these operands.
    """
    bias = _unexpanded(bias)
    examples: list[Any] = [None if x is None else x.meta.get("example_value") for x in (q, k, v, bias)]
    if not all(isinstance(x, Tensor) for x in examples[:3]) or (bias is not None and examples[3] is None):
        raise ValueError("the shapes of its operands are not known")
    kinds = {type(x) for x in examples if x is not None}
    fake_mode = _fake_mode(examples[0])
    if len(kinds) > 1 or fake_mode is None:
        raise ValueError(f"operands are {', '.join(sorted(kind.__name__ for kind in kinds))}")
    with fake_mode, torch.no_grad():
        if any(x.dtype != dtype for x in examples[:3]):  # autocast will cast all of them
            examples = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in examples]
        fake = OPS.attention.default(*examples, is_causal, scale)
    attention = origin.graph.call_function(OPS.attention.default, (q, k, v, bias, is_causal, scale))
    o = origin.graph.call_function(operator.getitem, (attention, 0))
    for new, example in ((attention, fake), (o, fake[0])):
        _inherit(new, origin)
        new.meta["example_value"] = example
    return o


def _fake_mode(x: Any) -> Any:
    """Of a fake tensor, or of a DTensor that holds one; None of anything else."""
    inside = getattr(x, "_local_tensor", x)
    return inside.fake_mode if isinstance(inside, FakeTensor) else None


def _unexpanded(bias: Any) -> Any:
    """bias before it was expanded: the op broadcasts by itself, and a compiler might write the copies out."""
    while bias is not None and bias.op == "call_method" and bias.target in ("expand", "expand_as"):
        bias = bias.args[0]
    return bias


def with_layout_of(origin: fx.Node, o: fx.Node) -> fx.Node:
    """o, made contiguous where the original was and a user takes a view that needs it."""
    viewed = any(user.op == "call_method" and user.target == "view" for user in origin.users)
    before, after = origin.meta["example_value"], o.meta["example_value"]
    return emit(origin, "contiguous", o) if viewed and before.is_contiguous() and not after.is_contiguous() else o


def same_shape(x: Tensor, y: Tensor) -> bool:
    """Whether two shapes are known to agree, without a guard on symbolic sizes."""
    return x.dim() == y.dim() and all(statically_known_true(a == b) for a, b in zip(x.shape, y.shape))


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


def active_graphs(gm: fx.GraphModule, active: set[fx.Node]) -> Iterator[tuple[fx.GraphModule, set[fx.Node]]]:
    """gm and every body that an active higher-order op in it runs, each once, with its active nodes."""
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


def _is_marker(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name() == "jvpgraph::make_dual"


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
    _inherit(node, origin)

    values, settings = fx.node.map_arg((args, kwargs), lambda x: x.meta["example_value"])
    inputs = [*node.all_input_nodes, *origin.all_input_nodes]  # the latter for what is made of sizes alone
    fake_mode = next(mode for x in inputs if (mode := _fake_mode(x.meta.get("example_value"))) is not None)
    with fake_mode, torch.no_grad():
        run = getattr(values[0], target) if isinstance(target, str) else target
        node.meta["example_value"] = run(*(values[1:] if isinstance(target, str) else values), **settings)
    return node


def _inherit(node: fx.Node, origin: fx.Node) -> None:
    meta: Mapping[str, Any] = origin.meta
    node.meta.update({key: meta[key] for key in INHERITED_META if key in meta})
