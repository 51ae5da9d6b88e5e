"""Let products give half precision where their result is rounded soon, and goes nowhere else."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from jvpgraph.graph.meta import TANGENT_META
from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.passes.context import Context
from jvpgraph.rules.wide import only_moves

__all__ = ["round_products"]

aten = torch.ops.aten
PRODUCT = torch.ops.jvpgraph.mm_float32.default
CAST = aten._to_copy.default


def round_products(gm: fx.GraphModule, context: Context) -> None:
    """Round projections to queries, keys and values, and to hidden layers, as they are written.

    Before: ``y = mm_float32(a, b);  z = f(y).to(bfloat16)``
    After:  ``y = mm(a, b);  z = f(y.to(float32)).to(bfloat16)``, and ``z = y`` where f is a view or nothing

    Needs linearize. Keeps products whose result is added to something: what is summed up over a whole network, as in a
    residual stream, stays in float32. Values of tangents are rounded once more, by which the tangent of a DiT changes
    by a fiftieth of its error; half as many bytes are written, and read again.
    """
    graph = gm.graph
    products = graph.find_nodes(op="call_function", target=PRODUCT)
    if not products:
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    tangents = _tangents(graph)
    for product in [p for p in products if _is_rounded_soon(p, order, tangents)]:
        dtype = value_of(product.args[0]).dtype
        product.target = aten.mm.default if value_of(product).dim() == 2 else aten.bmm.default
        views = [product, *_views(product)]
        for view in views:
            view.meta["val"] = tree_map_only(Tensor, operator.methodcaller("to", dtype), value_of(view))
        recorder = Recorder(graph)
        for view in views:
            others = [user for user in view.users if user not in views]
            casts = [user for user in others if _rounds(user, dtype)]
            for cast in casts:
                cast.replace_all_uses_with(view, propagate_meta=False)
                graph.erase_node(cast)
            if len(others) > len(casts):
                with recorder.behind(view):
                    wide = recorder.node_of(recorder.stand_in(view).to(torch.float32))
                for user in others:
                    if user not in casts:
                        user.replace_input_with(view, wide)


def _tangents(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on a tangent."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if TANGENT_META in node.meta or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_rounded_soon(product: fx.Node, order: dict[fx.Node, int], tangents: set[fx.Node]) -> bool:
    """Whether all that is made of it is rounded, before another tangent is added to it; not if its own operand comes in
    two parts, in order not to be."""
    if product.args[0].target is aten.cat.default:  # type: ignore[union-attr]
        return False
    dtype = value_of(product.args[0]).dtype  # type: ignore[arg-type]
    reached: set[fx.Node] = set()
    waiting = [(order[product], product)]
    while waiting:
        _, node = heapq.heappop(waiting)
        if node in reached or _rounds(node, dtype):
            continue
        if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
            return False  # it leaves the graph
        others = tangents.intersection(node.all_input_nodes).difference(reached)
        if others and node is not product and not only_moves(node.target):
            return False
        reached.add(node)
        for user in node.users:
            heapq.heappush(waiting, (order[user], user))
    return True


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """What is a view of its result, views of views included."""
    for user in node.users:
        if user.target is operator.getitem or (isinstance(user.target, OpOverload) and user.target.is_view):
            yield user
            yield from _views(user)


def _rounds(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a node is a cast to this dtype and nothing else."""
    return node.target is CAST and node.kwargs == {"dtype": dtype}
