"""Reading attention that is written by hand out of a torch-level graph."""

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

from jvpgraph.graph.torch_level import emit, is_in_place

__all__ = [
    "BADDBMM",
    "SOFTMAX",
    "Match",
    "Operand",
    "Unlike",
    "args_of",
    "cast_dtype",
    "factor_of",
    "follows_product",
    "is_call_of",
    "match_attention",
    "transposed_of",
    "value_of_node",
]

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


class Unlike(Exception):
    """Not attention, or not surely; the message is the reason."""


@dataclass(frozen=True)
class Operand:
    """A tensor, and the order in which its dims are to be read."""

    node: fx.Node
    dims: tuple[int, ...]

    def emit(self, origin: fx.Node) -> fx.Node:
        if self.dims == tuple(range(len(self.dims))):
            return self.node
        swapped = (*range(len(self.dims) - 2), len(self.dims) - 1, len(self.dims) - 2)
        if self.dims == swapped:
            return transposed_of(self.node) or emit(origin, "transpose", self.node, -2, -1)
        return emit(origin, "permute", self.node, *self.dims)


@dataclass
class Match:
    """Attention found around a softmax."""

    q: Operand
    k: Operand
    form: str
    scale: float = 1.0
    biases: list[tuple[fx.Node, torch.dtype]] = field(default_factory=list)  # additive, and what the sum is rounded to
    # (mask, the value that hides, number), from the product on
    fills: list[tuple[fx.Node, bool, float]] = field(default_factory=list)
    v: Operand = field(init=False)
    out: fx.Node = field(init=False)  # the second product
    out_dims: tuple[int, ...] = field(init=False)  # o [..., Lq, Dv] permuted to out
    chain: list[fx.Node] = field(default_factory=list)  # from the scores to the last form of the probabilities


def match_attention(softmax: fx.Node) -> Match:
    value = value_of_node(softmax)
    given = arguments_of(softmax, "input", "dim")
    if given["dim"] not in (-1, value.dim() - 1):
        raise Unlike(f"the softmax is over dim {given['dim']} of {value.dim()}")
    match = _scores(given["input"], softmax, 1.0)
    match.chain.append(softmax)
    _follow_probabilities(softmax, match)
    _refuse_interference(match)
    return match


def _scores(node: Any, user: fx.Node, factor: float) -> Match:
    """Walk from the softmax back to the product of q and k. factor multiplies what node gives."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        raise Unlike("there is no product before the softmax")
    if not all(other is user or reads_dtype_only(other, node) for other in node.users):
        raise Unlike(f"the scores ({node.name}) have another user")
    match = _product(node, factor) or _unary(node, factor) or _masked(node, factor)
    if match is None:
        raise Unlike(f"the scores pass through {name_of(node)}")
    if not match.chain:
        match.scale *= factor
    match.chain.append(node)
    return match


def _unary(node: fx.Node, factor: float) -> Match | None:
    """Casts, and numbers multiplied or divided in."""
    if cast_dtype(node) is not None or is_call_of(node, ("contiguous",)):
        return _scores(node.args[0], node, factor)
    scaled = factor_of(node)
    return None if scaled is None else _scores(scaled[0], node, factor * scaled[1])


def _masked(node: fx.Node, factor: float) -> Match | None:
    """Additive masks, masked_fill and where."""
    if is_call_of(node, ADD):
        if node.kwargs or len(node.args) != 2 or not all(isinstance(x, fx.Node) for x in node.args):
            return None
        if factor != 1:
            raise Unlike("a mask is added before the scores are scaled")
        match, bias = _either(node)
        if not value_of_node(bias).is_floating_point():
            raise Unlike(f"the mask {bias.name} that is added is {value_of_node(bias).dtype}")
        match.biases.append((bias, value_of_node(node).dtype))
    elif is_call_of(node, MASKED_FILL):
        given = arguments_of(node, "input", "mask", "value")
        _refuse_fill(given["mask"], given["value"], factor)
        match, bias = _scores(given["input"], node, factor), given["mask"]
        match.fills.append((bias, True, float(given["value"])))
    elif is_call_of(node, (torch.where,)) and len(node.args) == 3:
        bias, kept, other = args_of(node)
        shown = isinstance(kept, fx.Node) and not isinstance(other, fx.Node)
        if not shown and (isinstance(kept, fx.Node) or not isinstance(other, fx.Node)):
            raise Unlike("where chooses between two tensors")
        number = other if shown else kept
        _refuse_fill(bias, number, factor)
        match = _scores(kept if shown else other, node, factor)
        match.fills.append((bias, not shown, float(number)))
    else:
        return None
    if not broadcasts_to(value_of_node(bias), value_of_node(match.chain[0])):
        raise Unlike(f"the mask {bias.name} does not broadcast to the scores")
    return match


def _either(add: fx.Node) -> tuple[Match, fx.Node]:
    """The operand of a sum that leads to the scores, and the other one."""
    first, second = args_of(add)
    try:
        return _scores(first, add, 1.0), second
    except Unlike:
        if is_in_place(add):  # it writes to the mask
            raise
        return _scores(second, add, 1.0), first


def _refuse_fill(mask: Any, number: Any, factor: float) -> None:
    if not isinstance(mask, fx.Node) or value_of_node(mask).dtype != torch.bool:
        raise Unlike("the mask is not boolean")
    if not isinstance(number, (int, float)) or math.isnan(number) or number > LARGE_NEGATIVE:
        raise Unlike(f"masked scores are set to {number}")
    if factor <= 0 or (factor != 1 and number != -math.inf):
        raise Unlike("the scores are masked before they are scaled")


def _product(node: fx.Node, factor: float) -> Match | None:
    """scores = q k' for one of the products, with what baddbmm does on the way."""
    if is_call_of(node, MATMUL) and len(node.args) == 2 and not node.kwargs:
        a, b = args_of(node)
        return Match(*_matmul_operands(node, a, b), form=f"{name_of(node)} softmax")
    if is_call_of(node, BADDBMM):
        given = {"beta": 1, "alpha": 1} | arguments_of(node, "input", "batch1", "batch2")
        if len(node.args) > 3 or not {*given} <= {"input", "batch1", "batch2", "beta", "alpha"}:
            raise Unlike("baddbmm has other arguments")
        if not all(isinstance(given[name], (int, float)) for name in ("beta", "alpha")):
            raise Unlike("beta or alpha of baddbmm is not a number")
        match = Match(*_matmul_operands(node, given["batch1"], given["batch2"]), form="baddbmm softmax")
        match.scale = float(given["alpha"])
        if given["beta"] == 1:
            if factor != 1:
                raise Unlike("a bias is added before the scores are scaled")
            if not broadcasts_to(value_of_node(given["input"]), value_of_node(node)):
                raise Unlike("the input of baddbmm does not broadcast to the scores")
            match.biases.append((given["input"], value_of_node(node).dtype))
        elif given["beta"] != 0:
            raise Unlike(f"beta of baddbmm is {given['beta']}")
        return match
    if is_call_of(node, EINSUM):
        return _einsum_scores(node)
    return None


def _matmul_operands(node: fx.Node, a: Any, b: Any) -> tuple[Operand, Operand]:
    rank = value_of_node(node).dim()
    if rank < 3 or not (rank_of(a) == rank_of(b) == rank):
        raise Unlike("the product of queries and keys broadcasts, or has no batch dim")
    batch = range(rank - 2)
    return Operand(a, tuple(range(rank))), Operand(b, (*batch, rank - 1, rank - 2))


def _einsum_terms(node: fx.Node) -> tuple[list[str], list[fx.Node], str]:
    """Letters and operands of a two-operand einsum, and the letters of its result."""
    equation, *operands = args_of(node)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    equation = str(equation).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    plain = arrow and "." not in equation and all(len(set(x)) == len(x) for x in (*letters, result))
    if len(operands) != 2 or len(letters) != 2 or not plain:
        raise Unlike(f"einsum {equation} is not a plain product of two tensors")
    return letters, operands, result


def _einsum_scores(node: fx.Node) -> Match:
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
        raise Unlike(f"einsum {node.args[0]} is not a product of queries and keys")
    (dim,) = contracted
    q, k = (
        Operand(operand, tuple(letters.index(letter) for letter in (*batch, length, dim)))
        for operand, letters, length in ((x, a, query), (y, b, key))
    )
    return Match(q, k, form="einsum softmax")


def _follow_probabilities(softmax: fx.Node, match: Match) -> None:
    """Walk from the softmax on to the product with v."""
    p, flipped = softmax, False
    rank = value_of_node(softmax).dim()
    while True:
        if len(p.users) != 1:
            users = "no user" if not p.users else "another user"
            raise Unlike(f"the probabilities ({p.name}) have {users}")
        (user,) = p.users
        if cast_dtype(user) is not None or is_call_of(user, ("contiguous",)):
            pass
        elif is_call_of(user, DROPOUT):
            given = {"p": 0.5, "training": True} | arguments_of(user, "input", "p", "training")
            rate, training = given["p"], user.kwargs.get("train", given["training"])
            if rate != 0 and training is not False:
                raise Unlike("the probabilities are dropped out")
        elif transposed_of(user) is p:
            flipped = not flipped
        else:
            break
        match.chain.append(user)
        p = user
    dims = tuple(range(rank))
    turned = (*dims[:-2], rank - 1, rank - 2)
    match.out = user
    found = None
    if is_call_of(user, MATMUL) and len(user.args) == 2 and not user.kwargs:
        a, b = args_of(user)
        if a is p and b is not p and not flipped and rank_of(b) == rank:
            found = Operand(b, dims), dims
        elif b is p and a is not p and flipped and rank_of(a) == rank:
            found = Operand(a, turned), turned
    elif is_call_of(user, EINSUM):
        found = _einsum_values(user, p, flipped)
    if found is None:
        raise Unlike(f"the probabilities are used by {name_of(user)}")
    match.v, match.out_dims = found
    match.form += f" {name_of(user)}"


def _einsum_values(node: fx.Node, p: fx.Node, flipped: bool) -> tuple[Operand, tuple[int, ...]]:
    (a, b), (x, y), result = _einsum_terms(node)
    if y is p:
        a, b, x, y = b, a, y, x
    *batch, query, key = [*a[:-2], a[-1], a[-2]] if flipped else list(a)
    values = set(b) - {*batch, key}
    if y is p or len(values) != 1 or set(b) != {*batch, key, *values} or set(result) != {*batch, query, *values}:
        raise Unlike(f"einsum {node.args[0]} is not a product of probabilities and values")
    (dim,) = values
    o = (*batch, query, dim)
    return (
        Operand(y, tuple(b.index(letter) for letter in (*batch, key, dim))),
        tuple(o.index(letter) for letter in result),
    )


def _refuse_interference(match: Match) -> None:
    """The op runs at the second product: no write in place, no change of autocast or grad mode before it."""
    for node in match.chain:
        if not all(user in match.chain or user is match.out for user in node.users):
            raise Unlike(f"{node.name} has another user")
    node = match.chain[0]
    while node is not match.out:
        if node.op == "call_function" and node.target in CONTEXTS:
            raise Unlike(f"{name_of(node)} stands between the two products")
        if node not in match.chain and is_in_place(node):
            raise Unlike(f"{node.name} writes in place between the two products")
        node = node.next


def follows_product(softmax: fx.Node, depth: int = 6) -> bool:
    """Whether the scores of a softmax come from a product, as far as one can see: what is worth reporting."""
    found = {softmax}
    for _ in range(depth):
        found = {x for node in found for x in node.all_input_nodes}
        if any(is_call_of(x, (*MATMUL, *BADDBMM, *EINSUM)) for x in found):
            return True
    return False


# --------------------------------------------------------------------------------- reading nodes


def value_of_node(node: Any) -> Tensor:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise Unlike(f"the shape of {node} is not known")
    return value


def args_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def rank_of(node: Any) -> int:
    return value_of_node(node).dim() if isinstance(node, fx.Node) else -1


def is_call_of(node: fx.Node, targets: tuple[str | Callable[..., Any], ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def name_of(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))


def arguments_of(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names) | dict(zip(names, node.args)) | dict(node.kwargs)


def factor_of(node: fx.Node) -> tuple[Any, float] | None:
    """(x, c) of c * x, x * c or x / (1 / c), for a number c."""
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = args_of(node)
    if is_call_of(node, MULTIPLY) and isinstance(first, (int, float)):
        return second, float(first)
    if not isinstance(second, (int, float)) or isinstance(second, bool):
        return None
    if is_call_of(node, MULTIPLY):
        return first, float(second)
    if is_call_of(node, DIVIDE) and second != 0:
        return first, 1 / second
    return None


def cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that node casts a floating-point tensor to, if it does that and nothing else."""
    if node.op != "call_method" or node.target not in CASTS:
        return None
    before, after = value_of_node(node.args[0]), value_of_node(node)
    plain = before.is_floating_point() and after.is_floating_point() and before.device == after.device
    return after.dtype if plain else None


def reads_dtype_only(node: fx.Node, x: fx.Node) -> bool:
    return is_call_of(node, ("type_as",)) and node.args[0] is not x


def transposed_of(node: fx.Node) -> fx.Node | None:
    """x if node is x with its last two dims exchanged."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x, *rest = args_of(node)
    rank = node.meta["example_value"].dim() if isinstance(node.meta.get("example_value"), Tensor) else 0
    if is_call_of(node, (getattr,)):
        return x if rest == ["mT"] else None
    dims: tuple[Any, ...] = tuple(range(rank))
    if is_call_of(node, TRANSPOSE) and not node.kwargs and len(rest) == 2:
        found = {d % rank for d in rest} if all(isinstance(d, int) for d in rest) else set()
        return x if found == {rank - 1, rank - 2} else None
    if is_call_of(node, PERMUTE) and not node.kwargs:
        order = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else tuple(rest)
        if all(isinstance(d, int) for d in order) and len(order) == rank >= 2:
            return x if tuple(d % rank for d in order) == (*dims[:-2], rank - 1, rank - 2) else None
    return None


def broadcasts_to(mask: Tensor, scores: Tensor) -> bool:
    return mask.dim() <= scores.dim() and all(
        statically_known_true(have == 1) or statically_known_true(have == want)
        for have, want in zip(mask.shape[::-1], scores.shape[::-1])
    )
