"""Inductor, as it is called for our graphs, and what its releases get wrong in them."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx  # a function goes by this name, too
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch._inductor import config, output_code
from torch._inductor.codegen.common import DeferredLine
from torch._inductor.codegen.cpp import CppVecKernel, OuterLoopFusedSchedulerNode
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.fx_passes import post_grad
from torch._inductor.kernel import conv
from torch._inductor.lowering import lowerings
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V, ops

from jvpgraph.dynamo import NOT_COMPILED, remedy
from jvpgraph.errors import CaptureError
from jvpgraph.graph.torch_level import graphs_in

compiler = sys.modules["torch._inductor.compile_fx"]

__all__ = ["bodies_wait", "compile_inner"]


@contextmanager
def bodies_wait(passes: Any) -> Iterator[None]:
    """Inductor's passes on a joint graph, but none on the bodies of its higher-order ops before ours have run.

    It begins with the bodies, and would take from them what ours look for: the marks of detach, and ops before they are
    decomposed. The bodies of invoke_subgraph even come before the graph that calls them.

    Args:
        passes: those of the whole graph, with ``wait(gm)``, which says whether gm is a body that has to wait for it.
    """
    own = compiler._recursive_joint_graph_passes

    def joint_passes(gm: fx.GraphModule, skip_invoke_subgraph: bool = False, *args: Any, **kwargs: Any) -> Any:
        if passes.wait(gm):
            return gm
        if len(graphs_in(gm)) == 1:
            return own(gm, skip_invoke_subgraph, *args, **kwargs)
        passes(gm.graph)
        with mock.patch.object(compiler, own.__name__, own):  # which calls itself by its name
            return own(gm, False, *args, **kwargs)

    with mock.patch.object(compiler, own.__name__, joint_passes):
        yield


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
    """Inductor itself. A backward is compiled when it first runs, where no caller of ours can tell what failed."""
    try:
        with ExitStack() as mended:
            for mend in MENDS:
                mended.enter_context(mend())
            return compile_fx_inner(gm, _one_symbol_each(example_inputs), **settings)
    except BackendCompilerFailed as error:
        if settings.get("is_backward"):
            raise CaptureError(f"{NOT_COMPILED}in its backward, {error}\n{remedy()}") from error
        raise


@contextmanager
def _a_local_buffer_for_one_row() -> Iterator[None]:
    """Loops over rows are not fused where they would share a buffer that holds one row, and are tiled.

    C++ code for CPUs, in torch < 2.14: loops that are fused over their outer dims keep what passes between them in a
    buffer for a single outer index. Where one of those dims is vectorized, as it is to transpose, 8 or 16 rows are
    written into it one upon the other, and all read the last: gradients of a layer norm of a transposed tensor are off
    by a half, without a word (pytorch/pytorch#185702).
    """
    may_fuse = OuterLoopFusedSchedulerNode.check_outer_fusion_loop_level_attr

    def unless_tiled(node: OuterLoopFusedSchedulerNode, kernels: Sequence[Any], depth: int) -> bool:
        outer = [loop for kernel in kernels for loop in kernel.loop_nest.loops[:depth]]
        tiled = any(loop.steps != 1 for loop in outer)
        return not (tiled and V.local_buffer_context.local_buffers) and may_fuse(node, kernels, depth)

    with mock.patch.object(OuterLoopFusedSchedulerNode, may_fuse.__name__, unless_tiled):
        yield


@contextmanager
def _a_name_for_each_store() -> Iterator[None]:
    """What stores a sum is a block of its own.

    C++ code for CPUs, in torch < 2.14: a sum over rows that goes to two outputs in half precision, as the gradient of a
    bias and that of a table added to it, is rounded twice under one name, which does not compile.
    """
    own = CppVecKernel.store_reduction

    def in_a_block(kernel: CppVecKernel, name: str, index: Any, value: Any) -> None:
        suffix, kernel.reduction_suffix = kernel.reduction_suffix, IndentedBuffer()
        try:
            own(kernel, name, index, value)
        finally:
            store, kernel.reduction_suffix = kernel.reduction_suffix, suffix
        suffix.writeline(DeferredLine(name, "{"))
        suffix.splice(store)
        suffix.writeline(DeferredLine(name, "}"))

    with mock.patch.object(CppVecKernel, own.__name__, in_a_block):
        yield


@contextmanager
def _convolutions_of_any_size() -> Iterator[None]:
    """The order of the strides of a convolution's backward is that of the first sizes, and no guard on each of them.

    Inductor, in torch 2.13, makes numbers of the strides, so that the code is for these sizes alone and is compiled
    again for each resolution, until there are too many variants.
    """
    op = torch.ops.aten.convolution_backward.default
    own = lowerings.get(op)
    if own is None or not hasattr(conv, "convolution_backward_lowering"):
        yield  # older: an op like others
        return

    def lowered(grad_out: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = V.graph.sizevars
        sizes.guard_int_seq(weight.get_size())
        with mock.patch.object(sizes, "guard_int_seq", lambda seq: list(sizes.optimization_hints(seq))):
            return own(grad_out, x, weight, *args, **kwargs)

    with mock.patch.dict(lowerings, {op: lowered}):
        yield


@contextmanager
def _sums_of_a_number() -> Iterator[None]:
    """A running sum of a full tensor, as of lengths that are all the same, is written out where its number is known.

    Inductor, in torch < 2.14: a number that is a symbol is multiplied by as the node that it is, which is a TypeError.
    """
    written_out = getattr(post_grad, "pointless_cumsum_replacement", None)
    known = lambda match: not isinstance(match.kwargs["fill_value"], fx.Node)  # noqa: E731
    with ExitStack() as patches:
        for entry in post_grad.pass_patterns[1].patterns.get(("call_function", torch.ops.aten.cumsum.default), ()):
            if written_out is not None and getattr(entry, "handler", None) is written_out:
                patches.enter_context(mock.patch.object(entry, "extra_check", known))
        yield


@contextmanager
def _sums_into_one_place() -> Iterator[None]:
    """What vectors of numbers are added to may be one place for all, as by ``x.index_add(0, torch.zeros(n), y)``.

    C++ code for CPUs with several threads, in torch < 2.14: such an index is no vector, as an assertion demands.
    """
    own = CppVecKernel.store

    def with_a_vector(kernel: CppVecKernel, name: str, index: Any, value: Any, mode: Any = None) -> None:
        if mode != "atomic_add" or (kernel.num_threads == 1 and not config.cpp.dynamic_threads):
            return own(kernel, name, index, value, mode)
        place = ops.index_expr(kernel.rename_indexing(index), torch.int64).value
        if place.is_vec:
            return own(kernel, name, index, value, mode)
        dtype = V.graph.get_dtype(name)
        counts = f"{kernel._get_num_vectors(torch.int64)}, {kernel._get_num_vectors(dtype)}"
        vector = value if value.is_vec else kernel.broadcast(value)
        rest = f", {cexpr_index(kernel.tail_size)}" if kernel.tail_size else ""
        operands = f"{kernel.args.output(name)}, {kernel.broadcast(place)}, {vector}{rest}"
        call = f"atomic_add_vec<{DTYPE_TO_CPP[dtype]}, {counts}>({operands});"
        kernel.stores.writeline(DeferredLine(name, call))

    with mock.patch.object(CppVecKernel, own.__name__, with_a_vector):
        yield


@contextmanager
def _strides_of_any_size() -> Iterator[None]:
    """What a forward keeps for its backward has strides that follow its sizes.

    Where Inductor chooses another layout than the graph's, the backward is compiled for the strides in it that the
    first sizes have, in torch < 2.14: it is for these sizes alone, or, if nothing compares the numbers with a size,
    refuses the next at its door.
    """
    own = output_code.set_tracing_context_output_strides

    def symbolic(example_inputs: Sequence[Any], compiled: Any) -> None:
        context = TracingContext.try_get()
        if context is None:
            return own(example_inputs, compiled)
        with mock.patch.object(context, "fakify_first_call", True):  # for which strides are kept as expressions
            return own(example_inputs, compiled)

    with mock.patch.object(output_code, own.__name__, symbolic):
        yield


@contextmanager
def _nothing_before_its_turn() -> Iterator[None]:
    """What was fused is computed where the last of it stood in the graph, and no earlier than it can be.

    Inductor puts it where the first stood, and what it waits for in front of it, however much that is. Where blocks
    share an input, the sum of its gradients so brings forward what the backward of later blocks recomputes, and those
    before them have not freed theirs: twice the memory at ten blocks, and more with each.
    """
    own = Scheduler.fuse_nodes

    def in_turn(scheduler: Scheduler, nodes: list[Any]) -> list[Any]:
        return _sorted_by_turn(own(scheduler, nodes))

    with mock.patch.object(Scheduler, own.__name__, in_turn):
        yield


def _sorted_by_turn(nodes: Sequence[Any]) -> list[Any]:
    """Kernels so that each comes after what it depends on, and of those that may come next the one whose last op comes
    first in the graph."""
    makers = {name: node for node in nodes for name in node.get_buffer_names()}
    waits_for = {
        node: {maker for dep in node.unmet_dependencies if (maker := makers.get(dep.name)) not in (None, node)}
        for node in nodes
    }
    users: dict[Any, list[Any]] = {node: [] for node in nodes}
    for node, makers_of in waits_for.items():
        for maker in makers_of:
            users[maker].append(node)
    places = {node: i for i, node in enumerate(nodes)}
    ready = [(node.max_order, places[node], node) for node in nodes if not waits_for[node]]
    heapq.heapify(ready)
    found = []
    while ready:
        *_, node = heapq.heappop(ready)
        found.append(node)
        for user in users[node]:
            waits_for[user].remove(node)
            if not waits_for[user]:
                heapq.heappush(ready, (user.max_order, places[user], user))
    assert len(found) == len(nodes), "kernels that wait for one another"
    return found


MENDS = (
    _a_local_buffer_for_one_row,
    _a_name_for_each_store,
    _convolutions_of_any_size,
    _nothing_before_its_turn,
    _sums_into_one_place,
    _sums_of_a_number,
    _strides_of_any_size,
)


def _one_symbol_each(example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with each number's symbol the one that the graph knows it by.

    Of numbers that a guard found to be equal the graph has one symbol. Where that one's own input is not used and so is
    gone, Inductor binds the other's symbol, and its code is without the first ("name 's27' is not defined").
    """
    bound = {symbol for x in example_inputs for symbol in _bound_by(x)}
    return [
        x.node.shape_env.create_symintnode(x.node.expr, hint=x.node.hint)
        if _is_renamed(x) and x.node.expr not in bound
        else x
        for x in example_inputs
    ]


def _bound_by(x: Any) -> list[Any]:
    """The symbols that Inductor reads off an input: a number's own, and those of sizes and strides."""
    if isinstance(x, torch.Tensor):
        strides = x.stride() if x.layout is torch.strided else ()
        return [n.node.expr for n in (*x.shape, *strides) if isinstance(n, torch.SymInt)]
    return [x.node._expr] if isinstance(x, torch.SymInt) else []


def _is_renamed(x: Any) -> bool:
    return isinstance(x, torch.SymInt) and x.node.expr.is_symbol and x.node.expr != x.node._expr
