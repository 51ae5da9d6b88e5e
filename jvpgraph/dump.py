"""Seeing the graph: one readable Python file per pass, and a diff to the one before.

``JVPGRAPH_DUMP=folder`` (or ``Config(dump=...)``) writes ``folder/000_graph/00_captured.py``,
``01_linearize.py``, ``01_linearize.diff`` and so on, one sub-folder per captured graph. The same texts go to
torch's structured trace, where ``tlparse`` shows them.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._logging import trace_structured

from jvpgraph.linearize import NO_SOURCE, TANGENT_META, source_line

__all__ = ["Dump", "readable"]


def readable(graph: fx.Graph, title: str) -> str:
    """The graph as a Python function, with shapes, dtypes and the user's source lines as comments."""
    lines = [f'"""{title}"""', "", "from torch import device", "from torch.ops import aten, jvpgraph", ""]
    inputs = [node.name for node in graph.find_nodes(op="placeholder")]
    lines.append(f"def graph({', '.join(inputs)}):")
    where = None
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"    return {node.args[0]}")
            continue
        here = source_line(node)
        if node.op != "placeholder" and here not in (where, NO_SOURCE):
            lines += ["", f"    # {here}"]
            where = here
        comment = _shape(node.meta.get("val"))
        if node.meta.get(TANGENT_META):
            comment += f"   tangent of {node.meta[TANGENT_META]}"
        lines.append(f"    {_statement(node)}  # {comment}" if comment else f"    {_statement(node)}")
    return "\n".join(lines) + "\n"


def _statement(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"{node.name}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    target = (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )
    if target == "getitem":
        return f"{node.name} = {node.args[0]}[{node.args[1]}]"
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{node.name} = {target}({', '.join(arguments)})"


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(str(s) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(_shape(v) for v in value)
    return str(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else ""


class Dump:
    """Writes one graph after each pass; does nothing on disk without a folder."""

    def __init__(self, folder: str | None):
        self._folder: Path | None = None
        self._previous = ""
        self._count = 0
        if folder:
            root = Path(folder)
            root.mkdir(parents=True, exist_ok=True)
            number = sum(1 for path in root.iterdir() if path.is_dir())
            self._folder = root / f"{number:03d}_graph"
            self._folder.mkdir()

    def write(self, graph: fx.Graph, name: str) -> None:
        """Write the graph as it is after the pass ``name``."""

        def payload() -> str:
            return readable(graph, f"{name}: the graph after this pass")

        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"jvpgraph_{self._count:02d}_{name}", "encoding": "string"},
            payload_fn=payload,
        )
        if self._folder is not None:
            text, stem = payload(), f"{self._count:02d}_{name}"
            (self._folder / f"{stem}.py").write_text(text)
            if self._previous:
                diff = difflib.unified_diff(
                    self._previous.splitlines(True), text.splitlines(True), "before", f"after {name}"
                )
                (self._folder / f"{stem}.diff").write_text("".join(diff))
            self._previous = text
        self._count += 1
