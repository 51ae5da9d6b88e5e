"""flex_attention's mask_mod and score_mod: graphs of 0-dim indices, put on tensors of indices that broadcast."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from jvpgraph.graph.torch_level import active_nodes, emit, fake_mode_of, is_in_place

__all__ = ["adds_to_the_score", "check_is_pointwise", "inlined", "result_of"]

SHAPES = ((2, 1, 1, 1), (3, 1, 1), (5, 1), (7,))  # of batch entry, head, query and key
MAKERS = ("new_ones", "new_zeros", "new_full", "new_tensor")
ADDS = (operator.add, torch.add, "add")
SUBTRACTS = (operator.sub, torch.sub, torch.subtract, "sub", "subtract")
WHERES = (torch.where, "where")


def result_of(body: fx.GraphModule) -> Any:
    (result,) = body.graph.output_node().args
    return result[0] if isinstance(result, (tuple, list)) else result


def check_is_pointwise(body: fx.GraphModule, captured: Sequence[fx.Node], what: str) -> None:
    """Raise ValueError unless each node that depends on an index is one of numbers, so that its ops broadcast, and none
    writes. A row of a table, or a sum, would be another on tensors of indices.

    Args:
        body: of (score,) batch entry, head, query, key and what was captured.
        what: mask_mod or score_mod, for the message.
    """
    placeholders = body.graph.find_nodes(op="placeholder")
    own = placeholders[: len(placeholders) - len(captured)]
    fake_mode = fake_mode_of(placeholders[0].meta["example_value"])
    known = dict(zip(placeholders[len(own) :], (x.meta["example_value"] for x in captured)))
    with fake_mode, torch.no_grad():
        of_all = [torch.broadcast_shapes(*SHAPES)] * (len(own) - len(SHAPES))
        for placeholder, shape in zip(own, (*of_all, *SHAPES)):
            example = placeholder.meta["example_value"]
            known[placeholder] = torch.zeros(shape, dtype=example.dtype, device=example.device)
        of_index = set(own)
        for inner in body.graph.nodes:
            if inner.op not in ("call_function", "call_method"):
                continue
            if is_in_place(inner):
                raise ValueError(f"flex_attention whose {what} writes to a tensor ({inner.target})")
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), known.__getitem__)
            run = getattr(args[0], inner.target) if inner.op == "call_method" else inner.target
            given = [x for x in inner.all_input_nodes if x in of_index]
            try:
                known[inner] = run(*(args[1:] if inner.op == "call_method" else args), **kwargs)
                pointwise = not given or known[inner].shape in (
                    torch.broadcast_shapes(*(known[x].shape for x in given)),
                    torch.Size(()) if inner.target in MAKERS else None,
                )
            except Exception as error:
                raise ValueError(f"flex_attention whose {what} has {inner.name}, {error}") from error
            if not pointwise:
                raise ValueError(
                    f"flex_attention whose {what} has {inner.name} ({inner.target}), which is not pointwise in the "
                    "indices: index tables by all of their dims at once, as in table[q, k]"
                )
            if given:
                of_index.add(inner)


def inlined(node: fx.Node, body: fx.GraphModule, arguments: Sequence[Any]) -> Any:
    """The nodes of body at the cursor of node's graph, with arguments in place of its placeholders."""
    known = dict(zip(body.graph.find_nodes(op="placeholder"), arguments))
    for inner in body.graph.nodes:
        if inner.op in ("placeholder", "output"):
            continue
        if inner.op not in ("call_function", "call_method"):
            raise ValueError(f"a flex_attention has a {inner.op} in the graph of its mask_mod or score_mod")
        args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), known.__getitem__)
        known[inner] = emit(node, inner.target, *args, **kwargs)
    return known[result_of(body)]


def adds_to_the_score(score_mod: fx.GraphModule) -> bool:
    """Whether it is score + f(indices), also less what a condition on the indices hides: score_mod(0) is a bias."""
    score, *_ = score_mod.graph.find_nodes(op="placeholder")
    follows = active_nodes(score_mod, {score})
    node = result_of(score_mod)
    while node is not score:
        if not isinstance(node, fx.Node) or node.kwargs:
            return False
        depends = [x in follows for x in node.args]
        adds = node.target in ADDS and sum(depends) == 1
        subtracts = node.target in SUBTRACTS and depends == [True, False]
        hides = node.target in WHERES and depends == [False, True, False] and node.args[2] == -math.inf
        if not (adds or subtracts or hides):
            return False
        node = node.args[depends.index(True)]
    return True
