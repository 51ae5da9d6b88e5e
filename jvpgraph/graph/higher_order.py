"""Tangents through the ops whose arguments are graphs: cond, scan, map, while_loop and invoke_subgraph.

Each becomes the same op with other bodies: these take the tangents of their operands besides, and return those of
their outputs. What is carried from one round to the next has its tangent carried along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from jvpgraph.markers import TANGENT_OF
from jvpgraph.precision import Precision, widened
from jvpgraph.rules.apply import has_tangent

__all__ = ["differentiable_call", "extend"]

OF_ARGUMENTS = ("eager_input_vals", "tensor_meta", "from_node")  # what a call is noted to be called with, and returns
Linearize = Callable[[fx.GraphModule, dict[fx.Node, fx.Node]], None]


@dataclass(frozen=True)
class Form:
    """How an op takes its arguments.

    Attributes:
        bodies: positions of the graphs.
        groups: positions of the operands, which are tuples of what the bodies take, one group after the other; those
            of the last position may be spread out.
        carries: the first outputs are the first group of the next round.
        decides: the first body only says whether there is a next round.
    """

    bodies: tuple[int, ...]
    groups: tuple[int, ...]
    carries: bool = False
    decides: bool = False
    spread: bool = False

    def operands(self, node: Any) -> list[list[Any]]:
        if self.spread:
            return [list(node.args[self.groups[0] :])]
        return [list(node.args[i]) for i in self.groups]

    def arguments(self, node: Any, bodies: list[fx.Node], groups: list[list[Any]], name: str) -> tuple[Any, ...]:
        if self.spread:
            return bodies[0], name, *groups[0]
        args = list(node.args)
        for i, body in zip(self.bodies, bodies):
            args[i] = body
        for i, group in zip(self.groups, groups):
            args[i] = type(node.args[i])(group) if isinstance(node.args[i], tuple) else list(group)
        return tuple(args)


FORMS = {
    "cond": Form(bodies=(1, 2), groups=(3,)),
    "map_impl": Form(bodies=(0,), groups=(1, 2)),
    "scan": Form(bodies=(0,), groups=(1, 2, 3), carries=True),
    "while_loop": Form(bodies=(0, 1), groups=(2, 3), carries=True, decides=True),
    "while_loop_stack_output": Form(bodies=(0, 1), groups=(2, 3), carries=True, decides=True),
    "invoke_subgraph": Form(bodies=(0,), groups=(2,), spread=True),
}


def differentiable_call(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in FORMS


def extend(
    gm: fx.GraphModule,
    node: Any,
    dot_of: Callable[[Any], fx.Node | None],
    wanted: set[int],
    linearize: Linearize,
    precision: Precision = "model",
) -> tuple[fx.Node, list[fx.Node | None]]:
    """Replace ``node`` in ``gm`` by a call that also returns tangents.

    Args:
        dot_of: the tangent of an operand, laid out as that is, before ``node``.
        wanted: the outputs whose tangents are asked for.
        precision: of tangents, one of PRECISIONS.
        linearize: ``(body, tangents of its placeholders)`` replaces the ``tangent_of`` in the body.

    Returns:
        The new node, and for each of its outputs the node of its tangent.
    """
    form = FORMS[node.target.name()]
    bodies = [getattr(gm, str(node.args[i].target)) for i in form.bodies]
    groups = form.operands(node)
    dots = [[dot_of(x) for x in group] for group in groups]
    carried = len(groups[0]) if form.carries else 0
    steps = bodies[1:] if form.decides else bodies
    if form.carries:
        _carry(node, steps[0], groups, dots, precision)
    active = [[dot is not None for dot in group] for group in dots]
    reached = set().union(*(_active_outputs(body, active) for body in steps))
    asked = [i for i in range(carried) if active[0][i]]
    asked += [i for i in range(carried, len(_outputs(steps[0]))) if i in wanted and i in reached]

    name = f"{node.args[form.bodies[-1]].target}_dual_{_key(active, asked)}"
    names = [f"{name}_{i}" for i in range(len(bodies))]
    for i, body in enumerate(bodies):
        if not hasattr(gm, names[i]):
            is_step = body in steps
            new = _extended_body(body, active, asked if is_step else None, carried, linearize, precision)
            setattr(gm, names[i], new)
    values = list(node.meta["val"])
    order = _order(len(values), asked, carried)
    with gm.graph.inserting_before(node):
        attributes = [gm.graph.get_attr(n) for n in names]
        both = [[*group, *(dot for dot in more if dot is not None)] for group, more in zip(groups, dots)]
        call = gm.graph.call_function(node.target, form.arguments(node, attributes, both, name), node.kwargs)
    call.meta.update((key, found) for key, found in node.meta.items() if key not in OF_ARGUMENTS)
    call.meta.update(val=tuple(_like(values[i], precision) if is_dot else values[i] for i, is_dot in order))
    return call, _redirect(node, call, order)


def _carry(
    node: fx.Node, body: fx.GraphModule, groups: list[list[Any]], dots: list[list[Any]], precision: Precision
) -> None:
    """Carried values that get a tangent on the way begin with a tangent of zeros."""
    while True:
        active = [[dot is not None for dot in group] for group in dots]
        late = [i for i in _active_outputs(body, active) if i < len(groups[0]) and dots[0][i] is None]
        if not late:
            return
        for i in late:
            value = groups[0][i].meta["val"]
            with node.graph.inserting_before(node):
                how: dict[str, Any] = {"dtype": widened(value.dtype, precision)}
                dots[0][i] = node.graph.call_function(torch.ops.aten.zeros_like.default, (groups[0][i],), how)
            dots[0][i].meta["val"] = _like(value, precision)


def _active_outputs(body: fx.GraphModule, active: list[list[bool]]) -> set[int]:
    """The floating outputs that depend on an active placeholder."""
    placeholders = body.graph.find_nodes(op="placeholder")
    flat = [is_active for group in active for is_active in group]
    waiting, seen = [p for p, is_active in zip(placeholders, flat) if is_active], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.users
    return {i for i, x in enumerate(_outputs(body)) if x in seen and has_tangent(x.meta.get("val"))}


def _outputs(body: fx.GraphModule) -> list[Any]:
    found: Any = body.graph.output_node().args[0]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _key(active: list[list[bool]], asked: list[int]) -> str:
    return "_".join(["".join("01"[a] for group in active for a in group), *map(str, asked)])


def _order(outputs: int, asked: list[int], carried: int) -> list[tuple[int, bool]]:
    """What the new call returns: (output, whether its tangent). Carried values come first, with their tangents."""
    first = [(i, False) for i in range(carried)] + [(i, True) for i in asked if i < carried]
    return first + [(i, False) for i in range(carried, outputs)] + [(i, True) for i in asked if i >= carried]


def _extended_body(
    body: fx.GraphModule,
    active: list[list[bool]],
    asked: list[int] | None,
    carried: int,
    linearize: Linearize,
    precision: Precision,
) -> fx.GraphModule:
    """A copy of body that takes tangents, and returns those of the outputs that are asked for; None: only takes."""
    graph = fx.Graph()
    returned = graph.graph_copy(body.graph, {})
    new = fx.GraphModule(body, graph)
    outs: list[Any] = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    seeds: dict[fx.Node, fx.Node] = {}
    remaining: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    for group in active:
        here, remaining = remaining[: len(group)], remaining[len(group) :]
        last = here[-1] if here else None
        for placeholder, is_active in zip(here, group):
            if is_active:
                assert last is not None
                with graph.inserting_after(last):
                    last = graph.placeholder(f"{placeholder.name}_dot")
                last.meta["val"] = _like(placeholder.meta["val"], precision)
                seeds[placeholder] = last
    if asked is None:
        graph.output(returned)
        return new
    markers = {}
    for i in asked:
        markers[i] = graph.call_function(TANGENT_OF, (outs[i],))
        markers[i].meta.update(outs[i].meta, val=_like(outs[i].meta["val"], precision))
    graph.output(tuple(markers[i] if is_dot else outs[i] for i, is_dot in _order(len(outs), asked, carried)))
    linearize(new, seeds)
    return new


def _like(value: Any, precision: Precision) -> Tensor:
    """A tangent's."""
    dtype = widened(value.dtype, precision)
    with value.fake_mode, torch.no_grad():
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)


def _redirect(old: fx.Node, new: Any, order: Sequence[tuple[int, bool]]) -> list[fx.Node | None]:
    """Let the users of ``old`` take what they took from ``new``."""
    dots: list[fx.Node | None] = [None] * len(order)
    place = {entry: i for i, entry in enumerate(order)}
    graph = old.graph
    users: list[Any] = list(old.users)
    for item in users:
        item.args = (new, place[item.args[1], False])
    for (i, is_dot), position in place.items():
        if is_dot:
            with graph.inserting_after(new):
                dot = graph.call_function(operator.getitem, (new, position))
            dot.meta["val"] = new.meta["val"][position]
            dots[place[i, False]] = dot
    graph.erase_node(old)
    return dots
