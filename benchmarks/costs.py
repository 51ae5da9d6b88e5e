"""What the graph of one rank costs: FLOPs, what its collectives send, what it holds."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._ops import OpOverload

from jvpgraph.config import Config
from jvpgraph.passes.context import Context
from jvpgraph.passes.count import count
from jvpgraph.rules.apply import bind

__all__ = ["Traffic", "bytes_of", "flops", "input_bytes", "peak_memory", "saved", "traffic"]


@dataclass
class Traffic:
    """What a rank sends."""

    sent: Counter[str] = field(default_factory=Counter)  # bytes, by kind of collective
    launches: int = 0

    @property
    def total(self) -> int:
        return self.sent.total()


def flops(graph: fx.Graph) -> tuple[int, int, int]:
    """(primal, tangent, backward)."""
    context = Context(Config())
    count(graph.owning_module or fx.GraphModule({}, graph), context)
    report = context.report
    return int(report.primal_flops), int(report.tangent_flops), int(report.backward_flops)


def traffic(graph: fx.Graph) -> Traffic:
    """What the collectives of a graph send, by the best known algorithm of each.

    Raises:
        ValueError: a collective that is not known here.
    """
    found = Traffic()
    for node in graph.nodes:
        op = node.target
        if not isinstance(op, OpOverload) or not op.namespace.startswith("_c10d_functional") or "wait" in op.__name__:
            continue
        arguments = bind(op, node.args, node.kwargs)
        tensors = fx.node.map_arg(node.args[0], lambda n: n.meta["val"])
        size = sum(bytes_of(x) for x in (tensors if isinstance(tensors, (list, tuple)) else [tensors]))
        group = dist.distributed_c10d._resolve_process_group(arguments["group_name"])
        ranks, kind = group.size(), op._schema.name.split("::")[1].removesuffix("_coalesced")
        if kind == "all_reduce":
            sent = 2 * (ranks - 1) * size // ranks
        elif kind == "all_gather_into_tensor":
            sent = (ranks - 1) * size
        elif kind == "reduce_scatter_tensor":
            sent = (ranks - 1) * size // ranks
        elif kind == "all_to_all_single":
            rows = arguments["input_split_sizes"]
            sent = size * (sum(rows) - rows[group.rank()]) // sum(rows)
        else:
            raise ValueError(f"what does {op} send? It is not in benchmarks/costs.py")
        found.sent[kind.removesuffix("_into_tensor").removesuffix("_tensor").removesuffix("_single")] += sent
        found.launches += 1
    return found


def peak_memory(graph: fx.Graph) -> int:
    """The most bytes that results of ops take at once, if each is freed after its last reader."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    memories: dict[fx.Node, list[int]] = {}  # owner -> bytes, when made, when read last
    for node, now in position.items():
        owner = _memory_of(node)
        if node is owner and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            made = position[node.all_input_nodes[0]] if node.target is operator.getitem else now
            memories[node] = [bytes_of(node.meta["val"]), made, now]
        if owner in memories:
            memories[owner][2] = max([memories[owner][2], *(position[user] for user in node.users)])
    change: Counter[int] = Counter()
    for size, made, last in memories.values():
        change[made] += size
        change[last + 1] -= size
    live = peak = 0
    for now in sorted(change):
        live += change[now]
        peak = max(peak, live)
    return peak


def saved(forward: fx.Graph, results: int) -> int:
    """Bytes of what the forward keeps for the backward, after its ``results``, without parameters and inputs."""
    kept = forward.output_node().args[0][results:]
    owners = {_memory_of(node) for node in kept if isinstance(node, fx.Node)}
    return sum(bytes_of(owner.meta["val"]) for owner in owners if owner.op == "call_function")


def _memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one is, or is a view of."""
    while node.op == "call_function" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        made_by = source.target if node.target is operator.getitem else node.target
        if not isinstance(made_by, OpOverload) or not (made_by.is_view or made_by in SAME_MEMORY):
            return node
        node = source
    return node


SAME_MEMORY = (
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.detach.default,
    torch.ops._c10d_functional.wait_tensor.default,
)


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def input_bytes(inputs: Any) -> int:
    return sum(bytes_of(x) for x in torch.utils._pytree.tree_leaves(inputs))
