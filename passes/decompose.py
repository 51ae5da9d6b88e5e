"""Hand the compiler the graph that it would have traced itself."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from jvpgraph.graph.meta import TANGENT_META
from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.graph.strides import memory_of
from jvpgraph.passes.context import Context

__all__ = ["decompose"]

COPIES_IF_NEEDED = (torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)
NOT_INHERITED = ("val", "tensor_meta", "original_aten", "from_node", "eager_input_vals", TANGENT_META)


def decompose(gm: fx.GraphModule, context: Context) -> None:
    """Expand every op for which the compiler has a decomposition.

    Before: ``y = native_layer_norm(x, ...)``
    After:  ``var_mean(x) ... sub, mul, mul, add``

    Linearize works on the ops that PyTorch differentiates, where rules are short and numerically kind; the
    compiler wants the decomposed ones. Needs linearize; changes numerics exactly as the compiler's own tracing
    would. Does nothing for ``backend="eager"``. In the end views have values in the memory of what they view, see
    :func:`_share_memory`.
    """
    graph = gm.graph
    table = context.decompositions
    if not table:
        return
    recorder = Recorder(graph, table)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in table or not _gives_tensors(node):
            continue
        meta = {k: v for k, v in node.meta.items() if k not in NOT_INHERITED}
        with recorder.behind(node, meta, reuse=False):
            args, kwargs = recorder.stand_ins((node.args, node.kwargs))
            out = node.target(*args, **kwargs)
            outs = out if isinstance(out, (tuple, list)) else [out]
            new = [recorder.node_of(o) if isinstance(o, Tensor) else None for o in outs]
        if isinstance(value_of(node), (tuple, list)):
            for item in list(node.users):
                _replace(item, new[item.args[1]], graph)
        else:
            node.replace_all_uses_with(new[0], propagate_meta=False)
        graph.erase_node(node)
    _share_memory(graph, recorder)


def _share_memory(graph: fx.Graph, recorder: Recorder) -> None:
    """Give each view a value in the memory of the value that it views, as tracing does.

    The compiler asks there who aliases whom: which copies it may drop, as it may not where an output would become an
    input, and what may be written in place.
    """
    for node in graph.nodes:
        if node.target is operator.getitem and _is_view(node.args[0]):
            node.meta["val"] = value_of(node.args[0])[node.args[1]]
        elif _is_view(node) and _memory(node) != _memory(node.all_input_nodes[0]):
            node.meta["val"] = recorder.value_again(node)


def _is_view(node: fx.Node) -> bool:
    op = node.target
    return isinstance(op, OpOverload) and (op.is_view or op in COPIES_IF_NEEDED) and bool(node.all_input_nodes)


def _memory(node: fx.Node) -> int | None:
    value = value_of(node)
    parts = [value] if isinstance(value, Tensor) else value
    return memory_of(parts[0]) if parts else None


def _gives_tensors(node: fx.Node) -> bool:
    """Sizes, strides and other numbers, and assertions, are the compiler's: there is nothing to expand in them."""
    value = value_of(node)
    results = [r for r in (value if isinstance(value, (tuple, list)) else [value]) if r is not None]
    return bool(results) and all(isinstance(r, Tensor) for r in results)


def _replace(node: fx.Node, new: fx.Node | None, graph: fx.Graph) -> None:
    assert new is not None
    node.replace_all_uses_with(new, propagate_meta=False)
    graph.erase_node(node)
