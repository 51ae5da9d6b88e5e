"""What passes share: the settings, and the report they fill in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import sympy

from jvpgraph.config import Config
from jvpgraph.linearize import Linearization

__all__ = ["Context", "Report"]


@dataclass
class Report:
    """Everything that ``explain()`` tells about one captured graph."""

    attention: list[Any] = field(default_factory=list)  # one SwapReport per torch-level pass
    linearization: Linearization = field(default_factory=Linearization)
    fused: int = 0  # attention calls computed together with their tangent
    kernels: Counter[str] = field(default_factory=Counter)  # what computes attention
    collectives: Counter[str] = field(default_factory=Counter)
    paired: int = 0  # collectives that carry a primal and its tangent
    primal_flops: sympy.Expr = sympy.S.Zero
    tangent_flops: sympy.Expr = sympy.S.Zero
    sizes: dict[sympy.Symbol, tuple[str, int]] = field(default_factory=dict)  # symbol -> where from, value


@dataclass
class Context:
    """Handed to every pass."""

    config: Config
    report: Report
    decompositions: dict[Any, Any] | None = None  # of the compiler that comes next; None: leave the graph as it is
