"""Forward mode as a graph transformation: each active node gets its tangent right after it.

Before::

    x = make_dual(x_in, x_dot);  y = sin(x);  y_dot = tangent_of(y)

After::

    y = sin(x_in);  mul = cos(x_in) * x_dot          # named sin_dot

Works on ATen graphs as AOTAutograd makes them, inference or joint. Only nodes on a path from a ``make_dual`` to a
``tangent_of`` are looked at, so the backward half of a joint graph is left alone, and the primal half stays what it
was, node for node.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true
from torch.utils._pytree import tree_leaves

from jvpgraph.autograd_function import NOTHING_ARRIVES
from jvpgraph.errors import ABSOLUTE, NUMBER_HAS_NO_TANGENT, UnsupportedNode, UnsupportedOp
from jvpgraph.graph.higher_order import differentiable_call, extend
from jvpgraph.graph.meta import INSERTED_META, TANGENT_META, module_path, source_line
from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.graph.strides import flat_memory, in_layout, overlaps, span_of
from jvpgraph.graph.torch_level import graphs_in
from jvpgraph.markers import ARRIVED, MAKE_DUAL, TANGENT_OF
from jvpgraph.passes.context import Context, Report
from jvpgraph.precision import Precision, carried, has_half, precision_at, widened
from jvpgraph.rules import NoRule, tangents_of
from jvpgraph.rules.apply import Unknown, any_has_tangent, argument_tangent, bind, has_tangent, remedy
from jvpgraph.rules.shape import stops_tangent

__all__ = ["linearize"]

NUMBERS = (torch.SymFloat, torch.SymInt, torch.SymBool, float, int, complex)  # what is no tensor has no tangent
SIZES = ("aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset")  # not of its contents


def linearize(gm: fx.GraphModule, context: Context) -> None:
    """Insert the tangents and erase the markers. Without markers, the graph is left alone.

    Raises:
        UnsupportedOp: ops on the tangent path have no rule; all of them, with the user's source lines.
    """
    parts = [part.graph for part in graphs_in(gm)]
    markers = (MAKE_DUAL, TANGENT_OF)
    if not any(part.find_nodes(op="call_function", target=marker) for part in parts for marker in markers):
        return
    _insert_tangents(gm, context, {})
    for part in graphs_in(gm):
        _erase_stops(part.graph)


def _insert_tangents(gm: fx.GraphModule, context: Context, seeds: dict[fx.Node, fx.Node]) -> None:
    """In gm and the bodies that it runs; ``seeds`` are the tangents of placeholders, where gm is a body itself."""
    graph, report, precision = gm.graph, context.report, carried(context.config.tangent_precision)
    starts = [*graph.find_nodes(op="call_function", target=MAKE_DUAL), *seeds]
    ends = graph.find_nodes(op="call_function", target=TANGENT_OF)
    if not starts and not ends:
        return
    # What is marked anew, as the output of a Function with its own jvp is, needs no tangent from before.
    path = _reachable(starts, lambda n: n.users)
    path &= _reachable(ends, lambda n: [] if n.target is MAKE_DUAL else n.all_input_nodes)
    recorder = Recorder(graph)
    tangent: dict[fx.Node, Any] = {**seeds}  # node -> tangent node, None for zero, a list for several outputs
    read: dict[fx.Node, fx.Node] = {}  # number -> where it was read from something with a tangent
    taken = {_memory_of(n) for n in graph.output_node().all_input_nodes}  # what outputs already stand for
    refused: list[UnsupportedNode] = []
    lost: dict[fx.Node, UnsupportedNode] = {}  # what was read as a number that a floating tensor is made of

    for node in list(graph.nodes):
        if node.target is MAKE_DUAL:
            tangent[node] = node.args[1]
        elif node.target is TANGENT_OF:
            _answer(node, tangent.get(node.all_input_nodes[0]), recorder, taken)
        elif node.target is ARRIVED:
            y, others, given, what = node.args
            tangent[node] = tangent.get(y)
            if _any_tangent(given, tangent) and not _any_tangent([y, *others], tangent):
                refused.append(replace(_unsupported(node, tangent, NOTHING_ARRIVES), op=str(what)))
        elif node in path and node not in seeds:
            if (source := _number_read(node, tangent, read)) is not None:
                if isinstance(node.meta.get("val"), NUMBERS):
                    read[node] = source
                    continue
                if any(map(has_tangent, tree_leaves(node.meta.get("val")))):
                    lost[source] = _unsupported(source, tangent, NUMBER_HAS_NO_TANGENT)
                    tangent[node] = _pretended(node)
                    continue
            try:
                if differentiable_call(node) and _any_tangent(node.all_input_nodes, tangent):
                    wanted = {item.args[1] for item in node.users if item in path}
                    dot_of = partial(_beside, node=node, tangent=tangent, recorder=recorder, precision=precision)
                    in_body = partial(_in_body, context=context)
                    new, dots = extend(gm, node, dot_of, wanted, in_body, precision)  # type: ignore[arg-type]
                    tangent[new] = dots
                    recorder.inserted += [dot for dot in dots if dot is not None]
                    continue
                tangent[node] = _tangent_of_node(node, tangent, recorder, context)
            except UnsupportedOp as inside:
                refused += inside.nodes
                tangent[node] = _pretended(node)
            except NoRule as reason:
                refused.append(_unsupported(node, tangent, str(reason)))
                tangent[node] = _pretended(node)  # to go on and find the others
    refused += lost.values()
    if refused:
        raise UnsupportedOp(refused)

    forward = _reachable(ends, lambda n: n.all_input_nodes).difference(ends)
    report.active = sum(1 for dot in tangent.values() if dot is not None)
    report.inactive = sum(1 for n in forward if isinstance(n.target, OpOverload) and tangent.get(n) is None)
    asked = graph.find_nodes(op="call_function", target=ARRIVED)
    for node in reversed([*ends, *starts, *asked]):
        if node in seeds:
            continue
        if node.target is not TANGENT_OF:
            node.replace_all_uses_with(_unmarked(node, recorder))
        graph.erase_node(node)
    for node in recorder.inserted:
        node.meta[INSERTED_META] = True


def _beside(
    x: Any, node: fx.Node, tangent: dict[fx.Node, Any], recorder: Recorder, precision: Precision
) -> fx.Node | None:
    """The tangent of an operand of ``node``, laid out as the operand is and of one dtype: bodies count on it."""
    dot = tangent.get(x) if isinstance(x, fx.Node) else None
    if dot is None:
        return None
    with recorder.behind(node.prev):
        x_dot = recorder.stand_in(dot).to(widened(value_of(x).dtype, precision))
        return recorder.node_of(in_layout(x_dot, value_of(x)))


def _in_body(body: fx.GraphModule, seeds: dict[fx.Node, fx.Node], context: Context) -> None:
    _insert_tangents(body, context, seeds)


def _any_tangent(nodes: Any, tangent: dict[fx.Node, Any]) -> bool:
    return any(tangent.get(x) is not None for x in nodes)


def _number_read(node: fx.Node, tangent: dict[fx.Node, Any], read: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """Where a number that ``node`` reads, or is made of, was read from a tensor with a tangent.

    What AOTAutograd turned back into a tensor, as it does for ``x * t.item()``, is no number any more.
    """
    is_size = isinstance(node.target, OpOverload) and node.target._schema.name in SIZES
    reads = any(tangent.get(n) is not None for n in node.all_input_nodes) and not is_size
    if reads and isinstance(node.meta.get("val"), NUMBERS):
        return node
    return next((read[n] for n in node.all_input_nodes if n in read), None)


def _tangent_of_node(node: fx.Node, tangent: dict[fx.Node, Any], recorder: Recorder, context: Context) -> Any:
    report = context.report
    if node.target is operator.getitem:
        dots = tangent.get(node.all_input_nodes[0])
        dot = dots[node.args[1]] if dots is not None else None
        if isinstance(dot, Unknown):
            raise NoRule(dot.reason)
        return dot
    if not any(tangent.get(n) is not None for n in node.all_input_nodes):
        return None
    if not isinstance(node.target, OpOverload):
        raise NoRule(_why_no_op(node, report))
    op = node.target
    if not any_has_tangent(op, value_of(node)):
        return None
    if op is torch.ops.aten.as_strided.default:
        return _tangent_of_strided(node, tangent, recorder, report)
    arguments = bind(op, node.args, node.kwargs)
    dots = {name: dot for name, v in arguments.items() if (dot := _argument_tangent(v, tangent)) is not None}
    first = len(recorder.inserted)
    precision = precision_at(context.config.tangent_precision, partial(module_path, node), op)
    with recorder.behind(node):
        out = recorder.stand_in(node)
        if has_half(out):
            report.precisions[precision] += 1
        try:
            given = recorder.stand_ins(arguments), recorder.stand_ins(dots)
            out_dot, source = tangents_of(op, out, *given, precision)
        except NotImplementedError as reason:
            raise NoRule(str(reason)) from reason
        report.rules[source][str(op)] += 1
        return _name_tangents(node, out_dot, recorder, first)


def _tangent_of_strided(node: fx.Node, tangent: dict[fx.Node, Any], recorder: Recorder, report: Report) -> fx.Node:
    """Of as_strided, which counts in memory: it is one of the tangent of what owns the memory, laid out alike."""
    x, size, stride, offset = bind(node.target, node.args, node.kwargs).values()  # type: ignore[arg-type]
    owner = _memory_of(x)
    value, dot = value_of(owner), tangent.get(owner)
    size, stride, start = fx.node.map_arg((size, stride, offset), value_of)
    given = value_of(owner.all_input_nodes[0]) if owner.target is MAKE_DUAL else value
    whole = statically_known_true(given.storage_offset() == 0)
    if offset is not None and not whole:
        raise NoRule(ABSOLUTE)
    if start is None:
        start = value_of(x).storage_offset()
    end = start + span_of(size, stride)
    if (
        not isinstance(dot, fx.Node)
        or value.dtype != value_of(node).dtype
        or not guard_or_false(end <= span_of(value.shape, value.stride()))
    ):
        raise NoRule("it reads beyond what has a tangent, or as another dtype")
    if overlaps(value):
        raise NoRule("one element of memory stands for several, which have no tangents of their own: clone() first")
    first = len(recorder.inserted)
    with recorder.behind(node):
        flat = flat_memory(recorder.stand_in(dot), value)
        report.rules["table"][str(node.target)] += 1
        named: fx.Node = _name_tangents(node, flat.as_strided(size, stride, start), recorder, first)
        return named


def _why_no_op(node: fx.Node, report: Report) -> str:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return "not an op"
    why = "its body is a graph of its own, into which tangents do not follow; write it in plain Python"
    line = source_line(node)
    for _, where, reason in report.left:  # of the calls that would have been swapped for an op of ours
        if line and where == line:
            why = reason
    return f"a higher-order op: {why}"


def _argument_tangent(value: Any, tangent: dict[fx.Node, Any]) -> Any:
    return argument_tangent(value, lambda x: tangent.get(x) if isinstance(x, fx.Node) else None)


def _name_tangents(primal: fx.Node, out_dot: Any, recorder: Recorder, first: int) -> Any:
    """The nodes of the tangents; those inserted since the ``first`` are named after the primal."""
    if out_dot is None or isinstance(out_dot, Unknown):
        return out_dot
    if isinstance(out_dot, (list, tuple)):
        dots = [_name_tangents(primal, d, recorder, first) for d in out_dot]
        return dots if any(d is not None for d in dots) else None
    node = recorder.node_of(out_dot)
    if TANGENT_META not in node.meta and node in recorder.inserted[first:]:
        node._rename(f"{primal.name}_dot")
        node.meta[TANGENT_META] = primal.name
    return node


def _pretended(node: fx.Node) -> Any:
    """A wrong tangent of the right shape: the primal itself."""
    if isinstance(value_of(node), Tensor):
        return node
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [items.get(i) for i in range(len(value_of(node)))]


def _answer(marker: fx.Node, dot: fx.Node | None, recorder: Recorder, taken: set[fx.Node]) -> None:
    """Replace ``tangent_of(y)`` by the tangent: in memory of its own and in the layout that the marker promised."""
    promised = value_of(marker)
    with recorder.behind(marker):
        if dot is None:
            like = recorder.stand_in(marker.all_input_nodes[0])
            answer = torch.zeros_like(like)
        else:
            answer = recorder.stand_in(dot)
        answer = in_layout(answer.to(promised.dtype), promised)
        memory = _memory_of(recorder.node_of(answer))
        if memory.op == "placeholder" or memory in taken:
            answer = answer.clone()
        taken.add(_memory_of(recorder.node_of(answer)))
        marker.replace_all_uses_with(recorder.node_of(answer), propagate_meta=False)


def _memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one is, or is a view of."""
    while True:
        of = node.all_input_nodes[0] if node.target is operator.getitem else node  # split, unbind
        target = of.target
        if not isinstance(target, OpOverload) or not (target.is_view or target is torch.ops.aten.detach.default):
            return node
        node = of.all_input_nodes[0]


def _unmarked(marker: fx.Node, recorder: Recorder) -> fx.Node:
    """What replaces ``make_dual(x, ...)`` or ``arrived(x, ...)``: x itself, or a copy where an output of the graph
    would alias the input.

    AOTAutograd was told that the marker makes a new tensor, so its outputs must not share memory with inputs.
    """
    primal = marker.args[0]
    assert isinstance(primal, fx.Node)
    aliases = list(_aliases(marker))
    if not any(alias.op == "output" for alias in aliases):
        return primal
    with recorder.behind(marker):
        x = recorder.stand_in(primal)
        strided = any(alias.target is torch.ops.aten.as_strided.default for alias in aliases)
        if strided and not guard_or_false(span_of(x.shape, x.stride()) == x.numel()):  # it sees holes in the memory
            memory = x.as_strided((span_of(x.shape, x.stride()),), (1,)).clone()
            return recorder.node_of(memory.as_strided(x.shape, x.stride()))
        return recorder.node_of(x.clone())


def _erase_stops(graph: fx.Graph) -> None:
    """Take out the marks of mark_stop_gradients, which have done their work."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default):
        x, size, *_ = node.args
        if stops_tangent(value_of(x), fx.node.map_arg(size, value_of), node.kwargs.get("implicit", False)):
            node.replace_all_uses_with(x, propagate_meta=False)
            graph.erase_node(node)


def _aliases(node: fx.Node) -> Iterator[fx.Node]:
    """The views of a node, and the output of the graph if one of them is in it."""
    for user in node.users:
        views = user.target is operator.getitem or (isinstance(user.target, OpOverload) and user.target.is_view)
        if views or user.target is torch.ops.aten.detach.default:
            yield user
            yield from _aliases(user)
        elif user.op == "output":
            yield user


def _reachable(roots: Iterable[fx.Node], step: Any) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(step(node))
    return seen


def _unsupported(node: fx.Node, tangent: dict[fx.Node, Any], reason: str) -> UnsupportedNode:
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
    op = node.target
    names = [node.name]
    if isinstance(op, OpOverload):
        bound = bind(op, node.args, node.kwargs)
        names = [name for name, v in bound.items() if _argument_tangent(v, tangent) is not None]
        return UnsupportedNode(str(op), node.name, tuple(names), source_line(node), reason, remedy(op, names))
    return UnsupportedNode(str(op), node.name, tuple(names), source_line(node), reason)
