"""What a check reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from jvpgraph.errors import JvpgraphError

__all__ = ["Comparison", "Deviation", "JvpCheck", "JvpMismatch"]


class JvpMismatch(JvpgraphError, AssertionError):
    """The transformed model is not right; ``report`` and the message say where."""

    def __init__(self, report: JvpCheck):
        self.report = report
        super().__init__(str(report))

    def __reduce__(self) -> Any:
        return type(self), (self.report,)


@dataclass(frozen=True)
class Comparison:
    """One comparison: ``|got - wanted| <= tolerance * |wanted|`` in the Euclidean norm of a leaf."""

    what: str  # "value", "tangent", "linearity", "scaling", "gradient", "autograd"
    where: str  # the output leaf by its dotted path, or the parameter
    error: float  # relative; NaN where something is not finite, infinite where shapes or types differ
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        where = self.where if len(self.where) <= 40 else "..." + self.where[-37:]
        verdict = "" if self.right else "  WRONG"
        return f"{self.what:10s} {where:40s} error {self.error:8.1e}  tolerance {self.tolerance:7.0e}{verdict}"


@dataclass(frozen=True)
class Deviation:
    """Where a tangent first departs from the oracle when the model runs op by op."""

    module: str  # dotted name and class of the module in whose code it happens
    place: str  # "its output", or between which of its children
    error: float  # relative, of the first tangent that deviates
    before: float  # the largest relative error up to there

    def __str__(self) -> str:
        return f"{self.module}: {self.place} (error {self.error:.1e}, before that at most {self.before:.1e})"


@dataclass
class JvpCheck:
    """What :func:`check_jvp` compared. Printing it gives a table."""

    model: str
    dtype: torch.dtype  # the narrowest type on the tangent path
    backend: str
    oracle: str  # "forward AD" or "differences"
    comparisons: list[Comparison] = field(default_factory=list)
    deviation: Deviation | None = None  # looked for only if a tangent is wrong
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(c.right for c in self.comparisons)

    @property
    def wrong(self) -> list[Comparison]:
        return [c for c in self.comparisons if not c.right]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        verdict = "right" if self.passed else f"{len(self.wrong)} of {len(self.comparisons)} comparisons are WRONG"
        lines = [f"{self.model} in {dtype}, backend {self.backend}, against {self.oracle} in float64: {verdict}"]
        lines += [f"  {c}" for c in self._shown()]
        if self.deviation is not None:
            lines.append(f"  first deviation: {self.deviation}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _shown(self) -> list[Comparison]:
        """All comparisons, but of the gradients that are right only the worst."""
        gradients = [c for c in self.comparisons if c.what == "gradient" and c.right]
        worst = max(gradients, key=lambda c: c.error, default=None)
        return [c for c in self.comparisons if c.what != "gradient" or not c.right or c is worst]
