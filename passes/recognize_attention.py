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
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from jvpgraph.graph.emit_attention import emit_attention, unexpanded, with_layout_of
from jvpgraph.graph.meta import source_line
from jvpgraph.graph.torch_level import active_graphs, emit, is_in_place, same_shape
from jvpgraph.passes.context import Context

__all__ = ["recognize_attention"]

# Targets by meaning: functions of the torch-level graph, and names of methods.
MATMUL = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__")
BADDBMM = (torch.baddbmm, "baddbmm")
EINSUM = (torch.functional.einsum, torch.einsum)
SOFTMAX = (torch.softmax, F.softmax, torch.special.softmax, "softmax")
MULTIPLY = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
DIVIDE = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
MASKED_FILL = (torch.masked_fill, "masked_fill", "masked_fill_")
TRANSPOSE = (torch.transpose, torch.swapaxes, "transpose", "swapaxes", "swapdims")
PERMUTE = (torch.permute, "permute")
CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")
DROPOUT = (F.dropout, torch.dropout)
CONTEXTS = (
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
)
LARGE_NEGATIVE = -1e4  # at most this: no key with it gets any weight beside one without


class _Unlike(Exception):
    """Not attention, or not surely; the message is the reason."""


@dataclass(frozen=True)
class _Operand:
    """A tensor, and the order in which its dims are to be read."""

    node: fx.Node
    dims: tuple[int, ...]

    def emit(self, origin: fx.Node) -> fx.Node:
        if self.dims == tuple(range(len(self.dims))):
            return self.node
        swapped = (*range(len(self.dims) - 2), len(self.dims) - 1, len(self.dims) - 2)
        if self.dims == swapped:
            return _transposed_of(self.node) or emit(origin, "transpose", self.node, -2, -1)
        return emit(origin, "permute", self.node, *self.dims)


@dataclass
class _Match:
    """Attention found around a softmax."""

    q: _Operand
    k: _Operand
    form: str
    scale: float = 1.0
    biases: list[tuple[fx.Node, torch.dtype]] = field(default_factory=list)  # additive, and what the sum is rounded to
    # (mask, the value that hides, number), from the product on
    fills: list[tuple[fx.Node, bool, float]] = field(default_factory=list)
    v: _Operand = field(init=False)
    out: fx.Node = field(init=False)  # the second product
    out_dims: tuple[int, ...] = field(init=False)  # o [..., Lq, Dv] permuted to out
    chain: list[fx.Node] = field(default_factory=list)  # from the scores to the last form of the probabilities


def recognize_attention(gm: fx.GraphModule, context: Context) -> None:
    """Replace attention spelled out around an active softmax by jvpgraph::attention, in gm and the bodies it calls."""
    for body, nodes in active_graphs(gm):
        for softmax in [n for n in body.graph.nodes if _calls(n, SOFTMAX)]:
            reached = softmax in nodes
            name, line = softmax.name, source_line(softmax)
            try:
                match = _match(softmax)
                if match.out not in nodes:
                    continue
                _rewrite(match)
            except (_Unlike, ValueError) as refusal:
                if reached and _follows_product(softmax):
                    context.report.left.append((name, line, str(refusal)))
            else:
                context.report.swapped.append((name, line, match.form))


# -------------------------------------------------------------------------------------------------- matching


def _match(softmax: fx.Node) -> _Match:
    value = _value(softmax)
    given = _arguments(softmax, "input", "dim")
    if given["dim"] not in (-1, value.dim() - 1):
        raise _Unlike(f"the softmax is over dim {given['dim']} of {value.dim()}")
    match = _scores(given["input"], softmax, 1.0)
    match.chain.append(softmax)
    _follow_probabilities(softmax, match)
    _refuse_interference(match)
    return match


def _scores(node: Any, user: fx.Node, factor: float) -> _Match:
    """Walk from the softmax back to the product of q and k. factor multiplies what node gives."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        raise _Unlike("there is no product before the softmax")
    if not all(other is user or _reads_dtype_only(other, node) for other in node.users):
        raise _Unlike(f"the scores ({node.name}) have another user")
    match = _product(node, factor) or _unary(node, factor) or _masked(node, factor)
    if match is None:
        raise _Unlike(f"the scores pass through {_name(node)}")
    if not match.chain:
        match.scale *= factor
    match.chain.append(node)
    return match


def _unary(node: fx.Node, factor: float) -> _Match | None:
    """Casts, and numbers multiplied or divided in."""
    if _cast_dtype(node) is not None or _calls(node, ("contiguous",)):
        return _scores(node.args[0], node, factor)
    scaled = _scaled(node)
    return None if scaled is None else _scores(scaled[0], node, factor * scaled[1])


def _masked(node: fx.Node, factor: float) -> _Match | None:
    """Additive masks, masked_fill and where."""
    if _calls(node, ADD):
        if node.kwargs or len(node.args) != 2 or not all(isinstance(x, fx.Node) for x in node.args):
            return None
        if factor != 1:
            raise _Unlike("a mask is added before the scores are scaled")
        match, bias = _either(node)
        if not _value(bias).is_floating_point():
            raise _Unlike(f"the mask {bias.name} that is added is {_value(bias).dtype}")
        match.biases.append((bias, _value(node).dtype))
    elif _calls(node, MASKED_FILL):
        given = _arguments(node, "input", "mask", "value")
        _refuse_fill(given["mask"], given["value"], factor)
        match, bias = _scores(given["input"], node, factor), given["mask"]
        match.fills.append((bias, True, float(given["value"])))
    elif _calls(node, (torch.where,)) and len(node.args) == 3:
        bias, kept, other = _args(node)
        shown = isinstance(kept, fx.Node) and not isinstance(other, fx.Node)
        if not shown and (isinstance(kept, fx.Node) or not isinstance(other, fx.Node)):
            raise _Unlike("where chooses between two tensors")
        number = other if shown else kept
        _refuse_fill(bias, number, factor)
        match = _scores(kept if shown else other, node, factor)
        match.fills.append((bias, not shown, float(number)))
    else:
        return None
    if not _broadcasts(_value(bias), _value(match.chain[0])):
        raise _Unlike(f"the mask {bias.name} does not broadcast to the scores")
    return match


def _either(add: fx.Node) -> tuple[_Match, fx.Node]:
    """The operand of a sum that leads to the scores, and the other one."""
    first, second = _args(add)
    try:
        return _scores(first, add, 1.0), second
    except _Unlike:
        if is_in_place(add):  # it writes to the mask
            raise
        return _scores(second, add, 1.0), first


def _refuse_fill(mask: Any, number: Any, factor: float) -> None:
    if not isinstance(mask, fx.Node) or _value(mask).dtype != torch.bool:
        raise _Unlike("the mask is not boolean")
    if not isinstance(number, (int, float)) or math.isnan(number) or number > LARGE_NEGATIVE:
        raise _Unlike(f"masked scores are set to {number}")
    if factor <= 0 or (factor != 1 and number != -math.inf):
        raise _Unlike("the scores are masked before they are scaled")


def _product(node: fx.Node, factor: float) -> _Match | None:
    """scores = q k' for one of the products, with what baddbmm does on the way."""
    if _calls(node, MATMUL) and len(node.args) == 2 and not node.kwargs:
        a, b = _args(node)
        return _Match(*_matmul_operands(node, a, b), form=f"{_name(node)} softmax")
    if _calls(node, BADDBMM):
        given = {"beta": 1, "alpha": 1} | _arguments(node, "input", "batch1", "batch2")
        if len(node.args) > 3 or not {*given} <= {"input", "batch1", "batch2", "beta", "alpha"}:
            raise _Unlike("baddbmm has other arguments")
        if not all(isinstance(given[name], (int, float)) for name in ("beta", "alpha")):
            raise _Unlike("beta or alpha of baddbmm is not a number")
        match = _Match(*_matmul_operands(node, given["batch1"], given["batch2"]), form="baddbmm softmax")
        match.scale = float(given["alpha"])
        if given["beta"] == 1:
            if factor != 1:
                raise _Unlike("a bias is added before the scores are scaled")
            if not _broadcasts(_value(given["input"]), _value(node)):
                raise _Unlike("the input of baddbmm does not broadcast to the scores")
            match.biases.append((given["input"], _value(node).dtype))
        elif given["beta"] != 0:
            raise _Unlike(f"beta of baddbmm is {given['beta']}")
        return match
    if _calls(node, EINSUM):
        return _einsum_scores(node)
    return None


def _matmul_operands(node: fx.Node, a: Any, b: Any) -> tuple[_Operand, _Operand]:
    rank = _value(node).dim()
    if rank < 3 or not (_rank(a) == _rank(b) == rank):
        raise _Unlike("the product of queries and keys broadcasts, or has no batch dim")
    batch = range(rank - 2)
    return _Operand(a, tuple(range(rank))), _Operand(b, (*batch, rank - 1, rank - 2))


def _einsum_terms(node: fx.Node) -> tuple[list[str], list[fx.Node], str]:
    """Letters and operands of a two-operand einsum, and the letters of its result."""
    equation, *operands = _args(node)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    equation = str(equation).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    plain = arrow and "." not in equation and all(len(set(x)) == len(x) for x in (*letters, result))
    if len(operands) != 2 or len(letters) != 2 or not plain:
        raise _Unlike(f"einsum {equation} is not a plain product of two tensors")
    return letters, operands, result


def _einsum_scores(node: fx.Node) -> _Match:
    (a, b), (x, y), result = _einsum_terms(node)
    if result[-1] in a and result[-1] not in b:  # the softmax is over keys, so keys are what comes last
        a, b, x, y = b, a, y, x
    *batch, query, key = list(result)
    contracted = set(a) - set(result)
    legal = (
        len(contracted) == 1
        and batch
        and set(a) == {*batch, query, *contracted}
        and set(b) == {*batch, key, *contracted}
    )
    if not legal:
        raise _Unlike(f"einsum {node.args[0]} is not a product of queries and keys")
    (dim,) = contracted
    q, k = (
        _Operand(operand, tuple(letters.index(letter) for letter in (*batch, length, dim)))
        for operand, letters, length in ((x, a, query), (y, b, key))
    )
    return _Match(q, k, form="einsum softmax")


def _follow_probabilities(softmax: fx.Node, match: _Match) -> None:
    """Walk from the softmax on to the product with v."""
    p, flipped = softmax, False
    rank = _value(softmax).dim()
    while True:
        if len(p.users) != 1:
            users = "no user" if not p.users else "another user"
            raise _Unlike(f"the probabilities ({p.name}) have {users}")
        (user,) = p.users
        if _cast_dtype(user) is not None or _calls(user, ("contiguous",)):
            pass
        elif _calls(user, DROPOUT):
            given = {"p": 0.5, "training": True} | _arguments(user, "input", "p", "training")
            rate, training = given["p"], user.kwargs.get("train", given["training"])
            if rate != 0 and training is not False:
                raise _Unlike("the probabilities are dropped out")
        elif _transposed_of(user) is p:
            flipped = not flipped
        else:
            break
        match.chain.append(user)
        p = user
    dims = tuple(range(rank))
    turned = (*dims[:-2], rank - 1, rank - 2)
    match.out = user
    found = None
    if _calls(user, MATMUL) and len(user.args) == 2 and not user.kwargs:
        a, b = _args(user)
        if a is p and b is not p and not flipped and _rank(b) == rank:
            found = _Operand(b, dims), dims
        elif b is p and a is not p and flipped and _rank(a) == rank:
            found = _Operand(a, turned), turned
    elif _calls(user, EINSUM):
        found = _einsum_values(user, p, flipped)
    if found is None:
        raise _Unlike(f"the probabilities are used by {_name(user)}")
    match.v, match.out_dims = found
    match.form += f" {_name(user)}"


def _einsum_values(node: fx.Node, p: fx.Node, flipped: bool) -> tuple[_Operand, tuple[int, ...]]:
    (a, b), (x, y), result = _einsum_terms(node)
    if y is p:
        a, b, x, y = b, a, y, x
    *batch, query, key = [*a[:-2], a[-1], a[-2]] if flipped else list(a)
    values = set(b) - {*batch, key}
    if y is p or len(values) != 1 or set(b) != {*batch, key, *values} or set(result) != {*batch, query, *values}:
        raise _Unlike(f"einsum {node.args[0]} is not a product of probabilities and values")
    (dim,) = values
    o = (*batch, query, dim)
    return (
        _Operand(y, tuple(b.index(letter) for letter in (*batch, key, dim))),
        tuple(o.index(letter) for letter in result),
    )


def _refuse_interference(match: _Match) -> None:
    """The op runs at the second product: no write in place, no change of autocast or grad mode before it."""
    for node in match.chain:
        if not all(user in match.chain or user is match.out for user in node.users):
            raise _Unlike(f"{node.name} has another user")
    node = match.chain[0]
    while node is not match.out:
        if node.op == "call_function" and node.target in CONTEXTS:
            raise _Unlike(f"{_name(node)} stands between the two products")
        if node not in match.chain and is_in_place(node):
            raise _Unlike(f"{node.name} writes in place between the two products")
        node = node.next


def _follows_product(softmax: fx.Node, depth: int = 6) -> bool:
    """Whether the scores of a softmax come from a product, as far as one can see: what is worth reporting."""
    found = {softmax}
    for _ in range(depth):
        found = {x for node in found for x in node.all_input_nodes}
        if any(_calls(x, (*MATMUL, *BADDBMM, *EINSUM)) for x in found):
            return True
    return False


# ------------------------------------------------------------------------------------------------- rewriting


def _rewrite(match: _Match) -> None:
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
    unused = scores.args[0] if _calls(scores, BADDBMM) else None
    for node in (out, *reversed(match.chain)):
        out.graph.erase_node(node)
    if isinstance(unused, fx.Node) and not unused.users and unused.target is torch.empty:
        out.graph.erase_node(unused)


def _insert(match: _Match, out: fx.Node, scores: fx.Node, probabilities: fx.Node) -> None:
    q, k, v, scale = match.q, match.k, match.v, match.scale
    result = _value(out).dtype
    dtypes = [_value(x).dtype for x in (q.node, k.node, scores, probabilities, v.node)]
    autocast = len({*dtypes[:3]}) > 1 or {*dtypes[3:]} != {result}  # torch itself refuses mixed products
    if autocast and torch.float64 in dtypes:
        raise _Unlike("float64 is mixed with other dtypes")
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
        operands = [x if _value(x).dtype == inside else emit(out, "to", x, inside) for x in operands]
    bias, dead = _bias(match, out, torch.float64 if inside == torch.float64 else torch.float32)
    if dead is not None:
        operands[0] = emit(out, "masked_fill", operands[0], dead, 0.0)
    q_inside, k_inside, v_inside = operands
    o = emit_attention(out, q_inside, k_inside, v_inside, bias, False, scale, inside)
    if inside != result:
        o = emit(out, "to", o, result)
    o = _Operand(o, match.out_dims).emit(out)
    if not same_shape(_value(o), _value(out)):
        raise _Unlike(f"the result is {tuple(_value(out).shape)}: some dims broadcast")
    out.replace_all_uses_with(with_layout_of(out, o))


def _without_upcast(x: _Operand, dtype: torch.dtype) -> tuple[_Operand, float] | None:
    """x before it was cast up from dtype, and the numbers multiplied in since."""
    node, dims, factor = x.node, x.dims, 1.0
    while _value(node).dtype != dtype:
        inner = _transposed_of(node)
        if inner is not None:
            last = len(dims) - 1
            dims = tuple({last: last - 1, last - 1: last}.get(d, d) for d in dims)
            node = inner
        elif _cast_dtype(node) is not None or _calls(node, ("contiguous",)):
            node = _args(node)[0]
        else:
            scaled = _scaled(node)
            if scaled is None:
                return None
            node, factor = scaled[0], factor * scaled[1]
    return _Operand(node, dims), factor


def _bias(match: _Match, out: fx.Node, dtype: torch.dtype) -> tuple[fx.Node | None, fx.Node | None]:
    """All masks as one, boolean where they only fill, else additive; and which rows are filled whole with a finite
    number, so that their scores are alike, [..., Lq | 1, 1]."""
    visible, dead = _visible(match, out) if match.fills else (None, None)
    if not match.biases:
        return visible, dead
    if dead is not None:  # keys that it fills might weigh as much as those that the mask nearly hides
        raise _Unlike("a mask is added to scores that are filled with a finite number")
    parts = []
    for bias, rounded in match.biases:
        have = _value(bias).dtype
        if torch.promote_types(have, dtype) != dtype:
            raise _Unlike(f"the mask {bias.name} is {have}")
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


def _visible(match: _Match, out: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The fills as one boolean mask, True attends, and the rows of which they leave nothing but a finite number. What
    is filled last counts."""
    if len({number for *_, number in match.fills} - {-math.inf}) > 1:
        raise _Unlike("scores are filled with two finite numbers")
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
    if _value(finite_ones).dim() == 0:
        raise _Unlike("the mask has no dims")
    every = finite_ones if infinite_ones is None else emit(out, torch.logical_or, finite_ones, infinite_ones)
    dead = emit(out, "all", every, -1, True)
    shown = dead if infinite_ones is None else emit(out, torch.logical_and, dead, finite_ones)
    return emit(out, torch.logical_or, emit(out, torch.logical_not, every), shown), dead


# --------------------------------------------------------------------------------------------- reading nodes


def _value(node: Any) -> Tensor:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise _Unlike(f"the shape of {node} is not known")
    return value


def _args(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def _rank(node: Any) -> int:
    return _value(node).dim() if isinstance(node, fx.Node) else -1


def _calls(node: fx.Node, targets: tuple[str | Callable[..., Any], ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names) | dict(zip(names, node.args)) | dict(node.kwargs)


def _scaled(node: fx.Node) -> tuple[Any, float] | None:
    """(x, c) of c * x, x * c or x / (1 / c), for a number c."""
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = _args(node)
    if _calls(node, MULTIPLY) and isinstance(first, (int, float)):
        return second, float(first)
    if not isinstance(second, (int, float)) or isinstance(second, bool):
        return None
    if _calls(node, MULTIPLY):
        return first, float(second)
    if _calls(node, DIVIDE) and second != 0:
        return first, 1 / second
    return None


def _cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that node casts a floating-point tensor to, if it does that and nothing else."""
    if node.op != "call_method" or node.target not in CASTS:
        return None
    before, after = _value(node.args[0]), _value(node)
    plain = before.is_floating_point() and after.is_floating_point() and before.device == after.device
    return after.dtype if plain else None


def _reads_dtype_only(node: fx.Node, x: fx.Node) -> bool:
    return _calls(node, ("type_as",)) and node.args[0] is not x


def _transposed_of(node: fx.Node) -> fx.Node | None:
    """x if node is x with its last two dims exchanged."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x, *rest = _args(node)
    rank = node.meta["example_value"].dim() if isinstance(node.meta.get("example_value"), Tensor) else 0
    if _calls(node, (getattr,)):
        return x if rest == ["mT"] else None
    dims: tuple[Any, ...] = tuple(range(rank))
    if _calls(node, TRANSPOSE) and not node.kwargs and len(rest) == 2:
        found = {d % rank for d in rest} if all(isinstance(d, int) for d in rest) else set()
        return x if found == {rank - 1, rank - 2} else None
    if _calls(node, PERMUTE) and not node.kwargs:
        order = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else tuple(rest)
        if all(isinstance(d, int) for d in order) and len(order) == rank >= 2:
            return x if tuple(d % rank for d in order) == (*dims[:-2], rank - 1, rank - 2) else None
    return None


def _broadcasts(mask: Tensor, scores: Tensor) -> bool:
    return mask.dim() <= scores.dim() and all(
        statically_known_true(have == 1) or statically_known_true(have == want)
        for have, want in zip(mask.shape[::-1], scores.shape[::-1])
    )
