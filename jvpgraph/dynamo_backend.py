"""The Dynamo backend: the stages of passes/pipeline.py, with AOTAutograd and a compiler around them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, StatefulSymbolicContext
from torch.utils._sympy.symbol import SymT, free_symbol_is_type

from jvpgraph.autograd_function import keep_calls_of_own_jvps
from jvpgraph.config import Config
from jvpgraph.dynamo import first_cause
from jvpgraph.errors import ABSOLUTE, NUMBER_HAS_NO_TANGENT, CaptureError, Explained, UnsupportedNode, UnsupportedOp
from jvpgraph.foreign.capture import trace_ours
from jvpgraph.graph.meta import module_path, source_line
from jvpgraph.graph.torch_level import STOPS, active_graphs, active_nodes, graphs_in, wants_gradients_of_tangents
from jvpgraph.inductor import bodies_wait, compile_inner
from jvpgraph.kernels.products import DECOMPOSITIONS
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.passes.context import Context, Report
from jvpgraph.passes.pipeline import (
    AFTER_AUTOGRAD,
    AFTER_COMPILER,
    BEFORE_AUTOGRAD,
    ON_ATEN_GRAPH,
    ON_TORCH_GRAPH,
    JointPasses,
    Pipeline,
    check_config,
)
from jvpgraph.precision import Policy
from jvpgraph.sharding import register_sharding_rules

__all__ = ["COMPILERS", "Backend", "backend"]

register_sharding_rules()
keep_calls_of_own_jvps()
trace_ours(active_nodes)
Compiled = Any  # what a backend returns: a callable of the graph's inputs
AS_STRIDED = ("as_strided", torch.as_strided, torch.Tensor.as_strided, torch.ops.aten.as_strided.default)
COMPILERS = ("inductor", "eager")
OWN_PROPERTY = re.compile(r".*(?<!\.grad)(\.(?:size\(\)\[\d+\]|stride\(\)\[\d+\]|storage_offset\(\)))")


class Backend:
    """A backend for ``torch.compile`` that understands the markers.

    Attributes:
        reports: what was done to each graph captured so far.
    """

    def __init__(self, compiler: str = "inductor", config: Config | None = None, *, explains: bool = False):
        """With ``explains``, graphs are made as far as their code, which raises Explained when they are reported."""
        if compiler not in COMPILERS:
            raise ValueError(f"unknown compiler {compiler!r}: choose one of {', '.join(map(repr, COMPILERS))}")
        self.compiler = compiler
        self.config = config or Config()
        check_config(self.config)
        self.explains = explains
        self.reports: list[Report] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        _refuse_a_break_between_markers(gm)
        context = Context(self.config, example_inputs=example_inputs, precisions=_precisions(gm, self.config))
        run, stage = Pipeline(context), ON_ATEN_GRAPH
        captured = run(ON_TORCH_GRAPH, gm)
        absolute, inputs = _absolute_views(captured), _marked_inputs(captured)
        autocast: AbstractContextManager[Any] = nullcontext()
        lowered = captured
        if wants_gradients_of_tangents(captured):
            lowered, stage = run(BEFORE_AUTOGRAD, captured), AFTER_AUTOGRAD
            autocast = torch._C._DisableAutocast()  # its casts are ops by now
        context.example_inputs = ()  # what the compiler keeps for the backward must not keep them
        _sizes_of_a_base_have_one_symbol()
        try:
            with autocast:
                marked = stage is ON_ATEN_GRAPH and bool(
                    captured.graph.find_nodes(op="call_function", target=TANGENT_OF)
                )
                compiled = self.compile(lowered, example_inputs, JointPasses(run, stage, marked=marked))
        except Exception as error:
            if _asks_for_a_number(error) and (numbers := _active_numbers(captured)):
                raise UnsupportedOp(numbers) from error
            raise
        self.reports.append(context.report)  # not earlier: Dynamo may break an attempt off and start anew
        if self.explains:
            raise Explained
        return _at_the_start(compiled, inputs, absolute) if absolute else compiled

    def inside(self, path: str) -> Backend:
        """One for a part of the model, with the same reports: a policy goes by the paths of modules in the model."""
        precision = self.config.tangent_precision
        if not isinstance(precision, Policy):
            return self
        part = copy(self)
        part.config = replace(self.config, tangent_precision=precision.inside(path))
        return part

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], passes: JointPasses) -> Compiled:
        """AOTAutograd, the passes on its joint graph, and code."""
        on_meta = any(isinstance(x, torch.Tensor) and x.is_meta for x in example_inputs)
        shown = self.explains or self.config.keep_graphs or self.config.dump is not None
        # What is cached does not go through the passes.
        with functorch_config.patch(enable_autograd_cache=False) if shown else nullcontext():
            if not self.explains:
                return _COMPILE[self.compiler](gm, example_inputs, passes)
            if self.compiler == "eager" or on_meta:  # which Inductor takes for something that nobody computes
                return _eager(gm, example_inputs, passes)
            return _inductor(gm, example_inputs, passes, _no_code)


def _precisions(gm: fx.GraphModule, config: Config) -> str:
    """What a policy says of each node: names of modules are no part of a graph, and a cache would not see them."""
    policy = config.tangent_precision
    if not isinstance(policy, Policy):
        return ""
    choices = [policy.choices(module_path(node)) for part in graphs_in(gm) for node in part.graph.nodes]
    return hashlib.sha256(repr(choices).encode()).hexdigest()


def _sizes_of_a_base_have_one_symbol() -> None:
    """Where a graph takes a tensor and a view of it, Dynamo knows the tensor as an input and as ``view._base``.

    It gives the sizes symbols under the name that it meets first. AOTAutograd may meet the other first, and would make
    symbols that are no input's: what the backward finds out about them cannot be guarded, an AssertionError of Dynamo's
    at the second size. So either name stands for the same symbols.
    """
    tracing = TracingContext.try_get()
    contexts = {} if tracing is None else tracing.tensor_to_context
    for x, context in contexts.items():
        inside, known = getattr(context, "view_base_context", None), contexts.get(x._base) if x._is_view() else None
        if isinstance(inside, StatefulSymbolicContext) and isinstance(known, StatefulSymbolicContext):
            _share(inside, known)


def _share(*contexts: StatefulSymbolicContext) -> None:
    """Each has the symbols of all, under its own name."""
    caches = [cache for context in contexts for cache in context.shape_env_to_source_to_symbol_cache.items()]
    symbols: dict[tuple[int, str], Any] = {}  # by environment and property
    for environment, cache in caches:
        for name, symbol in cache.items():
            if found := OWN_PROPERTY.fullmatch(name):
                symbols.setdefault((environment, found[1]), symbol)
    for context in contexts:
        named: Any = context.tensor_source.name
        name = named() if callable(named) else named  # a method in older versions
        for (environment, what), symbol in symbols.items():
            cache = context.shape_env_to_source_to_symbol_cache.setdefault(environment, {})
            cache.setdefault(f"{name}{what}", symbol)


def _refuse_a_break_between_markers(gm: fx.GraphModule) -> None:
    """Tangents do not cross Dynamo's graph breaks: what is asked for in the next graph would be zero.

    Raises:
        CaptureError: tangents are asked for where none begin, or begin in a graph that ends in a break without asking.
    """
    begins, asks = (
        any(part.graph.find_nodes(op="call_function", target=marker) for part in graphs_in(gm))
        for marker in (MAKE_DUAL, TANGENT_OF)
    )
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = getattr(reason, "graph_break", False)
    if (asks and not begins) or (begins and not asks and broken):
        why = f" ({str(reason.reason).splitlines()[0]})" if broken and reason is not None else ""
        raise CaptureError(
            f"make_dual and tangent_of are not in one graph, so that the tangent would be lost{why}: compile one "
            "function that calls both, with fullgraph=True"
        )


def _marked_inputs(gm: fx.GraphModule) -> list[int]:
    """Positions of the inputs that are marked."""
    marked = {node.args[0] for node in gm.graph.find_nodes(op="call_function", target=MAKE_DUAL)}
    return [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in marked]


def _asks_for_a_number(error: Exception) -> bool:
    """Whether PyTorch, in a backward, wanted to know a float that was read from a tensor."""
    guard = first_cause(error, GuardOnDataDependentSymNode)
    condition = getattr(guard, "cond", None)
    return condition is not None and free_symbol_is_type(condition, SymT.UNBACKED_FLOAT)


def _active_numbers(gm: fx.GraphModule) -> list[UnsupportedNode]:
    """The floats that are read from something with a tangent."""
    waiting, found, numbers = list(gm.graph.find_nodes(op="call_function", target=MAKE_DUAL)), set(), []
    while waiting:
        node = waiting.pop()
        if node in found or node.target in STOPS:
            continue
        found.add(node)
        if isinstance(node.meta.get("example_value"), torch.SymFloat):
            reason = f"{NUMBER_HAS_NO_TANGENT}: its value decides how the backward runs"
            numbers.append(UnsupportedNode("item", node.name, (), source_line(node), reason))
        else:
            waiting += node.users
    return numbers


def _absolute_views(gm: fx.GraphModule) -> list[UnsupportedNode]:
    """What counts from the start of the memory of a marked input: as_strided with an offset.

    Found here, as a graph that comes from a cache of the compiler's was not seen by the passes.
    """
    return [
        UnsupportedNode("as_strided", node.name, (), source_line(node), ABSOLUTE)
        for body, active in active_graphs(gm)
        for node in body.graph.nodes
        if node in active and node.target in AS_STRIDED and _offset(node) is not None and _is_of_input(node, body is gm)
    ]


def _offset(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("storage_offset")


def _is_of_input(node: fx.Node, is_whole: bool) -> bool:
    """Whether it is of a marked input, or in a body might be."""
    memory = node.meta["example_value"].untyped_storage()._cdata
    markers = node.graph.find_nodes(op="call_function", target=MAKE_DUAL)
    return not is_whole or memory in {m.meta["example_value"].untyped_storage()._cdata for m in markers}


def _at_the_start(compiled: Compiled, marked: list[int], refused: list[UnsupportedNode]) -> Compiled:
    """``compiled``, for inputs that begin at the start of their memory; Dynamo has no guard for that."""

    def checked(*inputs: Any) -> Any:
        if any(inputs[i].storage_offset() for i in marked):
            raise UnsupportedOp(refused)
        return compiled(*inputs)

    return checked


def backend(compiler: str = "inductor", config: Config | None = None) -> Backend:
    """A backend for ``torch.compile`` in which ``make_dual`` and ``tangent_of`` may be used.

    Args:
        compiler: "inductor", or "eager" to run the same passes and then the graph without compiling it.
        config: settings, as for :func:`jvpgraph.transform`.
    """
    return Backend(compiler, config)


def _no_code(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Compiled:
    """Instead of code, for a graph that is only explained."""
    return make_boxed_func(gm.forward)


def _inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], passes: JointPasses, inner: Callable[..., Any] | None = None
) -> Compiled:
    context = passes.pipeline.context
    asked = context.config.inductor
    passes.users = asked.get("joint_custom_pre_pass")
    after = JointPasses(passes.pipeline, AFTER_COMPILER, asked.get("joint_custom_post_pass"))
    patches = {**asked, "joint_custom_pre_pass": passes, "joint_custom_post_pass": after}
    if any(map(_has_symbols, example_inputs)):
        # Where it wants another layout of what the backward keeps, Inductor compares symbolic strides, and fails.
        patches.setdefault("layout_optimization", False)
    with torch._inductor.config.patch(dict(context.config.inductor)):
        context.decompositions = {**select_decomp_table(), **DECOMPOSITIONS}
    # Rules are written for the ops that PyTorch differentiates: decomposing comes last in our own pipeline.
    inner = inner or compile_inner
    with bodies_wait(passes):
        return compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches, decompositions={})


def _has_symbols(x: Any) -> bool:
    return any(isinstance(n, torch.SymInt) for n in (x.shape if isinstance(x, torch.Tensor) else (x,)))


def _eager(gm: fx.GraphModule, example_inputs: Sequence[Any], passes: JointPasses) -> Compiled:
    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        passes(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def inference(gm: fx.GraphModule, example_inputs: Any) -> Compiled:
        passes(gm.graph)
        return as_it_is(gm, example_inputs)

    def as_it_is(gm: fx.GraphModule, example_inputs: Any) -> Compiled:
        _views_to_reshapes(gm)
        return make_boxed_func(gm.forward)

    return aot_module_simplified(
        gm,
        example_inputs,
        fw_compiler=as_it_is,
        bw_compiler=as_it_is,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions={},
        keep_inference_input_mutations=True,
    )


def _views_to_reshapes(graph: fx.GraphModule) -> None:
    """Some kernels lay their result out otherwise than their fakes say, so that a view need not be one."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    graph.recompile()


_COMPILE: dict[str, Callable[[fx.GraphModule, Sequence[Any], JointPasses], Compiled]] = {
    "inductor": _inductor,
    "eager": _eager,
}
