"""Mark the user's own stop-gradients, on the torch-level graph that Dynamo gives out.

Before: ``d = x.detach()``
After:  ``d = x.detach();  stop = aten.expand(d, [-1, -1], implicit=True)``
Needs:
    The graph before AOTAutograd, the last place where a user's detach can be told from those that PyTorch makes for
    its own ends: activation checkpointing leaves one after every in-place write. Those are aliases
    and keep the tangent; the marked ones stop it (see ``stops_tangent`` in :mod:`jvpgraph.rules.shape`).
Keeps:
    Values, and who shares memory with whom. The mark is a view rather than node metadata, because functionalization
    regenerates views after each in-place write, and only views survive that. ``linearize`` erases it.
Numerics:
    The same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch._refs
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from jvpgraph.autograd_function import OWN_JVP
from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import (
    STOPS,
    active_graphs,
    bodies,
    graphs_in,
    has_marker,
    inputs_of_body,
    is_in_place,
    is_of_numpy,
)
from jvpgraph.markers import MAKE_DUAL
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import has_tangent

__all__ = ["mark_stop_gradients"]

aten = torch.ops.aten
FROM_DATA = (  # torch._refs.tensor is what Dynamo makes of torch.tensor with a list
    *(torch.tensor, "new_tensor", torch.Tensor.new_tensor, torch.as_tensor, torch.asarray),
    getattr(torch._refs, "tensor", torch.tensor),
)
IN_PLACE = ("detach_", torch.detach_, torch.Tensor.detach_)
NAMES = {"detach", "detach_", "data"}  # how Python code spells them
LEAF = (
    "a detached tensor is to be differentiated, but detach has stopped its tangent: use x.clone(), or "
    "x.requires_grad_() itself"
)


def mark_stop_gradients(gm: fx.GraphModule, context: Context) -> None:
    """Put the mark behind every stop-gradient in gm and in the bodies of its higher-order ops.

    Args:
        gm: Dynamo's graph; changed in place. Without a marked input it is left alone.
    Raises:
        UnsupportedOp: something is written through a detached alias of what has a tangent, or torch.tensor is given a
            list with something that has one, or a foreach op reads what it has written.
    """
    if not has_marker(gm):
        return
    refused: list[UnsupportedNode] = []
    for body, active in active_graphs(gm):
        refused += [*_writes(body, active, set()), *_lists(body, active), *_reads_later(body, active)]
    if refused:
        raise UnsupportedOp(refused)
    for body in graphs_in(gm):
        for node in list(body.graph.nodes):
            if node.op in ("call_function", "call_method") and node.target in STOPS:
                _mark(node)
            elif node.op == "call_function" and _may_hide_stops(node.target):
                node.target = _marking(node.target)


def _mark(node: fx.Node) -> None:
    value: Any = node.meta.get("example_value")
    if not has_tangent(value) or any(_is_mark(user) for user in node.users):
        return
    behind = node.next
    with node.graph.inserting_before(behind):
        stop = node.graph.call_function(aten.expand.default, (node, [-1] * value.dim()), {"implicit": True})
    stop.meta.update(node.meta)
    node.replace_all_uses_with(stop, delete_user_cb=lambda user: user is not stop)
    if node.target in IN_PLACE:  # from here on the tensor itself is meant
        x = node.all_input_nodes[0]
        node.target, node.op = "detach", "call_method"
        later = _nodes_from(behind)
        x.replace_all_uses_with(stop, delete_user_cb=lambda user: user in later)


def _is_mark(node: fx.Node) -> bool:
    return node.target is aten.expand.default and node.kwargs.get("implicit", False) is True


def _nodes_from(node: fx.Node) -> set[fx.Node]:
    found = set()
    while node.op != "root":
        found.add(node)
        node = node.next
    return found


# ------------------------------------------------------------------------------- stop-gradients inside functions


def _may_hide_stops(target: Any) -> bool:
    """Whether a function that is one node to Dynamo may detach in its Python code, as F.gumbel_softmax does."""
    if not isinstance(target, FunctionType) or hasattr(target, OWN_JVP) or target.__module__ == __name__:
        return False
    foreign = target.__module__.split(".")[0] != "torch"  # what a user allowed in graphs
    return foreign or not NAMES.isdisjoint(target.__code__.co_names)


@functools.cache
def _marking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, marking the stop-gradients that it runs."""

    def marking(*args: Any, **kwargs: Any) -> Any:
        with _Marking():
            return function(*args, **kwargs)

    # Names of its own, or else the graph's Python code would call the original.
    marking.__name__ = marking.__qualname__ = f"marking_{function.__name__}_{id(function)}"
    return marking


class _Marking(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, FunctionType):  # one of torch's own in Python: its body is of interest too
            with self:
                return _without_overrides(func)(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        below_autograd = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU)
        if func in STOPS and has_tangent(out) and not below_autograd:  # below it, PyTorch is among itself
            return aten.expand.default(out, [-1] * out.dim(), implicit=True)
        return out


@functools.cache
def _without_overrides(function: FunctionType) -> FunctionType:
    """A copy that does not first ask for modes like the one above, which would call it again without end."""
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = function.__globals__ | dict.fromkeys(asks, lambda *_: False)
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# ------------------------------------------------------------------------------------- writes through the alias


def _lists(gm: fx.GraphModule, active: set[fx.Node]) -> Iterator[UnsupportedNode]:
    """``torch.tensor([x, y])`` and ``torch.tensor(x.numpy())``, which read numbers; of ``x`` by itself it copies what
    ``x.detach()`` is."""
    carrying = _carrying(gm, active)
    for node in gm.graph.nodes:
        if node.target not in FROM_DATA:
            continue
        data = (*node.args, *node.kwargs.values())
        listed = torch.utils._pytree.tree_leaves([a for a in data if isinstance(a, (list, tuple))])
        copied = node.target not in (torch.as_tensor, torch.asarray)
        listed += [a for a in data if copied and isinstance(a, fx.Node) and _is_array(a)]
        if any(isinstance(x, fx.Node) and x in carrying and has_tangent(x.meta.get("example_value")) for x in listed):
            reason = "a tensor with a tangent becomes a Python number, which has none: torch.stack keeps it"
            yield UnsupportedNode(str(node.target), node.name, (), source_line(node), reason)


def _carrying(gm: fx.GraphModule, active: set[fx.Node]) -> set[fx.Node]:
    """The active nodes that are not behind a stop-gradient."""
    carrying: set[fx.Node] = set()
    for node in gm.graph.nodes:
        inputs = active.intersection(node.all_input_nodes)
        if node in active and node.target not in STOPS and (not inputs or not carrying.isdisjoint(inputs)):
            carrying.add(node)
    return carrying


def _is_array(node: fx.Node) -> bool:
    """Whether this is an array of numpy's, as far as a graph tells: the result of its functions, and of x.numpy()."""
    return is_of_numpy(node) or (node.target == "view_as" and node.args[0] is node.args[1])


def _reads_later(gm: fx.GraphModule, active: set[fx.Node]) -> Iterator[UnsupportedNode]:
    """``torch._foreach_add_(xs, xs[::-1])``, whose tensors are written in turn: to PyTorch's compiler, all at once."""
    for node in gm.graph.nodes:
        if (
            node not in active
            or not getattr(node.target, "__name__", "").startswith("_foreach_")
            or not is_in_place(node)
        ):
            continue
        written, *read = [arg for arg in node.args if isinstance(arg, (list, tuple))]
        nodes = [[x for x in others if isinstance(x, fx.Node)] for others in read]
        if any(_shares_memory(x, others[i + 1 :]) for others in nodes for i, x in enumerate(written)):
            reason = "it reads for one tensor what it wrote for an earlier one"
            yield UnsupportedNode(node.target.__name__, node.name, (), source_line(node), reason)


def _writes(gm: fx.GraphModule, active: set[fx.Node], stopped: set[fx.Node]) -> Iterator[UnsupportedNode]:
    """Writes through ``x.detach()``: they change x under its tangent, and nothing says what that is then.

    `stopped` are the inputs of gm that are detached.
    """
    reason = "it writes through a detached alias of a tensor with a tangent: detach().clone() first"
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target in STOPS:
            if not active.isdisjoint(node.all_input_nodes):
                stopped.add(node)
            continue
        if node.target == "requires_grad_" and node.args[0] in stopped and _is_whole(gm):
            yield UnsupportedNode("requires_grad_", node.name, (), source_line(node), LEAF)
        writes = is_in_place(node) and node.target != "requires_grad_"
        if (writes or _renormalises(node)) and not stopped.isdisjoint(_written(node)):
            yield UnsupportedNode(str(node.target), node.name, (), source_line(node), reason)
        for index, body in bodies(gm, node):
            inputs = inputs_of_body(node, index, body, stopped)
            yield from _writes(body, set(), inputs) if inputs else ()
        if _shares_memory(node, stopped.intersection(node.all_input_nodes)):
            stopped.add(node)


def _is_whole(gm: fx.GraphModule) -> bool:
    """Whether gm is no body: the backward of a Function, which detaches what it computes again, is one."""
    return bool(gm.graph.find_nodes(op="call_function", target=MAKE_DUAL))


def _written(node: fx.Node) -> list[Any]:
    """What an op that writes is given to write to: ``out``, or its first argument; each may be a list."""
    if _renormalises(node):
        return [node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)]
    out = node.kwargs.get("out")
    first = next(iter((*node.args, *node.kwargs.values())), None)
    return [x for x in torch.utils._pytree.tree_leaves(first if out is None else out) if isinstance(x, fx.Node)]


def _renormalises(node: fx.Node) -> bool:
    """Whether node is a lookup that first shortens the rows of its table, in place."""
    given = node.kwargs.get("max_norm", node.args[3] if len(node.args) > 3 else None)
    return node.target in (F.embedding, F.embedding_bag) and given is not None


def _shares_memory(node: fx.Node, others: Iterable[fx.Node]) -> bool:
    return not _memory(node).isdisjoint(set().union(*map(_memory, others)))


def _memory(node: fx.Node) -> set[int]:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("example_value"))
    return {_unwrapped(x).untyped_storage()._cdata for x in leaves if isinstance(x, Tensor)}


def _unwrapped(x: Tensor) -> Tensor:
    """What is below the levels of vmap and the others."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
