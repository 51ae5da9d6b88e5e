"""Count the work in a graph."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from jvpgraph.graph.constants import constant_of, hint_of
from jvpgraph.graph.meta import INSERTED_META
from jvpgraph.kernels.block_mask import HIDDEN
from jvpgraph.kernels.choose import describe
from jvpgraph.kernels.ops import ALL_DOTS, OPS, call_of, one_of
from jvpgraph.kernels.window_masks import Grid, kept_tiles
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind

__all__ = ["count"]

FORWARDS = (OPS.attention.default, OPS.attention_jvp.default, OPS.attention_jvps.default)
KEPT = "kept_"  # what symbols begin with that stand for how many pairs a block mask keeps in this call
ATTENTION = (*FORWARDS, OPS.attention_backward.default)


def count(gm: fx.GraphModule, context: Context) -> None:
    """Fill in the FLOPs of primal, tangent and backward as polynomials in the dynamic sizes, collectives and kernels.

    Leaves the graph as it is. A multiply-add counts 2; pointwise ops count nothing, as is customary. Attention counts
    in full, causal or not, but for tiles that a block mask hides, if it follows from the graph which these are.
    """
    graph = gm.graph
    report = context.report
    maps: dict[fx.Node, Tensor | None] = {}  # of block masks that have been looked into
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        if node.target.namespace.startswith("_c10d_functional") and "wait" not in str(node.target):
            report.collectives[str(node.target)] += 1
        if node.target in FORWARDS:
            report.kernels[_kernel(node)] += 1
        if node.target in ATTENTION:
            kept = _keep(node, maps)
            report.upper_bounds += kept is None and node.target in FORWARDS
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            primal, tangent = attention_flops(node.target, args, kwargs, kept or Kept())
            if INSERTED_META in node.meta and node.target is OPS.attention.default:
                primal = 0
        else:
            primal, tangent = _flops(node)
        if node.meta.get("partitioner_tag") == "is_backward":
            report.backward_flops += primal + tangent
        else:
            report.primal_flops += primal
            report.tangent_flops += tangent
    found = (report.primal_flops, report.tangent_flops, report.backward_flops)
    symbols = set().union(*(flops.free_symbols for flops in found))
    report.sizes = _sizes(graph, symbols)
    for symbol in symbols:
        if symbol.name.startswith(KEPT):
            pairs = int(symbol.name.removeprefix(KEPT))
            report.sizes[symbol] = "pairs in the tiles that a block mask keeps", pairs


def _flops(node: fx.Node) -> tuple[Any, Any]:
    formula = flop_registry.get(node.target.overloadpacket)  # type: ignore[union-attr]
    if formula is None:
        return 0, 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    flops = _expr(formula(*args, **kwargs, out_val=node.meta["val"]))
    return (0, flops) if INSERTED_META in node.meta else (flops, 0)


def _kernel(node: fx.Node) -> str:
    """At the sizes of this call, without a guard on them, as its tensors lie in memory."""
    bound = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    with FakeTensorMode():
        given = {name: _at_this_size(x.meta["val"]) if isinstance(x, fx.Node) else x for name, x in bound.items()}
        if node.target is OPS.attention_jvps.default:
            given = one_of(given, 0)
        return describe(call_of(given), differentiable_tangent=bool(given.get("differentiable_tangent")))


def _at_this_size(x: Tensor) -> Tensor:
    size, stride = ([_hint(n) for n in of] for of in (x.shape, x.stride()))
    offset = _hint(x.storage_offset())
    elements = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride) if n)
    return torch.empty(elements, dtype=x.dtype, device=x.device).as_strided(size, stride, offset)


def _hint(size: int | torch.SymInt) -> int:
    """Of a size that depends on data nothing is known, nor does the kernel depend on it."""
    hint = hint_of(size)
    return 64 if hint is None else int(hint)


class Kept(NamedTuple):
    """The pairs of a query and a key in tiles that a block mask keeps."""

    pairs: Any = None  # None for all; a symbol for those in this call, where sizes change
    is_of_batch: bool = False  # of all batch entries together, not of each
    is_of_heads: bool = False


def _keep(node: fx.Node, maps: dict[fx.Node, Tensor | None]) -> Kept | None:
    """None if it depends on the graph's inputs."""
    bound = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    block_map = bound["block_map"]
    if block_map is None:
        return Kept()
    sizes = [*(bound[name].meta["val"].shape[2] for name in "qk"), *bound["partial_blocks"].meta["val"].shape[1:]]
    hints = [n for n in map(hint_of, sizes) if n is not None]
    with _disable_current_modes():
        if block_map not in maps:
            maps[block_map] = _map(block_map)
        kinds = maps[block_map]
        if kinds is None or len(hints) < len(sizes):
            return None
        rows, columns = (
            (length - torch.arange(tiles) * size).clamp(max=size)
            for length, size, tiles in zip(hints[:2], hints[2:], kinds.shape[2:])
        )
        pairs = int(((kinds != HIDDEN) * rows[:, None] * columns).sum())
    changes = any(isinstance(n, torch.SymInt) for n in sizes)
    symbol = sympy.Symbol(f"{KEPT}{pairs}", integer=True, positive=True) if changes and pairs else pairs
    return Kept(symbol, kinds.shape[0] > 1, kinds.shape[1] > 1)


def _map(node: fx.Node) -> Tensor | None:
    """That of a block mask in this call; of a grid without its bytes, which take memory."""
    made_by = node.args[0] if node.target is operator.getitem else None
    if isinstance(made_by, fx.Node) and made_by.target is OPS.grid_mask.default:
        hints: Any = fx.node.map_aggregate(made_by.args[:-1], _hint_of_node)
        return kept_tiles(Grid.of(*hints))[None, None]
    found: Tensor | None = constant_of(node)
    return found


def _hint_of_node(x: Any) -> Any:
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    return hint_of(value) if isinstance(value, torch.SymInt) else value


def attention_flops(op: OpOverload, args: Any, kwargs: Any, kept: Kept = Kept()) -> tuple[Any, Any]:  # noqa: B008
    """(primal, tangent) of a call of an op of ATTENTION.

    s and o: two products. s_dot adds one per active q and k; o_dot one for v, and one for h where s_dot is. In the
    backward, s, dq and dk are products with q or k; dp and dv with v.
    """
    bound = bind(op, args, kwargs)
    qk, pv = _products(bound, kept)
    if op is OPS.attention_backward.default:
        return 3 * qk + 2 * pv, 0
    active = [bound.get(f"{name}_dot") is not None for name in "qkv"]
    tangent = (active[0] + active[1]) * qk + (active[2] + (active[0] or active[1])) * pv
    if op is OPS.attention_jvps.default:  # one product for each of the tangents
        tangent *= next(_expr(bound[name].shape[0]) for name in ALL_DOTS if bound[name] is not None)
    return qk + pv, tangent


def _products(bound: dict[str, Any], kept: Kept) -> tuple[Any, Any]:
    """FLOPs of q k' and of p v."""
    q, k, v = (bound[name] for name in ("q", "k", "v"))
    if kept.pairs is None:
        scores = sympy.prod([_expr(n) for n in q.shape[:-1]]) * _expr(k.shape[-2])
    else:
        batch, heads = (_expr(n) for n in q.shape[:2])
        scores = kept.pairs * (1 if kept.is_of_batch else batch) * (1 if kept.is_of_heads else heads)
    return 2 * scores * _expr(q.shape[-1]), 2 * scores * _expr(v.shape[-1])


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


OF_DATA = "a size that data decide, counted as 0"


def _sizes(graph: fx.Graph, symbols: set[Any]) -> dict[sympy.Symbol, tuple[str, int]]:
    found: dict[sympy.Symbol, tuple[str, int]] = dict.fromkeys(symbols, (OF_DATA, 0))
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        candidates = value.shape if isinstance(value, Tensor) else [value]
        for size in candidates:
            if isinstance(size, torch.SymInt) and size.node.expr in symbols and size.node.hint is not None:
                sources = size.node.shape_env.var_to_sources.get(size.node.expr)
                name = sources[0].name if sources else node.name
                found[size.node.expr] = (name() if callable(name) else name, int(size.node.hint))
    return found
