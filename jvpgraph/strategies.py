"""The ways to run a dual call, and the one that the settings ask for.

Each is a callable of (forward, inputs): a :func:`jvpgraph.dual_forward.dual_forward` and its arguments. It returns the
output and the tangents of its floating leaves, and leaves a Report of every graph that it made in ``reports``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jvpgraph.config import Config
from jvpgraph.dual_forward import another
from jvpgraph.dynamo import backward_at_once, hit_recompile_limit, in_one_piece, own_errors
from jvpgraph.dynamo_backend import Backend
from jvpgraph.errors import CaptureError
from jvpgraph.functions import Kept
from jvpgraph.op_by_op import OpByOp as Mode
from jvpgraph.passes.context import Report
from jvpgraph.regions import Regions, SmallGraphs, brief, hooks_forbid_one_graph
from jvpgraph.settings import Settings
from jvpgraph.unguarded import held_by, unguarded

__all__ = ["Auto", "OneGraph", "OpByOp", "Strategy", "choose"]

Inputs = tuple[Any, ...]
Result = tuple[Any, list[Tensor]]
KEPT_VARIANTS = 4  # of a model whose classes or global hooks changed: profilers take their hooks away again
log = logging.getLogger("jvpgraph")


class Strategy(Protocol):
    def __call__(self, forward: Callable[..., Any], inputs: Inputs) -> Result: ...


class OneGraph:
    """Captured whole, and anew when something changed that Dynamo does not look at."""

    def __init__(self, call: Callable[..., Any], settings: Settings, backend: Backend):
        self._call, self._settings, self._backend = call, settings, backend
        self._variants: Kept[Callable[..., Any]] = Kept(KEPT_VARIANTS)

    def __call__(self, forward: Callable[..., Any], inputs: Inputs) -> Result:
        key = unguarded([self._call] if isinstance(self._call, nn.Module) else held_by(inputs[0][0].fn))
        with own_errors(self._settings.compiler, self._settings.needs_one_graph), in_one_piece():
            return self._variants.get(key, lambda: self._compile(forward))(*inputs)

    def _compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        how: dict[str, Any] = {"fullgraph": True, "dynamic": self._settings.dynamic}
        return torch.compile(another(forward), backend=self._backend, **how)


class OpByOp:
    """No graph: each op is followed by its tangent. Its report is of the last call."""

    def __init__(self, config: Config) -> None:
        self.reports: list[Report] = []
        self._precision = config.tangent_precision
        self._small = SmallGraphs(Backend("eager", Config(tangent_precision=self._precision)))

    def __call__(self, forward: Callable[..., Any], inputs: Inputs) -> Result:
        with Mode(graphs=self._small, precision=self._precision) as mode:
            result: Result = forward(*inputs)
        active = sum(rules.total() for rules in mode.rules.values())
        self.reports[:] = [Report(rules=mode.rules, precisions=mode.precisions, active=active)]
        return result


class Auto:
    """One graph where it can be, else regions, from the first failure on."""

    def __init__(self, model: nn.Module, one_graph: OneGraph, regions: Regions):
        self._model, self._one_graph, self._regions = model, one_graph, regions
        self._refused = False

    def __call__(self, forward: Callable[..., Any], inputs: Inputs) -> Result:
        if self._prefers_one_graph():
            try:
                with backward_at_once():
                    return self._one_graph(forward, inputs)
            except CaptureError as error:
                if hit_recompile_limit(error):
                    raise
                self._refuse(error)
        return self._regions(forward, inputs)

    def _prefers_one_graph(self) -> bool:
        if self._refused:
            return False
        hooks = hooks_forbid_one_graph(self._model)
        self._regions.whole = not hooks
        self._regions.reason = f"{hooks} has hooks that run outside of graphs" if hooks else "it can be"
        return not hooks

    def _refuse(self, error: CaptureError) -> None:
        self._refused, self._regions.whole, self._regions.reason = True, False, brief(error)
        log.warning("jvpgraph: the model cannot be one graph, so its parts are tried: %s", self._regions.reason)


def choose(
    call: Callable[..., Any], settings: Settings, explains: bool = False
) -> tuple[Strategy, list[Report], Regions | None]:
    """What settings ask for, the reports that it fills, and the regions, if it may have some.

    Args:
        explains: one graph is made as far as its code and not run, which raises Explained; the graphs of regions are
            run without being compiled.
    """
    if not settings.compiles:
        op_by_op = OpByOp(settings.config)
        return op_by_op, op_by_op.reports, None
    backend = settings.backend if isinstance(settings.backend, Backend) else Backend(settings.compiler, settings.config)
    if explains:
        backend = Backend(settings.compiler, settings.config, explains=True)
    one_graph = OneGraph(call, settings, backend)
    if settings.regions is None or not isinstance(call, nn.Module):
        return one_graph, backend.reports, None
    of_regions = backend
    if explains:
        of_regions = Backend("eager", settings.config)
        of_regions.reports = backend.reports
    regions = Regions(call, settings.regions, of_regions, settings.dynamic)
    return (Auto(call, one_graph, regions) if settings.regions == "auto" else regions), backend.reports, regions
