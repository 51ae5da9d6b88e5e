"""Send a primal and its tangent in one collective."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten

from jvpgraph.graph.meta import INSERTED_META, TANGENT_META
from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind

__all__ = ["pair_collectives"]

STACKED: dict[str, int] = {  # op -> the dim along which primal and tangent are stacked: one that it does not touch
    "_c10d_functional::reduce_scatter_tensor": 1,
    "_c10d_functional::all_to_all_single": 1,
    "_c10d_functional::broadcast": 0,
    "_dtensor::shard_dim_alltoall": -1,
}
COALESCED = {  # op -> the one that takes several tensors and launches once, on NCCL and on gloo
    "_c10d_functional::all_reduce": "all_reduce_coalesced",
    "_c10d_functional::all_gather_into_tensor": "all_gather_into_tensor_coalesced",
    "_c10d_functional::all_reduce_coalesced": "all_reduce_coalesced",
    "_c10d_functional::all_gather_into_tensor_coalesced": "all_gather_into_tensor_coalesced",
    "_c10d_functional::reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",  # once on NCCL only
}
WAIT = torch.ops._c10d_functional.wait_tensor.default
SYNCHRONOUS = ("_dtensor::shard_dim_alltoall",)


class Pair(NamedTuple):
    """A collective and the same one on its tangent."""

    primal: fx.Node
    tangent: fx.Node


def pair_collectives(gm: fx.GraphModule, context: Context) -> None:
    """Replace a collective and the same one on its tangent by one that carries both.

    Before: ``y = all_reduce(x, "sum", g);  y_dot = all_reduce(x_dot, "sum", g)``
    After:  ``y, y_dot = all_reduce_coalesced([x, x_dot], "sum", g)``

    or, for ops without a coalesced form that launches once, on both stacked along a dim that the op leaves alone.
    Needs linearize. What ``x_dot`` needs is moved in front of the collective; where that would need ``y``, the two
    stay apart. The backward keeps its collectives. A sum over more than two ranks may be rounded otherwise, because
    the position of an element in the message decides in which order its terms are added. Under activation
    checkpointing, the result of the collective is kept rather than communicated again with its tangent.

    A backward may repeat a collective of the forward, as that of a ring does which gathers keys and values anew. A
    compiler would see that they are the same, but not once one of them is paired: they become one before.
    """
    graph = gm.graph
    pairs = list(_pairs(graph))
    _merge_repeats(graph, pairs)
    recorder = Recorder(graph)
    for pair in pairs:
        if not _hoist(pair):
            continue
        name = pair.primal.target._schema.name  # type: ignore[union-attr]
        if name in COALESCED:
            _coalesce(pair, getattr(torch.ops._c10d_functional, COALESCED[name]).default, recorder)
        elif not _stack(pair, STACKED[name], recorder):
            continue
        context.report.paired += 1


def _pairs(graph: fx.Graph) -> Iterator[Pair]:
    named = {node.name: node for node in graph.nodes}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        primal = named.get(node.meta.get(TANGENT_META, ""))
        if primal is None:
            continue
        tangent = node.args[0] if node.target is operator.getitem else node
        same = isinstance(tangent.target, OpOverload) and tangent.target is primal.target and tangent not in found
        if same and tangent.target._schema.name in (*STACKED, *COALESCED) and _how(tangent) == _how(primal):
            found.add(tangent)
            yield Pair(primal, tangent)


def _merge_repeats(graph: fx.Graph, pairs: list[Pair]) -> None:
    """Let primals stand for later collectives that send the same, unless these are in pairs themselves."""
    primals, paired = {pair.primal for pair in pairs}, {node for pair in pairs for node in pair}
    first: dict[Any, fx.Node] = {}  # what a node computes -> the first that does
    same: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes) if pairs else ():
        if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        leaves, structure = tree_flatten((node.args, node.kwargs))
        computed = tuple((type(x), same.get(x, x) if isinstance(x, fx.Node) else x) for x in leaves)
        same[node] = first.setdefault((node.target, str(structure), computed), node)
        if same[node] in primals and node not in paired:
            node.replace_all_uses_with(same[node], propagate_meta=False)
            graph.erase_node(node)


def _how(collective: fx.Node) -> list[Any]:
    """Every argument but what is sent."""
    return list(bind(collective.target, collective.args, collective.kwargs).values())[1:]  # type: ignore[arg-type]


def _hoist(pair: Pair) -> bool:
    """Move what the tangent needs in front of the primal; False, and nothing moved, where it needs the primal."""
    needed: set[fx.Node] = set()
    stack = list(pair.tangent.all_input_nodes)
    while stack:
        node = stack.pop()
        if node is pair.primal:
            return False
        if pair.primal < node and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in sorted(needed):
        pair.primal.prepend(node)
    return True


def _coalesce(pair: Pair, op: OpOverload, recorder: Recorder) -> None:
    with recorder.behind(pair.primal, reuse=False):
        sent = [recorder.stand_ins(_listed(node.args[0])) for node in pair]
        outs = [recorder.node_of(out) for out in op([*sent[0], *sent[1]], *recorder.stand_ins(_how(pair.primal)))]
    halves = outs[: len(sent[0])], outs[len(sent[0]) :]
    for old, new in zip(pair, halves):
        if isinstance(value_of(old), Tensor):
            _replace(old, new[0])
        else:
            for item in list(old.users):
                index: Any = item.args[1]
                _replace(item, new[index])
            old.graph.erase_node(old)


def _listed(sent: Any) -> list[fx.Node]:
    return [sent] if isinstance(sent, fx.Node) else list(sent)


def _stack(pair: Pair, dim: int, recorder: Recorder) -> bool:
    """False, and nothing changed, where somebody takes the results otherwise than by waiting for them."""
    op: Any = pair.primal.target
    synchronous = op._schema.name in SYNCHRONOUS
    ends = [[node] if synchronous else list(node.users) for node in pair]  # what gives the result, one list each
    waited = synchronous or all(node.target is WAIT for nodes in ends for node in nodes)
    counted = all(where >= 0 for where in _how(pair.primal)[:2]) if synchronous else True
    if not waited or not counted or not value_of(pair.primal).is_contiguous():
        return False
    with recorder.behind(pair.primal, reuse=False):
        sent = [recorder.stand_ins(node.args[0]) for node in pair]
        both = recorder.node_of(op(torch.stack(sent, dim), *recorder.stand_ins(_how(pair.primal))))
    with recorder.behind(both if synchronous else min(ends[0] + ends[1]), reuse=False):
        settled = recorder.stand_in(both) if synchronous else WAIT(recorder.stand_in(both))
        # Copies, so that what is kept of the primal does not keep the tangent.
        copies = [half.clone(memory_format=torch.contiguous_format) for half in settled.unbind(dim)]
        halves = [recorder.node_of(copy) for copy in copies]
    for nodes, half in zip(ends, halves):
        for node in nodes:
            _replace(node, half)
    if not synchronous:
        for node in pair:
            node.graph.erase_node(node)
    return True


def _replace(old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` stand for ``old``, and be the primal of its tangent."""
    new.meta.update({key: old.meta[key] for key in (TANGENT_META, INSERTED_META) if key in old.meta})
    for user in old.users:
        if user.target is WAIT:
            user.meta.pop("recompute", None)
    tangents = [node for node in old.graph.nodes if node.meta.get(TANGENT_META) == old.name]
    old.replace_all_uses_with(new, propagate_meta=False)
    old.graph.erase_node(old)
    for node in tangents:
        node.meta[TANGENT_META] = new.name
