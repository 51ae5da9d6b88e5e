"""The sweep over kinds of bug reports is checked itself: it tells right, refused, wrong and raw apart."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.kinds.programs import KINDS, TWINS, StraightThrough
from tests.kinds.run import Verdict, calls, examine


class Forgets(StraightThrough):
    """What a lost tangent looks like."""

    @staticmethod
    def jvp(ctx, v):
        return torch.zeros_like(v)


class HalfOfTheGradient(torch.autograd.Function):
    """Forward AD and backward disagree, as the oracle's and the graph's might."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g / 2 if torch.compiler.is_compiling() else g

    @staticmethod
    def jvp(ctx, v):
        return v


def raises_in_a_call_with_tangents(x):
    if _get_current_dispatch_mode() is not None:
        raise RuntimeError("not the package's own")
    return x * 2


PLANTED = {
    "lost": (lambda x: Forgets.apply(x.sin()) + x.round().detach(), "wrong", "tangent"),
    "half": (HalfOfTheGradient.apply, "wrong", "gradient"),
    "raw": (raises_in_a_call_with_tangents, "raw", "not the package's own"),
    "refused": (lambda x: x * x.sum().item(), "refused", "test_kinds.py"),
    "right": (lambda x: x.sin(), "right", ""),
}


@pytest.mark.parametrize("name", PLANTED)
def test_verdicts(name, monkeypatch):
    kind, what, why = PLANTED[name]
    monkeypatch.setitem(KINDS, name, kind)
    if name == "lost":
        monkeypatch.setitem(TWINS, name, lambda x: x.sin() + (x.sin() + x.round() - x.sin()).detach())
    way = "eager" if name == "half" else "op_by_op"
    verdict = examine([name], way, torch.float32, {name: calls(name, torch.float32)})[name]
    assert (verdict.what, why in verdict.why) == (what, True), verdict
    assert isinstance(verdict, Verdict)
