"""Hand the compiler the graph that it would have traced itself."""

from __future__ import annotations

from torch import Tensor, fx

from jvpgraph.linearize import TANGENT_META
from jvpgraph.passes.context import Context
from jvpgraph.trace import Recorder, value_of

__all__ = ["decompose"]

NOT_INHERITED = ("val", "tensor_meta", "original_aten", "from_node", "eager_input_vals", TANGENT_META)


def decompose(graph: fx.Graph, context: Context) -> None:
    """Expand every op for which the compiler has a decomposition.

    Before: ``y = native_layer_norm(x, ...)``
    After:  ``var_mean(x) ... sub, mul, mul, add``

    Linearize works on the ops that PyTorch differentiates, where rules are short and numerically kind; the
    compiler wants the decomposed ones. Needs linearize; changes numerics exactly as the compiler's own tracing
    would. Does nothing for ``backend="eager"``.
    """
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


def _gives_tensors(node: fx.Node) -> bool:
    """Sizes, strides and other numbers, and assertions, are the compiler's: there is nothing to expand in them."""
    value = value_of(node)
    results = [r for r in (value if isinstance(value, (tuple, list)) else [value]) if r is not None]
    return bool(results) and all(isinstance(r, Tensor) for r in results)


def _replace(node: fx.Node, new: fx.Node | None, graph: fx.Graph) -> None:
    assert new is not None
    node.replace_all_uses_with(new, propagate_meta=False)
    graph.erase_node(node)
