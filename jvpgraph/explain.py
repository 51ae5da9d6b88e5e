"""What transform does to a model: rules by source, attention, collectives, FLOPs, and what is unsupported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch import nn

from jvpgraph.dual import Dual
from jvpgraph.errors import CaptureError, Explained, UnsupportedNode, UnsupportedOp
from jvpgraph.passes.context import Attention, Report
from jvpgraph.strategies import choose

__all__ = ["Explanation", "explain"]


@dataclass
class Explanation:
    """Printable; every figure is also an attribute: those of a Report, added up over the graphs.

    Attributes:
        model: the name of its class.
        reports: of each graph that the call makes, as in ``dual.reports``.
        regions: what ``dual.regions`` prints; empty without them.
        unsupported: the ops on the tangent path that have no forward derivative.
        not_captured: why the model could not be captured as one graph.
    """

    model: str
    reports: list[Report] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict, repr=False)  # path of an input -> its name
    regions: str = ""
    unsupported: tuple[UnsupportedNode, ...] = ()
    not_captured: str = ""

    @property
    def table(self) -> Counter[str]:
        """ATen op -> nodes differentiated by the rule table."""
        return self._counted(lambda report: report.rules["table"])

    @property
    def derived(self) -> Counter[str]:
        """ATen op -> nodes differentiated by a formula borrowed from PyTorch."""
        return self._counted(lambda report: report.rules["derived"])

    @property
    def kernels(self) -> Counter[str]:
        """What computes attention, and its gradients."""
        return self._counted(lambda report: report.kernels)

    @property
    def collectives(self) -> Counter[str]:
        return self._counted(lambda report: report.collectives)

    @property
    def precisions(self) -> Counter[str]:
        """Precision -> nodes of half precision whose tangents have it."""
        return self._counted(lambda report: report.precisions)

    @property
    def fused(self) -> int:
        """Attention calls computed together with their tangent."""
        return sum(report.fused for report in self.reports)

    @property
    def paired(self) -> int:
        """Collectives that carry a primal and its tangent."""
        return sum(report.paired for report in self.reports)

    @property
    def active(self) -> int:
        """Nodes with a tangent."""
        return sum(report.active for report in self.reports)

    @property
    def inactive(self) -> int:
        """ATen nodes without one."""
        return sum(report.inactive for report in self.reports)

    @property
    def swapped(self) -> list[Attention]:
        """(name, source line, form) per attention call."""
        return [entry for report in self.reports for entry in report.swapped]

    @property
    def left(self) -> list[Attention]:
        """(name, source line, reason) per attention call."""
        return [entry for report in self.reports for entry in report.left]

    @property
    def primal_flops(self) -> sympy.Expr:
        """In the symbols of ``sizes``."""
        return sum((report.primal_flops for report in self.reports), sympy.S.Zero)

    @property
    def tangent_flops(self) -> sympy.Expr:
        return sum((report.tangent_flops for report in self.reports), sympy.S.Zero)

    @property
    def backward_flops(self) -> sympy.Expr:
        """Zero where no gradient is asked for."""
        return sum((report.backward_flops for report in self.reports), sympy.S.Zero)

    @property
    def upper_bounds(self) -> int:
        """Calls of attention with a block mask that is data, which count as if it kept all tiles."""
        return sum(report.upper_bounds for report in self.reports)

    @property
    def sizes(self) -> dict[sympy.Symbol, tuple[str, int]]:
        """Symbol -> its meaning, and its value in this call."""
        known = {symbol: size for report in self.reports for symbol, size in report.sizes.items()}
        used = (self.primal_flops + self.tangent_flops + self.backward_flops).free_symbols
        return {s: (_readable_source(known[s][0], self.names), known[s][1]) for s in sorted(used, key=str)}

    def _counted(self, of: Callable[[Report], Counter[str]]) -> Counter[str]:
        return sum((of(report) for report in self.reports), Counter())

    def flops(self) -> tuple[int, int]:
        """FLOPs of primal and tangent at the sizes of this call (a multiply-add counts 2)."""
        values = {symbol: value for symbol, (_, value) in self.sizes.items()}
        return int(self.primal_flops.subs(values)), int(self.tangent_flops.subs(values))

    def __str__(self) -> str:
        lines = [f"{self.model}"]
        if self.not_captured:
            return "\n".join([*lines, f"  not captured     {self.not_captured}"])
        if self.unsupported:
            lines.append(f"  unsupported      {len(self.unsupported)} ops have no forward derivative")
            lines += [f"    {node}" for node in self.unsupported]
            return "\n".join(lines)
        primal, tangent = self.flops()
        rules = f"{self.table.total()} ops from the table, {self.derived.total()} derived"
        lines += [
            f"  nodes            {self.active} active, {self.inactive} inactive",
            f"  rules            {rules}{_names(self.derived)}",
            *([f"  half precision   tangents:{_names(self.precisions)}"] if self.precisions else []),
            f"  attention        {len(self.swapped)} swapped, {self.fused} fused with the tangent, "
            f"{len(self.left)} left",
            *(f"    left: {entry}" for entry in self.left),
            *(f"    {count} by {kernel}" for kernel, count in self.kernels.most_common()),
            f"  collectives      {self.collectives.total()}{_names(self.collectives)}"
            + (f", {self.paired} for primal and tangent at once" if self.paired else ""),
            f"  primal FLOPs     {primal:.3e}".ljust(30) + f" = {sympy.sstr(self.primal_flops)}",
            f"  tangent FLOPs    {tangent:.3e}".ljust(30) + f" = {sympy.sstr(self.tangent_flops)}",
        ]
        if self.upper_bounds:
            lines.append(
                f"    at most that: block masks that are data count as if they hid nothing ({self.upper_bounds})"
            )
        if self.regions:
            lines.append("  " + self.regions.replace("\n", "\n  "))
        if self.sizes:
            meanings = [f"{symbol} = {meaning} = {value}" for symbol, (meaning, value) in self.sizes.items()]
            lines.append(f"  where            {', '.join(meanings)}")
        return "\n".join(lines)


def explain(dual: Dual, model: nn.Module, names: dict[str, str], inputs: tuple[Any, ...], dynamic: bool) -> Explanation:
    """What the strategy of ``dual`` makes of a call: one graph as far as its code; regions, and what is op by op, by a
    run in which nothing is compiled.

    Args:
        names: name of an input -> its path.
        inputs: args, kwargs and tangents by path.
        dynamic: instead of what dual was made with.
    """
    found = Explanation(type(model).__name__, names={path: name for name, path in names.items()})
    settings = replace(dual.settings, dynamic=dynamic)
    strategy, found.reports, regions = choose(model, settings, explains=True)
    args, kwargs, dots = inputs
    try:
        strategy(dual.forward, (args, kwargs, dual.prepare(args, kwargs, dots)))
    except Explained:
        pass
    except UnsupportedOp as error:
        found.unsupported = error.nodes
    except CaptureError as error:
        found.not_captured = str(error)
    if regions is not None:
        found.regions = str(regions)
    return found


def _readable_source(source: str, names: dict[str, str]) -> str:
    """``L['kwargs']['x'].size()[0]`` as ``x.shape[0]``."""
    match = re.fullmatch(r"L(\[.*)\.size\(\)\[(\d+)\]", source)
    if match is None:
        return source
    path = ".".join(part.strip("'\"") for part in re.findall(r"\[([^\]]+)\]", match[1])).removeprefix("dots.")
    return f"{names.get(path, path)}.shape[{match[2]}]"


def _names(ops: Counter[str]) -> str:
    return f" ({', '.join(f'{name} {count}' for name, count in ops.most_common())})" if ops else ""
