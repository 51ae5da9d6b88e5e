"""Graphs of a few nodes, written as text; one way to run a pass on them; and how they read then.

``graph("y = aten.sin(x); return y", x=torch.randn(3))`` is an fx graph with the fake values that its ops give, named as
they are written. :func:`written` is the way back.
"""

from __future__ import annotations

import ast
import operator
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    compute_unbacked_bindings,
)

import jvpgraph.api  # noqa: F401 - the ops of the package
from jvpgraph.config import Config
from jvpgraph.graph.meta import INSERTED_META, TANGENT_META
from jvpgraph.graph.torch_level import graphs_in
from jvpgraph.passes.context import Context, Report

NAMES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "operator": operator,
    "CPU": torch.device("cpu"),
    **{name: getattr(torch.ops, name) for name in ("aten", "prims", "jvpgraph", "_c10d_functional", "_dtensor")},
}


@dataclass(frozen=True)
class Dynamic:
    """An input of whose shape some dims are symbols."""

    value: Tensor
    dims: tuple[int, ...]


def R(*shape: int, dtype: torch.dtype = torch.float64, **how: Any) -> Tensor:
    return torch.randn(shape, dtype=dtype, **how)


def graph(text: str, *, key: str = "val", given: dict[str, Any] | None = None, **inputs: Any) -> fx.GraphModule:
    """The graph of some Python code of assignments and a return.

    Args:
        key: where values are kept: ``"val"`` as AOTAutograd does, or ``"example_value"`` as Dynamo does.
        given: other names in the text: functions, and graph modules, which become attributes of the graph.
        inputs: its placeholders, by an example, which is :class:`Dynamic` for symbolic sizes.
    """
    given = given or {}
    root = torch.nn.Module()
    writer = _Writer(key, given | NAMES, root)
    for name, example in inputs.items():
        writer.input(name, example)
    for name, value in given.items():
        if isinstance(value, fx.GraphModule):
            setattr(root, name, value)
    for statement in ast.parse(textwrap.dedent(text)).body:
        writer.write(statement)
    gm = fx.GraphModule(root, writer.graph)
    gm.meta["fake_mode"] = writer.fake_mode
    return gm


def linearized(text: str, **inputs: Any) -> fx.GraphModule:
    """The graph of a text with tangents in it: those that linearize inserted are named ``..._dot``, after primals."""
    gm = graph(text, **inputs)
    primals = set(names(gm.graph.nodes))
    for node in gm.graph.nodes:
        if node.op != "placeholder" and "_dot" in node.name:
            node.meta[INSERTED_META] = True
            if node.name.removesuffix("_dot") in primals - {node.name}:
                node.meta[TANGENT_META] = node.name.removesuffix("_dot")
    return gm


class _Writer:
    def __init__(self, key: str, names: dict[str, Any], root: torch.nn.Module):
        self.key, self.root, self.names = key, root, dict(names)
        self.graph = fx.Graph()
        self.fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)

    def input(self, name: str, example: Any) -> None:
        node = self.names[name] = self.graph.placeholder(name)
        symbols = example.dims if isinstance(example, Dynamic) else ()
        value = example.value if isinstance(example, Dynamic) else example
        if isinstance(value, Tensor):
            sizes = [DimDynamic.DYNAMIC if d in symbols else DimDynamic.STATIC for d in range(value.dim())]
            how = StatelessSymbolicContext(sizes) if symbols else None
            value = self.fake_mode.from_tensor(value, static_shapes=not symbols, symbolic_context=how)
        node.meta[self.key] = value

    def write(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return):
            returned: Any = statement.value
            outputs = returned.elts if isinstance(returned, ast.Tuple) else [returned]
            self.graph.output(tuple(self.read(x) for x in outputs))
            return
        if isinstance(statement, ast.Assign):
            (target,) = statement.targets
            assert isinstance(target, ast.Name)
            self.names[target.id] = self.call(statement.value, target.id)
        else:
            assert isinstance(statement, ast.Expr), ast.dump(statement)
            self.call(statement.value, None)

    def call(self, value: ast.expr, name: str | None) -> Any:
        if isinstance(value, ast.Subscript):
            return self.node(
                "call_function", operator.getitem, (self.read(value.value), self.read(value.slice)), {}, name
            )
        assert isinstance(value, ast.Call), ast.dump(value)
        args = tuple(self.read(x) for x in value.args)
        kwargs = {str(k.arg): self.read(k.value) for k in value.keywords}
        if isinstance(value.func, ast.Attribute):
            owner = self.read(value.func.value)
            if isinstance(owner, fx.Node):
                return self.node("call_method", value.func.attr, (owner, *args), kwargs, name)
        target = self.read(value.func)
        target = target.default if isinstance(target, OpOverloadPacket) else target
        return self.node("call_function", target, args, kwargs, name)

    def node(self, op: str, target: Any, args: Any, kwargs: Any, name: str | None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs, name)
        values, settings = fx.node.map_arg((args, kwargs), lambda x: x.meta.get(self.key))
        with self.fake_mode:
            run = getattr(values[0], target) if op == "call_method" else target
            value = node.meta[self.key] = run(*(values[1:] if op == "call_method" else values), **settings)
        if drawn := compute_unbacked_bindings(self.fake_mode.shape_env, value):
            node.meta["unbacked_bindings"] = drawn
        return node

    def read(self, value: ast.expr) -> Any:
        if isinstance(value, ast.List):
            return [self.read(x) for x in value.elts]
        if isinstance(value, ast.Name) and isinstance(self.names.get(value.id), fx.GraphModule):
            return self.graph.get_attr(value.id)
        return eval(compile(ast.Expression(value), "graph", "eval"), {}, self.names)


def run(step: Callable[..., Any], gm: fx.GraphModule, **settings: Any) -> Report:
    """What a pass reports that is run on ``gm``.

    Args:
        settings: fields of the context other than ``config`` and ``report``, or a ``config``.
    """
    context = Context(settings.pop("config", Config()), Report(), **settings)
    step(gm, context)
    for module in graphs_in(gm):
        module.graph.lint()
        module.recompile()
    return context.report


def check_step(step: Callable[..., Any], gm: fx.GraphModule, after: str, **settings: Any) -> Report:
    """The report of a pass, which makes ``after`` of ``gm``, and nothing else of that."""
    report = run(step, gm, **settings)
    _compare(gm, after)
    run(step, gm, **settings)
    _compare(gm, after, " when it is run twice")
    return report


def _compare(gm: fx.GraphModule, after: str, when: str = "") -> None:
    found = "\n".join(written(gm))
    assert found == "\n".join(lines(after)), f"the graph{when}:\n{found}"


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def insert(gm: fx.GraphModule, target: Any, *args: Any, value: Any = None) -> fx.Node:
    """A call at the end of the graph that nobody reads."""
    with gm.graph.inserting_before(gm.graph.output_node()):
        new = gm.graph.call_function(target, args)
    new.meta["val"] = value
    return new


def evaluate(gm: fx.GraphModule, *inputs: Any) -> Any:
    """What the graph gives on real tensors."""
    return fx.Interpreter(gm).run(*inputs)


def written(gm: fx.GraphModule) -> list[str]:
    """The graph without its inputs, one node a line."""
    return [_written(node) for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr")]


def _written(node: fx.Node) -> str:
    args = [_text(arg) for arg in node.args] + [f"{name}={_text(arg)}" for name, arg in node.kwargs.items()]
    if node.op == "output":
        returned: Any = node.args[0]
        return f"return {', '.join(map(_text, returned))}"
    if node.target is operator.getitem:
        return f"{node.name} = {args[0]}[{args[1]}]"
    if node.op == "call_method":
        return f"{node.name} = {args[0]}.{node.target}({', '.join(args[1:])})"
    return f"{node.name} = {_target(node.target)}({', '.join(args)})"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", str(target))
    return next(
        (f"{room}.{name}" for room in ("torch", "F", "operator") if getattr(NAMES[room], name, 0) is target), name
    )


def _text(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return str(arg.target) if arg.op == "get_attr" else arg.name
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(_text, arg))}]"
    return repr(arg)


def names(nodes: Iterable[fx.Node]) -> list[str]:
    return [node.name for node in nodes]
