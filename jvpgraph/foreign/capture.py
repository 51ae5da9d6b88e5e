"""Let Dynamo trace our functions in place of those of other packages, in graphs with markers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch._dynamo import variables
from torch._dynamo.variables.base import VariableTracker

from jvpgraph.autograd_function import has_markers
from jvpgraph.foreign import table
from jvpgraph.markers import MAKE_DUAL

__all__ = ["trace_ours"]

# How Dynamo calls functions: by the class that it represents them with, the attribute that has the function.
CALLS = {
    "UserFunctionVariable": ("call_function", "fn"),
    "SkipFunctionVariable": ("call_function", "value"),
    "WrapperUserFunctionVariable": ("call_function", "wrapper_obj"),
    "TorchInGraphFunctionVariable": ("call_function", "value"),
    "UserDefinedClassVariable": ("call_function", "value"),
    "AutogradFunctionVariable": ("call_apply", "fn_cls"),
}


Activity = Callable[[fx.GraphModule, "set[fx.Node]"], "set[fx.Node]"]


def trace_ours(active_nodes: Activity) -> None:
    """From now on; a graph without markers is traced as ever, and so is a call that no marked input reaches, of a
    function that Dynamo knows how to trace.

    Args:
        active_nodes: those of a graph that depend on its markers, or on some of its nodes.
    """
    for name, (method, attribute) in CALLS.items():
        kind = getattr(variables, name, None)
        if kind is not None:
            setattr(kind, method, _asking(getattr(kind, method), attribute, active_nodes))


def _asking(traced: Callable[..., Any], attribute: str, active_nodes: Activity) -> Callable[..., Any]:
    @functools.wraps(traced)
    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        theirs = getattr(self, attribute)
        if theirs is table.refuse:
            function, argument, reason = (x.as_python_constant() for x in args)
            raise table.refusal(function, argument, reason, table.line_of(_frames(tx)))
        swap = table.swap_for(theirs)
        if swap is None or not has_markers(tx) or _is_given(kwargs.get(swap.unless)):
            return traced(self, tx, args, kwargs)
        if table.is_traceable(swap) and not _is_ours(tx, [*args, *kwargs.values()], active_nodes):
            return traced(self, tx, args, kwargs)
        return _inline(swap, theirs, tx, args, kwargs)

    return call


def _is_given(value: Any) -> bool:
    return value is not None and not (value.is_python_constant() and value.as_python_constant() is None)


def _is_ours(tx: Any, arguments: list[Any], active_nodes: Activity) -> bool:
    """Whether a call of what Dynamo could trace is ours all the same.

    A marked input reaches it; or tangents are to have gradients, for which the graph is lowered, where a backward of
    theirs would be lost; or a tensor is passed twice, which Dynamo refuses of an autograd.Function.
    """
    found: list[Any] = []
    VariableTracker.visit(lambda x: found.append(getattr(x, "proxy", None)), arguments)
    if not _active(tx, active_nodes).isdisjoint(proxy.node for proxy in found if isinstance(proxy, fx.Proxy)):
        return True
    tensors = [x.as_proxy().node for x in (y.realize() for y in arguments) if isinstance(x, variables.TensorVariable)]
    if len(set(tensors)) < len(tensors):
        return True
    markers = [m for tracer in tx.output.tracers for m in tracer.graph.find_nodes(op="call_function", target=MAKE_DUAL)]
    return any(marker.args[1].target != "detach" for marker in markers)  # as make_dual has it, by default


def _active(tx: Any, active_nodes: Activity) -> set[fx.Node]:
    """What marked inputs reach, as far as there is a graph, and inside of it those of bodies that are being traced."""
    active: set[fx.Node] = set()
    for tracer in tx.output.tracers:
        lifted = {inner.node: outer.node for outer, inner in tracer.lifted_freevars.items()}
        inputs = tracer.graph.find_nodes(op="placeholder") if tracer.parent is not None else []
        reached = {node for node in inputs if node not in lifted or lifted[node] in active}
        active |= active_nodes(_Graph(tracer.graph, tx.output.nn_modules), reached)  # type: ignore[arg-type]
    return active


class _Graph:
    """What Dynamo is about to make a GraphModule of, with the bodies that it has."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self._modules = graph, modules

    def __getattr__(self, name: str) -> nn.Module:
        if name not in self._modules:
            raise AttributeError(name)
        return self._modules[name]


def _inline(swap: table.Swap, theirs: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = table.by_name(swap, theirs, args, kwargs)
    others = {name: VariableTracker.build(tx, value) for name, value in table.absent(swap, theirs).items()}
    return VariableTracker.build(tx, swap.ours).call_function(tx, list(args), {**kwargs, **others})


def _frames(tx: Any) -> Iterator[tuple[str, int, str]]:
    while tx is not None:
        yield tx.f_code.co_filename, tx.lineno, getattr(tx.f_code, "co_qualname", tx.f_code.co_name)
        tx = getattr(tx, "parent", None)
