"""What the outputs of an ATen graph share their memory with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["owners_of_outputs"]


def owners_of_outputs(output: fx.Node) -> list[Any]:
    """Per output what has its memory: an input, by name, or the first output that does."""
    owner: dict[Any, Any] = {_memory(node): node.name for node in output.graph.find_nodes(op="placeholder")}
    return [owner.setdefault(_memory(x) or i, i) for i, x in enumerate(output.args[0])]  # type: ignore[arg-type]


def _memory(node: Any) -> Any:
    """None where that is not known; a storage's address is no small number, as positions are."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    dense = isinstance(value, Tensor) and hasattr(value, "fake_mode") and value.layout is torch.strided
    return value.untyped_storage()._cdata if dense and isinstance(value, Tensor) else None
