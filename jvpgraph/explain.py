"""What transform does to a model: rules by source, attention, collectives, FLOPs, and what is unsupported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import nn

from jvpgraph.backend import Backend
from jvpgraph.capture import first_cause, own_errors
from jvpgraph.config import Config
from jvpgraph.errors import CaptureError, JvpgraphError, UnsupportedNode, UnsupportedOp
from jvpgraph.passes.context import Report
from jvpgraph.tangents import Inputs

__all__ = ["Explanation", "explain"]


@dataclass
class Explanation:
    """Printable; every figure is also a field."""

    model: str
    table: Counter[str] = field(default_factory=Counter)  # ATen op -> nodes differentiated by the rule table
    derived: Counter[str] = field(default_factory=Counter)  # ... by a formula borrowed from PyTorch
    fused: int = 0  # attention calls computed together with their tangent
    active: int = 0  # nodes with a tangent
    inactive: int = 0  # ATen nodes without one
    swapped: list[Any] = field(default_factory=list)  # (name, source line, form) per attention call
    left: list[Any] = field(default_factory=list)  # (name, source line, reason)
    kernels: Counter[str] = field(default_factory=Counter)  # what computes attention, and its gradients
    collectives: Counter[str] = field(default_factory=Counter)
    paired: int = 0  # collectives that carry a primal and its tangent
    primal_flops: sympy.Expr = sympy.S.Zero  # in the symbols
    tangent_flops: sympy.Expr = sympy.S.Zero
    sizes: dict[sympy.Symbol, tuple[str, int]] = field(default_factory=dict)  # symbol -> meaning, value in this call
    unsupported: tuple[UnsupportedNode, ...] = ()
    not_captured: str = ""  # why Dynamo could not capture the model as one graph

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
            f"  attention        {len(self.swapped)} swapped, {self.fused} fused with the tangent, "
            f"{len(self.left)} left",
            *(f"    left: {entry}" for entry in self.left),
            *(f"    {count} by {kernel}" for kernel, count in self.kernels.most_common()),
            f"  collectives      {self.collectives.total()}{_names(self.collectives)}"
            + (f", {self.paired} for primal and tangent at once" if self.paired else ""),
            f"  primal FLOPs     {primal:.3e}".ljust(30) + f" = {sympy.sstr(self.primal_flops)}",
            f"  tangent FLOPs    {tangent:.3e}".ljust(30) + f" = {sympy.sstr(self.tangent_flops)}",
        ]
        if self.sizes:
            meanings = [f"{symbol} = {meaning} = {value}" for symbol, (meaning, value) in self.sizes.items()]
            lines.append(f"  where            {', '.join(meanings)}")
        return "\n".join(lines)


def explain(
    model: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dots: dict[str, torch.Tensor],
    dynamic: bool,
    config: Config,
) -> Explanation:
    """Capture ``forward(args, kwargs, dots)`` and run the passes, but not the graph."""
    backend = Backend("eager", config)
    found = Explanation(type(model).__name__)
    names = {path: name for name, path in Inputs.of(model, args, kwargs).paths.items()}

    def capture_only(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        backend(gm, inputs)
        raise _Captured

    try:
        with torch.no_grad(), own_errors():
            torch.compile(forward, backend=capture_only, fullgraph=True, dynamic=dynamic)(args, kwargs, dots)
    except UnsupportedOp as error:
        found.unsupported = error.nodes
    except CaptureError as error:
        if first_cause(error, _Captured) is None:
            found.not_captured = str(error)
    except Exception as error:
        if first_cause(error, _Captured) is None:
            raise
    if backend.reports:
        _fill(found, backend.reports[-1], names)
    return found


class _Captured(JvpgraphError):
    """Thrown by the capturing backend once it has what it wants."""


def _fill(found: Explanation, report: Report, names: dict[str, str]) -> None:
    found.table, found.derived = report.rules["table"], report.rules["derived"]
    found.active, found.inactive, found.fused = report.active, report.inactive, report.fused
    found.swapped, found.left = report.swapped, report.left
    found.kernels = report.kernels
    found.collectives, found.paired = report.collectives, report.paired
    found.primal_flops, found.tangent_flops = report.primal_flops, report.tangent_flops
    used = found.primal_flops.free_symbols | found.tangent_flops.free_symbols
    for symbol in sorted(used, key=str):
        source, value = report.sizes[symbol]
        found.sizes[symbol] = (_readable_source(source, names), value)


def _readable_source(source: str, names: dict[str, str]) -> str:
    """``L['kwargs']['x'].size()[0]`` as ``x.shape[0]``."""
    match = re.fullmatch(r"L(\[.*)\.size\(\)\[(\d+)\]", source)
    if match is None:
        return source
    path = ".".join(part.strip("'\"") for part in re.findall(r"\[([^\]]+)\]", match[1])).removeprefix("dots.")
    return f"{names.get(path, path)}.shape[{match[2]}]"


def _names(ops: Counter[str]) -> str:
    return f" ({', '.join(f'{name} {count}' for name, count in ops.most_common())})" if ops else ""
