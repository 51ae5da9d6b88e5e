"""Lower Dynamo's graph to functional ATen ops, so that the tangents are there before autograd is.

Before: the torch-level graph, ``y = module(x);  y_dot = tangent_of(y, differentiable=True)``
After:  what AOTAutograd would make of its forward: ATen ops without mutation, markers included, no autograd.
Needs:
    ``example_value`` on the placeholders; mark_stop_gradients has run.
Keeps:
    The order and the metadata of the inputs, recomputation tags, source lines. Where the model switches gradients off,
    a detach stands in for that.
Numerics:
    The same.

Usually the tangents enter AOTAutograd's joint graph, whose backward was derived from the primal alone. A gradient of
the tangent needs it the other way round: linearize what this pass returns, and AOTAutograd derives the backward of
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.autograd_function import autograd_function_apply
from torch._higher_order_ops.effects import with_effects
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from jvpgraph.errors import CaptureError, UnsupportedNode, UnsupportedOp
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import graphs_in, is_in_place
from jvpgraph.graph.writes import WRITES
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import has_tangent

__all__ = ["lower"]

aten = torch.ops.aten
# Ops with statistics that tangent rules use and that PyTorch gives no gradient: taken apart.
NORMS = (
    *(aten.native_layer_norm, aten._fused_rms_norm, aten.native_group_norm, aten._weight_norm_interface),
    *(aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training),
    *(aten._native_batch_norm_legit_functional, aten._batch_norm_with_update_functional, aten.cudnn_batch_norm),
)
BACKWARDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "autograd.Function",
        lambda target: target is autograd_function_apply,
        "a gradient of the tangent differentiates the forward, not the backward that an autograd.Function brings",
    ),
    (
        "Tensor.register_hook",
        lambda target: str(target) == "register_hook",  # a higher-order op that older versions do not have
        "a gradient of the tangent is made of the forward, which the hook is no part of: take the hook off",
    ),
)
INPUT_META = ("_dynamo_source", "tensor_dict")  # what AOTAutograd asks Dynamo's placeholders for


def lower(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """The forward of gm as one functional ATen graph with the same inputs.

    Raises:
        UnsupportedOp: the model has an autograd.Function or a hook of a tensor, whose part of the backward would be
            lost, or writes to a tensor in place where gradients are off.
    """
    refused = [
        UnsupportedNode(what, node.name, (), source_line(node), reason)
        for body in graphs_in(gm)
        for node in body.graph.nodes
        for what, is_one, reason in BACKWARDS
        if node.op == "call_function" and is_one(node.target)
    ]
    for body in graphs_in(gm):
        refused += _detach_instead_of_no_grad(body)
    if refused:
        raise UnsupportedOp(refused)
    inputs = gm.graph.find_nodes(op="placeholder")

    lowered = _forward_of(gm, context.example_inputs)
    tokens = sum(isinstance(arg, fx.Node) and arg.op == "placeholder" for arg in _tokens(lowered.graph))
    if tokens:
        _without_effect_tokens(lowered, tokens)
    if len(lowered.graph.find_nodes(op="placeholder")) != len(inputs):
        if several := {type(x).__name__ for x in context.example_inputs if is_traceable_wrapper_subclass(x)}:
            raise CaptureError(
                f"differentiable_tangent takes plain tensors, and the model has a {', a '.join(sorted(several))}, "
                "which is made of several: leave its weights as they are, in one process"
            )
        raise CaptureError("inputs share memory that the model writes to: with differentiable_tangent, pass copies")
    lowered.meta.update(gm.meta)
    for new, old in zip(lowered.graph.find_nodes(op="placeholder"), inputs):
        new.meta["example_value"] = old.meta["example_value"]
        for name in INPUT_META:
            if hasattr(old, name):
                setattr(new, name, getattr(old, name))
            if name in old.meta:
                new.meta[name] = old.meta[name]
    return lowered


def _forward_of(gm: fx.GraphModule, examples: Sequence[Any]) -> fx.GraphModule:
    """The graph that AOTAutograd makes where nothing needs a gradient."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    apart: Any = {**get_decompositions(NORMS), **APART}
    with torch.no_grad():
        aot_module_simplified(gm, examples, fw_compiler=keep, decompositions=apart, keep_inference_input_mutations=True)
    return graphs[0]


def _polar(abs: Tensor, angle: Tensor) -> Tensor:
    """PyTorch's backward of polar has the wrong sign where abs is negative."""
    return torch.complex(abs * angle.cos(), abs * angle.sin())


def _cumprod(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """By doubling: PyTorch's tangent divides by x, and so has no gradient where that is zero."""
    y, step = x.to(x.dtype if dtype is None else dtype), 1
    while y.dim() and step < y.shape[dim]:
        rest = y.shape[dim] - step
        y = torch.cat([y.narrow(dim, 0, step), y.narrow(dim, step, rest) * y.narrow(dim, 0, rest)], dim)
        step *= 2
    return y if step > 1 or y is not x else x.clone()


def _randint_like(x: Tensor, *bounds: int, **like: Any) -> Tensor:
    """The dispatcher's gives an input with a gradient a backward that raises; Python's own call does not."""
    low, high = bounds if len(bounds) == 2 else (0, *bounds)
    return aten.random.to(torch.empty_like(x, **like), high - low) + low  # random.from is no name in a graph's code


APART: dict[OpOverload, Callable[..., Tensor]] = {
    **WRITES,
    aten.polar.default: _polar,
    aten.cumprod.default: _cumprod,
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like,
}


def _tokens(graph: fx.Graph) -> list[Any]:
    """What the first op of each kind of effects waits for: one input of the graph for each kind."""
    return list({node.args[0] for node in graph.find_nodes(op="call_function", target=with_effects)})


def _without_effect_tokens(gm: fx.GraphModule, tokens: int) -> None:
    """Let ops with effects, such as the check whether a matrix was singular, stand in their order, as before tracing.

    Before: ``token, out = with_effects(token, op, *args)``
    After:  ``out = op(*args)``
    """
    graph = gm.graph
    for node in graph.find_nodes(op="call_function", target=with_effects):
        token, op, *args = node.args
        with graph.inserting_before(node):
            call = graph.call_function(op, tuple(args), node.kwargs)
        results = node.meta["val"][1:]
        call.meta.update(node.meta, val=results if len(results) > 1 else results[0] if results else None)
        for item in list(node.users):
            index = item.args[1]
            if index == 0:
                item.replace_all_uses_with(token)
                graph.erase_node(item)
            elif len(results) > 1:
                item.args = (call, index - 1)
            else:
                item.replace_all_uses_with(call)
                graph.erase_node(item)
        graph.erase_node(node)
    output = graph.output_node()
    returned: Any = output.args[0]
    output.args = (tuple(returned[tokens:]),)
    for placeholder in graph.find_nodes(op="placeholder")[:tokens]:
        graph.erase_node(placeholder)
    gm.recompile()


def _detach_instead_of_no_grad(gm: fx.GraphModule) -> list[UnsupportedNode]:
    """Let what is computed without gradients be a constant to reverse mode by its own; forward mode goes through.

    Returns writes in place, for which a detach cannot stand in: autograd goes on with the history from before them.
    """
    recording = True
    refused = []
    reason = "written in place without gradients: with differentiable_tangent, compute it out of place"
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            recording = bool(node.args[0])
            gm.graph.erase_node(node)
        elif not recording and node.op.startswith("call") and has_tangent(node.meta.get("example_value")):
            if is_in_place(node):
                refused.append(UnsupportedNode(str(node.target), node.name, (), source_line(node), reason))
            with gm.graph.inserting_after(node):
                constant = gm.graph.call_method("detach", (node,))
            constant.meta.update(node.meta)
            node.replace_all_uses_with(constant, delete_user_cb=lambda user, new=constant: user is not new)
    gm.recompile()
    return refused
