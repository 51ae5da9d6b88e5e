"""What the outputs of an ATen graph share their memory with."""

from __future__ import annotations

from typing import Any

from torch import fx

from jvpgraph.graph.strides import memory_of

__all__ = ["owners_of_outputs"]


def owners_of_outputs(output: fx.Node) -> list[Any]:
    """Per output what has its memory: an input, by name, or the first output that does."""
    owner: dict[Any, Any] = {_memory(node): node.name for node in output.graph.find_nodes(op="placeholder")}
    return [owner.setdefault(_memory(x) or i, i) for i, x in enumerate(output.args[0])]  # type: ignore[arg-type]


def _memory(node: Any) -> int | None:
    """A storage's address, which is no small number, as positions are."""
    return memory_of(node.meta.get("val")) if isinstance(node, fx.Node) else None
