"""Every error that jvpgraph raises on purpose.

Two families: :class:`ValueError` for what a caller passed, and the classes below for what a model does that cannot
be differentiated. Each message says what happened, where in the user's code, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CaptureError",
    "JvpgraphError",
    "MarkerExecuted",
    "NonFiniteTangent",
    "UnsupportedNode",
    "UnsupportedOp",
    "VerifyError",
]


class JvpgraphError(Exception):
    """Base class of the errors that are not ValueErrors."""


class CaptureError(JvpgraphError):
    """torch.compile could not capture the model as one graph, or not compile that graph."""


class MarkerExecuted(JvpgraphError, RuntimeError):
    """A marker ran as an op: the code around it was not compiled by a backend of this package."""


class NonFiniteTangent(JvpgraphError, ArithmeticError):
    """A tangent is NaN or infinite; the message names the first module and op that produced it."""


class VerifyError(JvpgraphError, AssertionError):
    """A pass left an illegal graph: a bug in jvpgraph. The message names the pass and the node."""


REMEDY = "Register a rule with jvpgraph.rules.jvp, or keep the input out of the tangents."


@dataclass(frozen=True)
class UnsupportedNode:
    """One op on the tangent path that has no rule."""

    op: str
    name: str
    inputs: tuple[str, ...]
    where: str
    reason: str = ""
    remedy: str = REMEDY

    def __str__(self) -> str:
        what = f"{self.op} ({self.name}, input {', '.join(self.inputs)})" if self.inputs else f"{self.op} ({self.name})"
        return "  ".join(part for part in (what, self.where, self.reason) if part)


class UnsupportedOp(JvpgraphError, NotImplementedError):
    """Ops on the tangent path that have no JVP, all of them at once, each with the user's source line."""

    def __init__(self, nodes: Sequence[UnsupportedNode]):
        self.nodes = tuple(nodes)
        count = f"{len(self.nodes)} op{'s' if len(self.nodes) != 1 else ''}"
        verb = "has" if len(self.nodes) == 1 else "have"
        lines = "\n".join(f"  {node}" for node in self.nodes)
        remedies = "\n".join(dict.fromkeys(node.remedy for node in self.nodes))
        super().__init__(f"{count} on the tangent path {verb} no JVP\n{lines}\n{remedies}")

    def __reduce__(self) -> tuple[type, tuple[tuple[UnsupportedNode, ...]]]:  # the message is made from the nodes
        return type(self), (self.nodes,)


class Explained(JvpgraphError):
    """Instead of running a graph that is only to be explained."""


# Reasons that more than one place refuses for.
NUMBER_HAS_NO_TANGENT = (
    "a tensor with a tangent becomes a Python number, which has none, and a tensor is made of that: keep it a tensor, "
    "or detach it"
)
ABSOLUTE = (
    "as_strided with an offset counts from the start of the memory of an input that begins further on: pass x.clone(), "
    "or use as_strided without an offset"
)
