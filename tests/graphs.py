"""Graphs of a few nodes written by hand, one way to run a pass on them, and how they read."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from jvpgraph.config import Config
from jvpgraph.passes.context import Context, Report
from jvpgraph.passes.swap_attention import active_nodes


class Builder:
    """A graph that is written node by node, each with the fake value that the op gives.

    Args:
        key: where values are kept: ``"val"`` as AOTAutograd does, or ``"example_value"`` as Dynamo does.
    """

    def __init__(self, key: str = "val"):
        self.key = key
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.shapes = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self.shapes)

    def input(self, name: str, value: Any, dynamic: tuple[int, ...] = ()) -> fx.Node:
        """A placeholder like ``value``, of which the dims ``dynamic`` are symbols."""
        node = self.graph.placeholder(name)
        if isinstance(value, Tensor):
            sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(value.dim())]
            how = StatelessSymbolicContext(sizes) if dynamic else None
            value = self.fake_mode.from_tensor(value, static_shapes=not dynamic, symbolic_context=how)
        node.meta[self.key] = value
        return node

    def inputs(self, *names: str, shape: tuple[int, ...] = (3, 4), **how: Any) -> list[fx.Node]:
        """Placeholders of one shape."""
        return [self.input(name, torch.randn(shape, **how)) for name in names]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or of a method by its name; the node is named after it."""
        op = "call_method" if isinstance(target, str) else "call_function"
        short = target.overloadpacket.__name__ if isinstance(target, OpOverload) else None
        node = self.graph.create_node(op, target, args, kwargs, name=short)
        values, settings = fx.node.map_arg((args, kwargs), lambda x: x.meta[self.key])
        with self.fake_mode:
            run = getattr(values[0], target) if isinstance(target, str) else target
            node.meta[self.key] = run(*(values[1:] if isinstance(target, str) else values), **settings)
        return node

    def body(self, name: str, body: fx.GraphModule) -> fx.Node:
        """A graph inside the graph."""
        setattr(self.root, name, body)
        return self.graph.get_attr(name)

    def done(self, *outputs: Any) -> fx.GraphModule:
        """The graph, which returns ``outputs``."""
        self.graph.output(outputs)
        return fx.GraphModule(self.root, self.graph)


def run(step: Callable[..., Any], gm: fx.GraphModule, **settings: Any) -> Report:
    """What a pass reports that is run on ``gm``.

    Args:
        settings: fields of the context other than ``config`` and ``report``, or a ``config``.
    """
    context = Context(settings.pop("config", Config()), Report(), **settings)
    names = list(inspect.signature(step).parameters)
    if names == ["gm", "context"]:
        step(gm, context)
    elif names == ["graph", "context"]:
        step(gm.graph, context)
    elif names == ["gm", "active"]:
        context.report.attention.append(step(gm, active_nodes(gm)))
    else:
        step(gm)
    gm.graph.lint()
    gm.recompile()
    return context.report


def check_step(step: Callable[..., Any], gm: fx.GraphModule, after: str, **settings: Any) -> Report:
    """The report of a pass that makes ``after`` of ``gm``, and of that nothing else."""
    report = run(step, gm, **settings)
    assert written(gm) == lines(after)
    run(step, gm, **settings)
    assert written(gm) == lines(after), "run twice"
    return report


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def written(gm: fx.GraphModule) -> list[str]:
    """The calls of a graph, one a line: ``y = aten.mul.Tensor(x, 2)``."""
    return [_written(node) for node in gm.graph.nodes if node.op != "placeholder"]


def _written(node: fx.Node) -> str:
    args = [_text(arg) for arg in node.args] + [f"{name}={_text(arg)}" for name, arg in node.kwargs.items()]
    if node.op == "output":
        returned: Any = node.args[0]
        return f"return {', '.join(map(_text, returned))}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    if node.target is operator.getitem:
        return f"{node.name} = {args[0]}[{args[1]}]"
    if node.op == "call_method":
        return f"{node.name} = {args[0]}.{node.target}({', '.join(args[1:])})"
    return f"{node.name} = {_target(node.target)}({', '.join(args)})"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _text(arg: Any) -> str:
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(_text, arg))}]"
    return str(arg)


def evaluate(gm: fx.GraphModule, *inputs: Any) -> Any:
    """What the graph gives on real tensors."""
    return fx.Interpreter(gm).run(*inputs)
