"""Recognise attention written by hand, on the torch-level graph, and swap it for our attention op.

Before: ``p = softmax(scale * q @ k.mT + mask, dim=-1);  o = p @ v``
After:  ``o, lse = jvpgraph::attention(q, k, v, mask, False, scale)``
Forms:
    Products by ``@``, matmul, bmm, baddbmm (its input a mask, or beta=0) or einsum; numbers multiplied or
    divided in; additive masks, masked_fill, where; casts around the softmax; dropout that is off; transposed
    probabilities (v' p').
Needs:
    The graph before AOTAutograd, with ``example_value`` on nodes.
Keeps:
    Everything of which it is not certain: scores or probabilities with another user, a softmax over another
    dim, a scale that is a tensor, writes in place or changes of autocast between the two products, scores that are
    filled with two finite numbers, or with one and have a mask added. Such a softmax is reported with the reason.
Numerics:
    The same maths, without rounding scores and probabilities to half types. A row whose keys are all masked
    gives o = 0 where masking by -inf gave NaN. Filling with a finite number (at most -1e4) hides as -inf does, but a
    row that has nothing else: there all scores are that number, whatever q and k are, so that its queries are set to
    0 and see all that the number fills.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from jvpgraph.graph.emit_attention import emit_attention, unexpanded, with_layout_of
from jvpgraph.graph.match_attention import (
    BADDBMM,
    SOFTMAX,
    Match,
    Operand,
    Unlike,
    args_of,
    cast_dtype,
    factor_of,
    follows_product,
    is_call_of,
    match_attention,
    transposed_of,
    value_of_node,
)
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import active_graphs, emit, same_shape
from jvpgraph.passes.context import Context

__all__ = ["recognize_attention"]


def recognize_attention(gm: fx.GraphModule, context: Context) -> None:
    """Replace attention spelled out around an active softmax by jvpgraph::attention, in gm and the bodies it calls."""
    for body, nodes in active_graphs(gm):
        for softmax in [n for n in body.graph.nodes if is_call_of(n, SOFTMAX)]:
            reached = softmax in nodes
            name, line = softmax.name, source_line(softmax)
            try:
                match = match_attention(softmax)
                if match.out not in nodes:
                    continue
                _rewrite(match)
            except (Unlike, ValueError) as refusal:
                if reached and follows_product(softmax):
                    context.report.left.append((name, line, str(refusal)))
            else:
                context.report.swapped.append((name, line, match.form))


def _rewrite(match: Match) -> None:
    out = match.out
    scores, probabilities = match.chain[0], match.chain[-1]
    with out.graph.inserting_before(out):
        before = out.prev
        try:
            _insert(match, out, scores, probabilities)
        except Exception:
            while out.prev is not before:  # leave no trace of what cannot be
                out.graph.erase_node(out.prev)
            raise
    unused = scores.args[0] if is_call_of(scores, BADDBMM) else None
    for node in (out, *reversed(match.chain)):
        out.graph.erase_node(node)
    if isinstance(unused, fx.Node) and not unused.users and unused.target is torch.empty:
        out.graph.erase_node(unused)


def _insert(match: Match, out: fx.Node, scores: fx.Node, probabilities: fx.Node) -> None:
    q, k, v, scale = match.q, match.k, match.v, match.scale
    result = value_of_node(out).dtype
    dtypes = [value_of_node(x).dtype for x in (q.node, k.node, scores, probabilities, v.node)]
    autocast = len({*dtypes[:3]}) > 1 or {*dtypes[3:]} != {result}  # torch itself refuses mixed products
    if autocast and torch.float64 in dtypes:
        raise Unlike("float64 is mixed with other dtypes")
    inside = result
    if not autocast and dtypes[0] != result:
        narrow_q, narrow_k = _without_upcast(q, result), _without_upcast(k, result)
        if narrow_q and narrow_k:
            (q, factor_q), (k, factor_k) = narrow_q, narrow_k
            scale *= factor_q * factor_k
        else:
            inside = torch.promote_types(dtypes[0], result)
    operands = [x.emit(out) for x in (q, k, v)]
    if not autocast:
        operands = [x if value_of_node(x).dtype == inside else emit(out, "to", x, inside) for x in operands]
    bias, dead = _bias(match, out, torch.float64 if inside == torch.float64 else torch.float32)
    if dead is not None:
        operands[0] = emit(out, "masked_fill", operands[0], dead, 0.0)
    q_inside, k_inside, v_inside = operands
    o = emit_attention(out, q_inside, k_inside, v_inside, bias, False, scale, inside)
    if inside != result:
        o = emit(out, "to", o, result)
    o = Operand(o, match.out_dims).emit(out)
    if not same_shape(value_of_node(o), value_of_node(out)):
        raise Unlike(f"the result is {tuple(value_of_node(out).shape)}: some dims broadcast")
    out.replace_all_uses_with(with_layout_of(out, o))


def _without_upcast(x: Operand, dtype: torch.dtype) -> tuple[Operand, float] | None:
    """x before it was cast up from dtype, and the numbers multiplied in since."""
    node, dims, factor = x.node, x.dims, 1.0
    while value_of_node(node).dtype != dtype:
        inner = transposed_of(node)
        if inner is not None:
            last = len(dims) - 1
            dims = tuple({last: last - 1, last - 1: last}.get(d, d) for d in dims)
            node = inner
        elif cast_dtype(node) is not None or is_call_of(node, ("contiguous",)):
            node = args_of(node)[0]
        else:
            scaled = factor_of(node)
            if scaled is None:
                return None
            node, factor = scaled[0], factor * scaled[1]
    return Operand(node, dims), factor


def _bias(match: Match, out: fx.Node, dtype: torch.dtype) -> tuple[fx.Node | None, fx.Node | None]:
    """All masks as one, boolean where they only fill, else additive; and which rows are filled whole with a finite
    number, so that their scores are alike, [..., Lq | 1, 1]."""
    visible, dead = _visible(match, out) if match.fills else (None, None)
    if not match.biases:
        return visible, dead
    if dead is not None:  # keys that it fills might weigh as much as those that the mask nearly hides
        raise Unlike("a mask is added to scores that are filled with a finite number")
    parts = []
    for bias, rounded in match.biases:
        have = value_of_node(bias).dtype
        if torch.promote_types(have, dtype) != dtype:
            raise Unlike(f"the mask {bias.name} is {have}")
        bias = bias if have == dtype else emit(out, "to", bias, dtype)
        parts.append(_as_in_half(bias, out) if rounded in (torch.float16, torch.bfloat16) else bias)
    while len(parts) > 1:
        parts.append(emit(out, torch.add, parts.pop(), parts.pop()))
    if visible is not None:
        parts = [emit(out, torch.where, visible, parts[0], -math.inf)]
    return parts[0], None


def _as_in_half(bias: fx.Node, out: fx.Node) -> fx.Node:
    """A bias that leaves of scores, in float32, what it leaves in half types: nothing where it is -1e4 and less. In a
    row without anything else all keys then weigh alike, as they do in the model."""
    given = emit(out, "detach", bias)  # the derivative is that of a sum
    more = emit(out, torch.sub, emit(out, "clamp", emit(out, torch.mul, given, 1e6), -1e38), given)
    as_it_is = emit(out, torch.logical_or, emit(out, torch.gt, given, -9.9e3), emit(out, torch.isinf, given))
    return emit(out, torch.add, bias, emit(out, "masked_fill", more, as_it_is, 0.0))


def _visible(match: Match, out: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The fills as one boolean mask, True attends, and the rows of which they leave nothing but a finite number. What
    is filled last counts."""
    if len({number for *_, number in match.fills} - {-math.inf}) > 1:
        raise Unlike("scores are filled with two finite numbers")
    hidden: dict[bool, fx.Node | None] = {True: None, False: None}  # by whether the number is finite
    for mask, hides, number in match.fills:
        mask = unexpanded(mask)
        mask = mask if hides else emit(out, torch.logical_not, mask)
        finite = number != -math.inf
        own, other = hidden[finite], hidden[not finite]
        hidden[finite] = mask if own is None else emit(out, torch.logical_or, own, mask)
        if other is not None:
            hidden[not finite] = emit(out, torch.logical_and, other, emit(out, torch.logical_not, mask))
    finite_ones, infinite_ones = hidden[True], hidden[False]
    if finite_ones is None:
        assert infinite_ones is not None
        return emit(out, torch.logical_not, infinite_ones), None
    if value_of_node(finite_ones).dim() == 0:
        raise Unlike("the mask has no dims")
    every = finite_ones if infinite_ones is None else emit(out, torch.logical_or, finite_ones, infinite_ones)
    dead = emit(out, "all", every, -1, True)
    shown = dead if infinite_ones is None else emit(out, torch.logical_and, dead, finite_ones)
    return emit(out, torch.logical_or, emit(out, torch.logical_not, every), shown), dead
