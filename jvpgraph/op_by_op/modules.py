"""Which module an op runs in, op by op."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from jvpgraph.dual_forward import is_dual_forward
from jvpgraph.escapes import frames

__all__ = ["module_path"]

_CALL = nn.Module._call_impl.__code__
_NAMES: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, str]] = WeakKeyDictionary()


def module_path() -> str:
    """The path of the innermost module that is being called, in the outermost one of the dual call.

    From Python's frames: hooks would stop Dynamo, which captures what runs in regions.
    """
    called: list[nn.Module] = []
    for frame in frames():
        if frame.f_code is _CALL:
            called.append(frame.f_locals["self"])
        elif is_dual_forward(frame.f_code):
            break
    if not called:
        return ""
    inner, outer = called[0], called[-1]
    names = _NAMES.get(outer)
    if names is None or inner not in names:  # new, or modules were added since
        names = _NAMES[outer] = WeakKeyDictionary((module, name) for name, module in outer.named_modules())
    return names.get(inner, "")
