"""Let every tangent be T tangents at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.graph.meta import INSERTED_META, source_line
from jvpgraph.graph.recorder import Recorder
from jvpgraph.kernels.ops import ALL_DOTS, OPS
from jvpgraph.markers import ALL_OF, ONE_OF
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind

__all__ = ["batch_tangents"]

aten = torch.ops.aten
ONE = "a higher-order op, which takes one tangent at a time"
REMEDY = "Call once for each tangent, or write it in plain Python."
VIEWS = (aten.view.default, aten._unsafe_view.default)
Way = Callable[[Callable[..., Any], list[Tensor]], Any]
PRIMALS = (0, 1)  # o and lse of attention_jvp


def batch_tangents(gm: fx.GraphModule, context: Context) -> None:
    """Run torch.func.vmap over each node that a batch of tangents reaches.

    Before: ``x_dot = one_of(x_dots);  y_dot = mul(cos, x_dot);  y_dots = all_of(y_dot, T)``
    After:  ``y_dots = mul(cos, x_dots)``

    Needs linearize: a tangent is linear in the tangents that go in, and the primal half does not depend on them, so
    nothing of it is computed twice. Attention and its tangents stay one op, attention_jvps. Without markers, the graph
    is left alone.

    Raises:
        UnsupportedOp: an op on the way cannot be batched.
    """
    graph = gm.graph
    if not graph.find_nodes(op="call_function", target=ONE_OF):
        return
    recorder = Recorder(graph)
    many: dict[fx.Node, Any] = {}  # of one tangent -> the node of all, [T, ...], or a list for several outputs
    replaced = []
    for node in list(graph.nodes):
        if node.target is ONE_OF:
            many[node] = node.args[0]
        elif node.target is ALL_OF:
            _answer(node, many, recorder)
            replaced.append(node)
        elif node.target is operator.getitem and node.args[0] in many:
            of, index = node.args
            if of.target is OPS.attention_jvp.default and index in PRIMALS:
                node.replace_all_uses_with(many[of][index], propagate_meta=False)
                replaced.append(node)
            else:
                many[node] = many[of][index]
        elif any(of in many for of in node.all_input_nodes):
            many[node] = _batched(node, many, recorder)
    for node in sorted([*replaced, *many], reverse=True):
        graph.erase_node(node)
    for node in recorder.inserted:
        node.meta[INSERTED_META] = True


def _answer(marker: fx.Node, many: dict[fx.Node, Any], recorder: Recorder) -> None:
    """Replace ``all_of(y_dot, T)``: by memory of its own, one tangent behind the other."""
    y_dot, count = marker.args
    with recorder.behind(marker):
        if y_dot in many:
            answer = recorder.stand_in(many[y_dot])  # type: ignore[index]
        else:  # the same for all
            one = recorder.stand_in(y_dot)  # type: ignore[arg-type]
            size = recorder.stand_in(count) if isinstance(count, fx.Node) else count
            answer = one.expand(size, *one.shape)
        answer = answer.clone(memory_format=torch.contiguous_format)
        marker.replace_all_uses_with(recorder.node_of(answer), propagate_meta=False)


def _batched(node: fx.Node, many: dict[fx.Node, Any], recorder: Recorder) -> Any:
    """The node, or list of nodes, of all tangents."""
    if not isinstance(node.target, OpOverload):
        raise UnsupportedOp([UnsupportedNode(str(node.target), node.name, (), source_line(node), ONE, REMEDY)])
    first = len(recorder.inserted)
    try:
        found = _recorded(_at_once, node, many, recorder)
    except (NotImplementedError, RuntimeError):  # functorch has no rule for it, or none for symbolic sizes
        for left in reversed(recorder.inserted[first:]):
            recorder.graph.erase_node(left)
        del recorder.inserted[first:]
        found = _recorded(_one_by_one, node, many, recorder)
    if isinstance(found, fx.Node) and found in recorder.inserted[first:]:
        found._rename(f"{node.name}s")
    return found


def _recorded(way: Way, node: fx.Node, many: dict[fx.Node, Any], recorder: Recorder) -> Any:
    """The nodes of what ``way`` gives for a node: T of the arguments that are tangents, the others as they are."""
    with recorder.behind(node, reuse=False), _rules_only():
        if node.target is OPS.attention_jvp.default:
            out: Any = _attention(node, many, recorder)
        else:
            leaves, structure = tree_flatten((node.args, node.kwargs))
            batched = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and leaf in many]
            values = [recorder.stand_in(many.get(x, x)) if isinstance(x, fx.Node) else x for x in leaves]
            op: Any = torch.reshape if node.target in VIEWS else node.target  # T of them may lie otherwise

            def one(*dots: Tensor) -> Any:
                given = list(values)
                for i, dot in zip(batched, dots):
                    given[i] = dot
                args, kwargs = tree_unflatten(given, structure)
                return op(*args, **kwargs)

            out = way(one, [values[i] for i in batched])
        return tree_map(lambda x: recorder.node_of(x) if isinstance(x, Tensor) else x, out)


def _at_once(one: Callable[..., Any], dots: list[Tensor]) -> Any:
    return torch.vmap(one)(*dots)


def _one_by_one(one: Callable[..., Any], dots: list[Tensor]) -> Any:
    """As many calls as there are tangents, which are a constant of the graph from here on."""
    outs = [one(*(dot.select(0, t) for dot in dots)) for t in range(int(dots[0].shape[0]))]
    return tree_map(lambda *of_each: torch.stack(of_each), *outs)


@contextmanager
def _rules_only() -> Iterator[None]:
    """functorch refuses what it has no rule for, instead of calling it for each with a warning."""
    functorch: Any = torch._C._functorch  # whose stubs do not have these
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def _attention(node: fx.Node, many: dict[fx.Node, Any], recorder: Recorder) -> Any:
    """attention_jvps; where the tangents are to be differentiable, attention_jvp for each."""
    given = bind(OPS.attention_jvp.default, node.args, node.kwargs)
    count = next(recorder.stand_in(many[given[name]]).shape[0] for name in ALL_DOTS if given[name] in many)
    values = {name: recorder.stand_ins(many.get(x, x) if isinstance(x, fx.Node) else x) for name, x in given.items()}
    for name in ALL_DOTS:
        x = values[name]
        if x is not None and given[name] not in many:
            values[name] = x.expand(count, *x.shape)
    if not values.pop("differentiable_tangent"):
        return OPS.attention_jvps.default(**values)
    outs = []
    for t in range(int(count)):
        dots = {name: values[name].select(0, t) for name in ALL_DOTS if values[name] is not None}
        outs.append(OPS.attention_jvp.default(**(values | dots), differentiable_tangent=True))
    o, lse, o_dots, lse_dots = zip(*outs)
    return [o[0], lse[0], torch.stack(o_dots), torch.stack(lse_dots)]
