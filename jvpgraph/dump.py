"""Seeing the graph: one readable Python file per pass, and a diff to the one before.

``JVPGRAPH_DUMP=folder`` (or ``Config(dump=...)``) writes ``folder/000_graph/00_captured.py``, what Dynamo gave out,
``01_swap_attention.py``, ``01_swap_attention.diff`` and so on to the last graph, one sub-folder per captured graph.
Each is headed by its pass and how long that took. The same texts go to torch's structured trace, where ``tlparse``
shows them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._logging import trace_structured

from jvpgraph.graph.meta import NO_SOURCE, TANGENT_META, source_line

__all__ = ["Dump", "readable"]


def readable(gm: fx.GraphModule, title: str) -> str:
    """The graph as a Python function, with shapes, dtypes and the user's source lines as comments; the bodies of its
    higher-order ops are functions before it."""
    lines = [f'"""{title}"""', "", "from torch import device", "from torch.ops import aten, jvpgraph", ""]
    bodies = [(name, module) for name, module in gm.named_modules() if name and isinstance(module, fx.GraphModule)]
    for name, module in [*reversed(bodies), ("graph", gm)]:
        lines += ["", *_function(module.graph, name.replace(".", "_")), ""]
    return "\n".join(lines).rstrip() + "\n"


def _function(graph: fx.Graph, name: str) -> Iterator[str]:
    inputs = [node.name for node in graph.find_nodes(op="placeholder")]
    yield f"def {name}({', '.join(inputs)}):"
    where = None
    for node in graph.nodes:
        if node.op == "output":
            yield f"    return {node.args[0]}"
            continue
        here = source_line(node)
        if node.op != "placeholder" and here not in (where, NO_SOURCE):
            yield ""
            yield f"    # {here}"
            where = here
        comment = _shape(node.meta.get("val", node.meta.get("example_value")))
        if node.meta.get(TANGENT_META):
            comment += f"   tangent of {node.meta[TANGENT_META]}"
        yield f"    {_statement(node)}  # {comment}" if comment else f"    {_statement(node)}"


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
    if node.op == "call_method":
        target = f"{node.args[0]}.{target}"
        return f"{node.name} = {target}({', '.join(_arguments(node.args[1:], node.kwargs))})"
    if target == "getitem":
        return f"{node.name} = {node.args[0]}[{node.args[1]}]"
    return f"{node.name} = {target}({', '.join(_arguments(node.args, node.kwargs))})"


def _arguments(args: Iterable[object], kwargs: Mapping[str, object]) -> list[str]:
    return [str(a) for a in args] + [f"{k}={v}" for k, v in kwargs.items()]


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

    def write(self, name: str, text_of: Callable[[], str], keep: bool = False) -> str:
        """Write the graph as it is after the step ``name``. Returns its text if that is to be kept, else nothing."""
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"jvpgraph_{self._count:02d}_{name}", "encoding": "string"},
            payload_fn=text_of,
        )
        text = text_of() if keep or self._folder is not None else ""
        if self._folder is not None:
            stem = f"{self._count:02d}_{name}"
            (self._folder / f"{stem}.py").write_text(text)
            if self._previous:
                diff = difflib.unified_diff(
                    self._previous.splitlines(True), text.splitlines(True), "before", f"after {name}"
                )
                (self._folder / f"{stem}.diff").write_text("".join(diff))
            self._previous = text
        self._count += 1
        return text if keep else ""
