"""What op by op refuses, with the line of the user's code that is running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch._ops import OpOverload

from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.escapes import frames
from jvpgraph.rules.apply import remedy

__all__ = ["NUMBER", "refusal", "unsupported", "user_line"]

PACKAGE = f"{Path(__file__).parents[1]}/"
NUMBER = "a tensor with a tangent becomes a Python number, which has none: keep it a tensor, or detach it"


def refusal(what: str, reason: str) -> UnsupportedOp:
    return UnsupportedOp([UnsupportedNode(what, "op by op", (), user_line(), reason)])


def unsupported(func: OpOverload, dots: dict[str, Any], reason: str) -> UnsupportedNode:
    return UnsupportedNode(str(func), "op by op", tuple(dots), user_line(), reason, remedy(func, tuple(dots)))


def user_line() -> str:
    """The innermost Python frame outside of torch and this package, whose code others' functions may have."""
    for frame in frames():
        package, code = frame.f_globals.get("__name__", "").split(".")[0], frame.f_code
        if package not in ("torch", "jvpgraph") and not code.co_filename.startswith(PACKAGE):
            name = getattr(code, "co_qualname", code.co_name)
            return f"{Path(code.co_filename).name}:{frame.f_lineno} in {name}"
    return "(no source line)"
