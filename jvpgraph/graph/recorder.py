"""Running torch code on the values of graph nodes, and keeping the ops it ran as new nodes.

A rule is plain torch code on tensors. The recorder hands it stand-ins for the values of existing nodes (fake tensors,
with symbolic sizes where the graph is dynamic), watches every ATen op that the rule runs, and inserts that op after a
cursor. This is what make_fx does for a whole function, made for a few ops in the middle of an existing graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, compute_unbacked_bindings
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from jvpgraph.graph.meta import INHERITED_META
from jvpgraph.rules.apply import functional_form
from jvpgraph.rules.derived import probing

__all__ = ["Recorder", "value_of"]

aten = torch.ops.aten
OF_SHAPES = (aten.size.default, aten.stride.default, aten.storage_offset.default)  # asked by formulas in C++
ZEROS: dict[Any, Callable[..., Any]] = {
    aten._efficientzerotensor.default: lambda size, **how: (aten.zeros.default, (size,), how),
    aten._new_zeros_with_same_feature_meta.default: lambda x, like, **_: (aten.zeros_like.default, (like,), {}),
}


def value_of(node: fx.Node) -> Any:
    """The fake value of a node: a tensor, a symbolic number, or a tuple of them."""
    return node.meta["val"]


@contextmanager
def _computing() -> Iterator[None]:
    """As AOTAutograd traces: meta kernels in C++ know no symbolic sizes, those in Python do."""
    with torch.inference_mode(False), torch.no_grad(), enable_python_dispatcher():
        yield


class Recorder(TorchDispatchMode):
    """Inserts the ops that run under it into ``graph``, behind a cursor.

    Args:
        graph: the graph to extend; every node carries ``meta["val"]``.
        decompositions: ops to expand on the way, as in ``make_fx``.
    """

    def __init__(self, graph: fx.Graph, decompositions: Mapping[OpOverload, Callable[..., Any]] | None = None):
        super().__init__()
        self.graph = graph
        self.decompositions = decompositions or {}
        self.inserted: list[fx.Node] = []
        self._fake_mode = _fake_mode_of(graph)
        self._probes: list[fx.Node] = []  # of calls whose results are thrown away
        self._symbols = _SymbolicSizes(graph)
        self._known: dict[int, tuple[Tensor, fx.Node]] = {}  # id of a stand-in -> itself, kept alive, and its node
        self._cursor: fx.Node | None = None
        self._meta: dict[str, Any] = {}
        self._behind: fx.Node | None = None
        self._primal: fx.Node | None = None  # the same, if its value may be taken
        self._recording = True

    @contextmanager
    def behind(self, node: fx.Node, meta: Mapping[str, Any] | None = None, reuse: bool = True) -> Iterator[None]:
        """Record what runs in this context behind ``node`` and the getitem nodes that follow it.

        Args:
            node: where to insert.
            meta: inherited by the new nodes (default: the source location of ``node``).
            reuse: if the very call of ``node`` is made again, take its value instead of computing it twice.
        """
        self._cursor, self._behind, self._primal = _last_output(node), node, node if reuse else None
        self._meta = dict(meta) if meta is not None else {k: node.meta[k] for k in INHERITED_META if k in node.meta}
        try:
            with _computing(), self._fake_mode, self:
                yield
        finally:
            self._known.clear()
            self._erase_probes()

    def stand_in(self, node: fx.Node) -> Any:
        """A fresh fake value for ``node``, known to the recorder.

        Fresh because the recorded one may be an inference tensor, a folded constant, or shared between nodes.
        """
        value = value_of(node)
        if isinstance(value, Tensor):
            return self._remember(self._fresh(value), node)
        if isinstance(value, (tuple, list)):
            items = (self.stand_in(self._getitem(node, i)) if v is not None else None for i, v in enumerate(value))
            return tuple(items) if isinstance(value, tuple) else list(items)
        return value

    def stand_ins(self, tree: Any) -> Any:
        """``tree`` of arguments with every node replaced by its stand-in."""
        return fx.node.map_arg(tree, self.stand_in)

    def value_again(self, node: fx.Node) -> Any:
        """The fake value of a view, made anew of the values of its arguments: in the memory of the first."""
        args: Any = fx.node.map_arg(node.args, value_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, value_of)
        op: Any = node.target
        if op in (aten.view.default, aten._unsafe_view.default):
            op = aten.reshape.default  # a decomposition may have another layout than the op that it stands for
        with _computing(), self._fake_mode:
            if "unbacked_bindings" in node.meta:  # sizes would be drawn anew
                old = value_of(node)
                return torch.as_strided(args[0], old.shape, old.stride(), old.storage_offset())
            return op(*args, **kwargs)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that computes a tensor seen under this recorder."""
        return self._known[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._recording or func in OF_SHAPES:
            return func(*args, **kwargs)
        if func in ZEROS:  # forward AD's symbolic zeros: tensors without memory
            func, args, kwargs = ZEROS[func](*args, **kwargs)
        if func in self.decompositions:
            with self:
                out = self.decompositions[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        if not isinstance(func, OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)
        if func._can_decompose():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func._schema.is_mutable:
            return self._run_functionally(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        call = self._as_nodes(args), self._as_nodes(kwargs)
        primal = self._primal
        if primal is not None and primal.target is func and (primal.args, primal.kwargs) == call:
            return self.stand_in(primal)
        if torch.Tag.nondeterministic_seeded in func.tags and primal is not None:
            raise NotImplementedError(f"{func} draws random numbers again: forward AD of it is not reproducible")
        out = func(*args, **kwargs)
        if self._behind is not None and self._behind.target is func:
            _unify_sizes(out, value_of(self._behind))
        if isinstance(out, Tensor) and id(out) in self._known:
            return out
        if not any(isinstance(leaf, Tensor) for leaf in (out if isinstance(out, (tuple, list)) else (out,))):
            return out  # sizes and other numbers need no node: symbolic ones are found by their expression
        node = self._insert("call_function", func, *call, out)
        _bind_what_was_drawn(node, self._fake_mode.shape_env)
        if isinstance(out, Tensor):
            return self._remember(out, node)
        for i, value in enumerate(out):
            if isinstance(value, Tensor):
                self._remember(value, self._insert("call_function", operator.getitem, (node, i), {}, value))
        return out

    def _run_functionally(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """``x.op_(...)`` as ``x = op(x, ...)``, which is what a functional graph needs."""
        functional = functional_form(func) if func._schema.name.endswith("_") else None
        target = args[0] if args else None
        if functional is None or not isinstance(target, Tensor) or target._is_view():
            raise NotImplementedError(f"{func} writes in place and has no functional form here")
        out = self._run(functional, args, kwargs)
        self._remember(target, self.node_of(out))
        return target

    def _insert(self, op: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        assert self._cursor is not None
        with self.graph.inserting_after(self._cursor):
            node = self.graph.create_node(op, target, args, kwargs)
        node.meta.update(self._meta)
        node.meta["val"] = value
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        self._cursor = node
        (self._probes if probing() else self.inserted).append(node)
        return node

    def _erase_probes(self) -> None:
        for node in reversed(self._probes):
            self.graph.erase_node(node)
        self._probes.clear()

    def _getitem(self, node: fx.Node, index: int) -> fx.Node:
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == index:
                return user
        with self.graph.inserting_after(node):
            item = self.graph.call_function(operator.getitem, (node, index))
        item.meta.update({k: node.meta[k] for k in INHERITED_META if k in node.meta}, val=value_of(node)[index])
        self.inserted.append(item)
        if self._cursor is node:
            self._cursor = item
        return item

    def _fresh(self, like: Tensor) -> Tensor:
        self._recording = False
        try:
            with self._fake_mode:
                return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        finally:
            self._recording = True

    def _remember(self, tensor: Tensor, node: fx.Node) -> Tensor:
        self._known[id(tensor)] = (tensor, node)
        return tensor

    def _as_nodes(self, tree: Any) -> Any:
        def convert(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if id(leaf) not in self._known:
                    raise NotImplementedError("a rule used a tensor from outside its arguments")
                return self.node_of(leaf)
            if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                node = self._symbols.node(leaf, self._cursor)
                if isinstance(node, fx.Node) and self._cursor is not None and self._cursor < node:
                    self._cursor = node  # made just now, behind the cursor
                return node
            if isinstance(leaf, (list, tuple)):
                return type(leaf)(convert(x) for x in leaf)
            if isinstance(leaf, dict):
                return {k: convert(v) for k, v in leaf.items()}
            return leaf

        # The same immutable containers as in a graph, so that two calls compare equal.
        return fx.node.map_aggregate(convert(tree), lambda x: x)


class _SymbolicSizes:
    """Nodes for symbolic numbers, found by their sympy expression or built from the symbols' own nodes."""

    def __init__(self, graph: fx.Graph):
        self._graph = graph
        self._nodes: dict[sympy.Expr, fx.Node] = {}
        self._last_input: fx.Node | None = None
        for node in graph.nodes:
            if node.op == "placeholder":
                self._last_input = node
            value = node.meta.get("val")
            if isinstance(value, (torch.SymInt, torch.SymFloat)) and isinstance(value.node.expr, sympy.Symbol):
                self._nodes.setdefault(value.node.expr, node)
        for node in graph.find_nodes(op="placeholder"):  # symbols known only as the size of an input
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for dim, size in enumerate(value.shape):
                    if not isinstance(size, torch.SymInt) or not isinstance(size.node.expr, sympy.Symbol):
                        continue
                    if size.node.expr not in self._nodes:
                        self._nodes[size.node.expr] = self._size_of(node, dim, size)

    def _size_of(self, node: fx.Node, dim: int, size: torch.SymInt) -> fx.Node:
        assert self._last_input is not None
        with self._graph.inserting_after(self._last_input):
            made = self._graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        made.meta["val"] = size
        return made

    def node(self, number: Any, cursor: fx.Node | None) -> Any:
        constant = number.node.maybe_as_int() if isinstance(number, torch.SymInt) else None
        if constant is not None:
            return constant
        expr = number.node.expr
        if expr in self._nodes:
            return self._nodes[expr]
        symbols = {symbol: self._nodes[symbol] for symbol in expr.free_symbols}
        inputs_only = all(node.op == "placeholder" for node in symbols.values())
        where = self._last_input if inputs_only else cursor
        assert where is not None
        before = len(self._graph.nodes)
        with self._graph.inserting_before(where.next):
            tracer = fx.proxy.GraphAppendingTracer(self._graph)
            proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
            made = sympy_interp(_OnProxies, proxies, expr)
        if not isinstance(made, fx.Proxy):
            return made
        _evaluate_new_nodes(made.node, len(self._graph.nodes) - before)
        if inputs_only:
            self._nodes[expr] = made.node
        return made.node


class _OnProxies(PythonReferenceAnalysis):
    """Sympy's functions as graph nodes, where Python's own would look at the value."""

    @staticmethod
    def trunc_to_int(x: Any, dtype: Any) -> Any:
        return _call(math.trunc, x)

    @staticmethod
    def floor_to_int(x: Any, dtype: Any) -> Any:
        return _call(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: Any) -> Any:
        return _call(math.ceil, x)

    @staticmethod
    def round_to_int(x: Any, dtype: Any) -> Any:
        return _call(round, x)

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b


def _call(fn: Callable[..., Any], x: Any) -> Any:
    return x.tracer.create_proxy("call_function", fn, (x,), {}) if isinstance(x, fx.Proxy) else fn(x)


def _evaluate_new_nodes(last: fx.Node, count: int) -> None:
    chain = [last]
    while len(chain) < count:
        chain.append(chain[-1].prev)
    for node in reversed(chain):
        args = fx.node.map_arg(node.args, value_of)
        node.meta["val"] = node.target(*args)  # type: ignore[operator]


def _last_output(node: fx.Node) -> fx.Node:
    """Gather the getitem users of ``node`` directly behind it; the last of them, or the node itself."""
    last = node
    for user in list(node.users):
        if user.target is operator.getitem and user.args[0] is node:
            last.append(user)
            last = user
    return last


def _unify_sizes(new: Any, old: Any) -> None:
    """Data-dependent sizes are drawn anew when an op runs again: say that they are the ones of the first time."""
    if isinstance(new, (tuple, list)):
        for x, y in zip(new, old):
            _unify_sizes(x, y)
    elif isinstance(new, Tensor) and isinstance(old, Tensor):
        for a, b in zip(reversed(new.shape), reversed(old.shape)):  # several tangents have one dim more
            if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr != b.node.expr:
                env, drawn = a.node.shape_env, a.node.expr
                if drawn in env.pending_fresh_unbacked_symbols:
                    env.pending_fresh_unbacked_symbols.remove(drawn)
                    env._set_replacement(drawn, b.node.expr, "a tangent has the size of its primal")


def _bind_what_was_drawn(node: fx.Node, env: ShapeEnv | None) -> None:
    """Say which numbers are known only once ``node`` has run, such as where ``x[i]`` starts in memory."""
    if env is not None and env.pending_fresh_unbacked_symbols:
        drawn = compute_unbacked_bindings(env, value_of(node))
        if drawn:
            node.meta["unbacked_bindings"] = drawn


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return FakeTensorMode()
