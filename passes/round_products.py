"""Let products give half precision where whoever takes their result would round it."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from jvpgraph.graph.recorder import value_of
from jvpgraph.passes.context import Context
from jvpgraph.precision import HALF

__all__ = ["round_products"]

aten = torch.ops.aten
PRODUCT = torch.ops.jvpgraph.mm_float32.default
CAST = aten._to_copy.default


def round_products(gm: fx.GraphModule, context: Context) -> None:
    """Round once, and in the product.

    Before: ``y = mm_float32(a, b);  z = y.view(...).to(bfloat16)``
    After:  ``y = mm(a, b);  z = y.view(...)``

    Needs linearize. Keeps products of which something is computed in float32, or whose result leaves the graph. Values
    are the same: tensor cores add up in float32 and round what they write. It is half of what is written and less than
    half of what is read: a projection of the tokens to queries, keys and values has its tangents as attention has them.
    """
    graph = gm.graph
    for product in graph.find_nodes(op="call_function", target=PRODUCT):
        dtype = value_of(product.args[0]).dtype
        views = [product, *_views(product)]
        casts = [user for view in views for user in view.users if user not in views]
        if not casts or dtype not in HALF or not all(_rounds(cast, dtype) for cast in casts):
            continue
        product.target = aten.mm.default if value_of(product).dim() == 2 else aten.bmm.default
        for view in views:
            view.meta["val"] = tree_map_only(Tensor, lambda x: x.to(dtype), value_of(view))
        for cast in casts:
            cast.replace_all_uses_with(cast.args[0], propagate_meta=False)
            graph.erase_node(cast)


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """What is a view of its result, views of views included."""
    for user in node.users:
        if user.target is operator.getitem or (isinstance(user.target, OpOverload) and user.target.is_view):
            yield user
            yield from _views(user)


def _rounds(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a node is a cast to this dtype and nothing else."""
    return node.target is CAST and {**node.kwargs} == {"dtype": dtype}
