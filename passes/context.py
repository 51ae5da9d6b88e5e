"""What passes share: the settings, and the report that they fill in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from jvpgraph.config import Config

__all__ = ["Attention", "Context", "Report", "StepReport"]

Attention = tuple[str, str, str]  # node, the user's line, and the form it had or the reason why it was left


@dataclass(frozen=True)
class StepReport:
    """The graph after one step.

    Attributes:
        stage: where the graph is on its way: "torch", "before autograd", "ATen", "after autograd".
        name: of the step; of the first of a stage, how the graph arrived there.
        milliseconds: that it took.
        nodes: in the graph.
        changes: by op, how many nodes more there are than before; negative for fewer.
        text: the graph as readable Python, with ``Config(keep_graphs=True)``; else empty.
    """

    stage: str
    name: str
    milliseconds: float
    nodes: int
    changes: dict[str, int]
    text: str = field(default="", repr=False)

    def __str__(self) -> str:
        changes = ", ".join(f"{n:+d} {op}" for op, n in self.changes.items()) or "no change"
        return f"{self.stage}: {self.name}, {self.milliseconds:.1f} ms, {self.nodes} nodes, {changes}"


@dataclass
class Report:
    """Everything that was done to one captured graph.

    Attributes:
        swapped: calls of attention that became our op: (node, source line, form).
        left: calls of attention that did not: (node, source line, reason).
        rules: how many nodes of which ATen op were differentiated by the rule "table", or by a formula that is
            "derived" from PyTorch's.
        precisions: how many nodes of half precision have a tangent of which precision.
        active: nodes with a tangent.
        inactive: other ATen nodes of the forward.
        fused: attention calls that are computed together with their tangent.
        kernels: what computes attention, and its gradients.
        collectives: by op.
        paired: collectives that carry a primal and its tangent.
        primal_flops, tangent_flops, backward_flops: in the symbols of ``sizes``; a multiply-add counts 2.
        upper_bounds: calls of attention with a block mask that is data, which count as if it kept all tiles.
        sizes: symbol -> (where it comes from, its value in the first call).
        graphs: every graph from Dynamo's to the last, with the step that made it.
        passes_ran: whether the passes on the ATen graph did; not where the compiler had the result in its cache.
    """

    swapped: list[Attention] = field(default_factory=list)
    left: list[Attention] = field(default_factory=list)
    rules: dict[str, Counter[str]] = field(default_factory=lambda: {"table": Counter(), "derived": Counter()})
    precisions: Counter[str] = field(default_factory=Counter)
    active: int = 0
    inactive: int = 0
    fused: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    paired: int = 0
    primal_flops: sympy.Expr = sympy.S.Zero
    tangent_flops: sympy.Expr = sympy.S.Zero
    backward_flops: sympy.Expr = sympy.S.Zero
    upper_bounds: int = 0
    sizes: dict[sympy.Symbol, tuple[str, int]] = field(default_factory=dict)
    graphs: list[StepReport] = field(default_factory=list)
    passes_ran: bool = False


@dataclass
class Context:
    """Handed to every step."""

    config: Config
    report: Report = field(default_factory=Report)
    example_inputs: Sequence[Any] = ()  # of the torch-level graph
    precisions: str = ""  # what a policy of Config.tangent_precision comes to in this graph, for caches
    decompositions: dict[Any, Any] | None = None  # of the compiler that comes next; None: leave the graph as it is
