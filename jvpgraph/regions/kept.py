"""What a region leaves to the code around it besides its output: attributes, items of lists and dicts.

Dynamo makes outputs of the graph of them, which its bytecode puts where they belong once the graph has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.torch_level import active_nodes, emit
from jvpgraph.markers import TANGENT_OF
from jvpgraph.precision import Policy, Precision, widened
from jvpgraph.rules.apply import has_tangent

__all__ = ["Kept", "with_answers"]

Kept = list[tuple[Tensor, Tensor | None]]  # with their tangents; None: they depend on nothing that has one


def with_answers(gm: fx.GraphModule, precision: Precision | Policy) -> Callable[[Any], tuple[Any, Kept]]:
    """Let ``gm`` give the tangents of what is kept too, as further outputs.

    Returns:
        What takes the outputs apart again: into those that the graph had, and what is kept.
    """
    output = gm.graph.output_node()
    outs: tuple[Any, ...] = tuple(output.args[0])  # type: ignore[arg-type]
    asked = gm.graph.find_nodes(op="call_function", target=TANGENT_OF)
    known = {*asked, *(user for marker in asked for user in marker.users), *(marker.args[0] for marker in asked)}
    kept = [
        i
        for i, node in enumerate(outs)
        if isinstance(node, fx.Node) and node.op != "placeholder" and node not in known and _has_tangent(node)
    ]
    active = active_nodes(gm)
    answers = []
    with gm.graph.inserting_before(output):
        for node in (outs[i] for i in kept):
            if node in active:
                dtype = widened(node.meta["example_value"].dtype, precision)
                answers.append(emit(node, "detach", emit(node, TANGENT_OF, node, False, dtype)))
    output.args = ((*outs, *answers),)
    gm.recompile()
    places = iter(range(len(outs), len(outs) + len(answers)))
    answered = [(i, next(places) if outs[i] in active else None) for i in kept]

    def apart(results: Any) -> tuple[Any, Kept]:
        return results[: len(outs)], [(results[i], None if j is None else results[j]) for i, j in answered]

    return apart


def _has_tangent(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and has_tangent(value)
