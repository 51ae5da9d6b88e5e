"""Compute ATen's fused attention and its tangent by one kernel."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.graph.strides import in_layout
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind

__all__ = ["fuse_aten_attention"]

aten = torch.ops.aten
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
# Forward -> backward. Not the efficient kernel, whose logsumexp is padded.
KERNELS = {
    aten._scaled_dot_product_flash_attention.default: aten._scaled_dot_product_flash_attention_backward.default,
    ON_CPU: aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_cudnn_attention.default: aten._scaled_dot_product_cudnn_attention_backward.default,
}
O, LSE = 0, 1
BIAS_NAMES = ("attn_mask", "attn_bias")


def fuse_aten_attention(gm: fx.GraphModule, context: Context) -> None:
    """Let o and lse of ATen's attention come from the ``attention_jvp`` that computes their tangents.

    Before: ``o, lse, ..., seed = _scaled_dot_product_flash_attention(q, k, v)``
            ``_, _, o_dot, lse_dot = attention_jvp(q, k, v, q_dot, ...)``
            ``dq, dk, dv = _scaled_dot_product_flash_attention_backward(do, q, k, v, o, lse, ..., seed)``
    After:  ``o, lse, o_dot, lse_dot = attention_jvp(q, k, v, q_dot, ...)``
            ``dq, dk, dv, _ = attention_backward(do, None, q, k, v, None, o, lse)``

    Such calls stand in context-parallel attention, in autograd Functions with a backward of their own, which may
    have other keys and a merged o and lse. Only the calls of the kernel's backward that take a seed of a fused
    forward are replaced, since without it there is none. Needs linearize. Values change by rounding only.
    """
    graph = gm.graph
    recorder = Recorder(graph)
    for fused in graph.find_nodes(op="call_function", target=OPS.attention_jvp.default):
        both = bind(OPS.attention_jvp.default, fused.args, fused.kwargs)
        plain = next((n for n in both["q"].users if n.target in KERNELS and _computes(n, both)), None)
        if plain is None:
            continue
        results = _items(plain)
        backwards = dict.fromkeys(user for i, item in results.items() if i > LSE for user in item.users)
        if not all(user.target is KERNELS[plain.target] and _replaceable(user) for user in backwards):
            continue
        for backward in backwards:
            _replace_backward(backward, recorder)
        _replace_results(plain, fused, recorder)
        context.report.fused += 1


def _computes(plain: fx.Node, arguments: dict[str, Any]) -> bool:
    """Whether ``plain`` is the primal half of an attention_jvp with these arguments."""
    own = bind(plain.target, plain.args, plain.kwargs)  # type: ignore[arg-type]
    pairs = {"query": "q", "key": "k", "value": "v", "is_causal": "is_causal", "scale": "scale"}
    same = all(own[name] == arguments[other] for name, other in pairs.items())
    return same and own["dropout_p"] == 0 and _bias(own) == arguments["bias"]


def _replaceable(backward: fx.Node) -> bool:
    return bool(bind(backward.target, backward.args, backward.kwargs)["dropout_p"] == 0)  # type: ignore[arg-type]


def _replace_results(plain: fx.Node, fused: fx.Node, recorder: Recorder) -> None:
    """o and lse by the fused node, in the layout that their users were traced with."""
    results = _items(plain)
    with recorder.behind(fused):
        o, lse, *_ = recorder.stand_in(fused)
        if plain.target is ON_CPU:  # what sees nothing has 0 there, of which its backward makes no NaN
            lse = lse.masked_fill(lse == -math.inf, 0)
        for i, new in ((O, o), (LSE, lse)):
            if i in results:
                _substitute(results[i], new, recorder)
    for item in results.values():
        recorder.graph.erase_node(item)
    recorder.graph.erase_node(plain)


def _replace_backward(backward: fx.Node, recorder: Recorder) -> None:
    given = bind(backward.target, backward.args, backward.kwargs)  # type: ignore[arg-type]
    results = _items(backward)
    with recorder.behind(backward):
        tensors = [given[name] for name in ("grad_out", "query", "key", "value", "out", "logsumexp")]
        o_grad, q, k, v, o, lse = (recorder.stand_in(node) for node in tensors)
        bias = _bias(given)
        bias = None if bias is None else recorder.stand_in(bias)
        lse = lse.squeeze(-1) if lse.dim() == q.dim() else lse
        grads = OPS.attention_backward.default(
            o_grad, None, q, k, v, bias, o, lse.contiguous(), given["is_causal"], given["scale"]
        )
        for i, item in results.items():
            _substitute(item, grads[i], recorder)
    for item in results.values():
        recorder.graph.erase_node(item)
    recorder.graph.erase_node(backward)


def _substitute(old: fx.Node, new: Tensor, recorder: Recorder) -> None:
    """Let the users of ``old`` take ``new``, in the shape, dtype and strides of ``old``."""
    promised = value_of(old)
    new = new.unsqueeze(-1) if new.dim() < promised.dim() else new
    node = recorder.node_of(in_layout(new.to(promised.dtype), promised))
    node.meta.pop("recompute", None)
    old.replace_all_uses_with(node, propagate_meta=False)


def _items(node: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


def _bias(arguments: dict[str, Any]) -> fx.Node | None:
    return next((arguments[name] for name in BIAS_NAMES if name in arguments), None)
