"""What nodes carry: the keys of their metadata, and the user's line that they come from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

__all__ = [
    "INHERITED_META",
    "INSERTED_META",
    "NO_SOURCE",
    "OUTPUTS_META",
    "TANGENT_META",
    "module_path",
    "source_line",
    "traced_for",
]

TANGENT_META = "jvpgraph_tangent_of"  # on a tangent node: the name of its primal
INSERTED_META = "jvpgraph_inserted"  # on every node that linearize inserted
INHERITED_META = ("stack_trace", "nn_module_stack", "seq_nr")  # what a new node takes from the one it stands behind
OUTPUTS_META = "jvpgraph_memory_of_outputs"  # on the output node: what owns the memory of each output
NO_SOURCE = "(no source line)"
# How frames of torch's own code start, and of what we trace in place of other packages' functions.
NOT_THE_USERS = f'"{Path(torch.__file__).parent}/', f'"{Path(__file__).parents[1] / "foreign"}/'

_ITEM = re.compile(r"\[(?:'([^']*)'|(\d+))\]")  # as older versions of Dynamo name what a module holds


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's code that led to a node, as ``file.py:12 in Block.forward``."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return NO_SOURCE
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    frames = [frame for frame in frames if not any(folder in frame for folder in NOT_THE_USERS)] or frames
    if not frames:
        return NO_SOURCE
    path, line, function = (part.strip() for part in frames[-1].split(",", 2))
    stack = node.meta.get("nn_module_stack") or {}
    owner = ""
    if stack:
        kind = list(stack.values())[-1][1]
        owner = (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1] + "."
    name = path.removeprefix("File ").strip('"').rsplit("/", 1)[-1]
    return f"{name}:{line.removeprefix('line ')} in {owner}{function.removeprefix('in ').strip()}"


def module_path(node: fx.Node) -> str:
    """Of the module that a node belongs to, as it is called in the model; in a function, in the outermost module."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    if not paths:
        return ""
    inside = paths[-1].removeprefix(paths[0])
    return _ITEM.sub(r".\1\2", inside).replace("._modules", "").removeprefix(".")


def traced_for(node: fx.Node) -> str:
    """Of a node that was traced in place of another package's function, that of ours; else empty."""
    frames = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    ours = (frame for frame in frames if frame.startswith(f"File {NOT_THE_USERS[1]}"))
    first = next(ours, "")
    return first.rsplit(" in ", 1)[-1]
