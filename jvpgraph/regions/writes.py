"""What a region's graph may not do to what the code around it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from jvpgraph.errors import CaptureError
from jvpgraph.graph.torch_level import GET_DATA
from jvpgraph.markers import MAKE_DUAL
from jvpgraph.rules.apply import has_tangent

__all__ = ["is_number", "refuse_writes"]


def refuse_writes(gm: fx.GraphModule) -> None:
    """A graph's writes to what it is given do not reach the tangents of the caller's tensor."""
    for node in gm.graph.find_nodes(op="call_function", target=GET_DATA):
        if _version(node.meta.get("example_value")):  # of its own: that of the tensor does not count what .data does
            raise CaptureError(f"it writes to {node.args[0]}.data, which the code around it may see")
    for node in gm.graph.find_nodes(op="call_function", target=Tensor.set_):
        raise CaptureError(f"it gives {node.args[0]} another .data, which the code around it may see")
    placeholders = gm.graph.find_nodes(op="placeholder")
    markers = gm.graph.find_nodes(op="call_function", target=MAKE_DUAL)
    if not any(_version(n.meta.get("example_value")) for n in placeholders + markers):
        return
    # Making a fake of a view counts as a write, too: run the graph on fresh ones.
    fakes = [n.meta["example_value"] for n in placeholders]
    mode = next(x.fake_mode for x in fakes if isinstance(x, FakeTensor))
    with mode, torch.no_grad():
        given = [x.detach().clone() if isinstance(x, Tensor) else x for x in fakes]
        fx.Interpreter(gm).run(*given)
    written = [node for node, x in zip(placeholders, given) if _version(x)]
    written += [marker.args[0] for marker in markers if _version(marker.meta["example_value"])]
    if written:
        raise CaptureError(f"it writes to {written[0].name} in place, which the code around it may see")


def is_number(placeholder: fx.Node) -> bool:
    """Whether a Python number is given, of which Dynamo makes a tensor."""
    given = placeholder.meta.get("grapharg")
    return given is not None and not given.is_tensor


def _version(x: Any) -> int:
    return x._version if has_tangent(x) else 0
