"""Every rule of the table against PyTorch's own formula, differences, and the transposed product."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from rule_cases import CASES, Call, Case, Drawn
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

import jvpgraph
from jvpgraph.precision import PRECISIONS
from jvpgraph.rules import TABLE, NoRule, Rule, bilinear, jvp, linear, no_tangent, tangents_of
from jvpgraph.rules.apply import apply_rule, bind, has_tangent
from jvpgraph.rules.derived import NotDerivable, Unknown, derive
from jvpgraph.rules.registry import BY_NAME

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

Values = dict[str, Any]  # by schema argument: a tensor, a list of them with None for inactive ones, or a constant

STEP = 1e-6  # of the central differences
ON_ONE_PROCESS = [pytest.param(case, id=str(case.op)) for case in CASES if not case.group]


# ------------------------------------------------------------------------------------------ drawing a call


def seeded(case: Case, number: int, rank: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{case.op} {number} {rank}".encode()))


def primals_of(case: Case, made: Call, rng: torch.Generator) -> Values:
    def draw(leaf: Any) -> Any:
        return leaf.draw(rng) if isinstance(leaf, Drawn) else leaf

    return bind(case.op, tree_map(draw, made.args), tree_map(draw, made.kwargs))


def active_of(rule: Rule, primals: Values) -> Values:
    """The primals that can have tangents and that the rule knows."""
    known = rule.wrt if rule.terms else tuple(primals)

    def differentiable(value: Any) -> bool:
        return has_tangent(value) or (isinstance(value, list) and any(has_tangent(v) for v in value))

    return {name: value for name, value in primals.items() if name in known and differentiable(value)}


def like(values: Any, rng: torch.Generator) -> Any:
    """Normal tensors shaped as the floating-point tensors among ``values``, None for the rest."""

    def draw(x: Any) -> Tensor | None:
        if not has_tangent(x):
            return None
        parts = (*x.shape, 2) if x.is_complex() else x.shape
        drawn = torch.randn(parts, generator=rng, dtype=torch.float64)
        return (torch.view_as_complex(drawn) if x.is_complex() else drawn).to(x.dtype)

    return tree_map(draw, values)


def run(case: Case, primals: Values) -> Any:
    torch.manual_seed(0)
    schema = case.op._schema.arguments
    positional = [primals[a.name] for a in schema if not a.kwarg_only]
    out = case.run(*positional, **{a.name: primals[a.name] for a in schema if a.kwarg_only})
    return settled(case, out)


def settled(case: Case, out: Any) -> Any:
    """Collectives return before they are done."""
    return tree_map_only(Tensor, c10d.wait_tensor, out) if case.group else out


def zipped(fn: Callable[..., Any], *values: Values) -> Values:
    """``fn`` on the tensors of several sets of values; what lacks a partner stays as in the first."""

    def combine(first: Any, *others: Any) -> Any:
        if isinstance(first, list):
            return [combine(*parts) for parts in zip(first, *(o or [None] * len(first) for o in others))]
        missing = any(o is None for o in others)
        return first if missing or not isinstance(first, Tensor) else fn(first, *others)

    return {name: combine(value, *(v.get(name) for v in values[1:])) for name, value in values[0].items()}


def flat(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


# ------------------------------------------------------------------------------------------------ the check


@dataclass(frozen=True)
class Trial:
    """A rule on one call of its row."""

    case: Case
    made: Call
    rule: Rule
    primals: Values
    out: Any
    dots: Values
    rng: torch.Generator

    def jvp(self, dots: Values, primals: Values | None = None, out: Any = None) -> Any:
        out = self.out if out is None else out
        out_dot = settled(self.case, apply_rule(self.rule, out, primals or self.primals, dots))
        return tree_map(lambda x: None if isinstance(x, Unknown) else x, out_dot)

    def agree(self, claim: str, got: Any, want: Any, tolerance: float | None = None) -> None:
        """Compare two tangents of the output, None being zero, relative to the largest entry."""
        tolerance = tolerance or self.made.tolerance
        triples = zip(flat(self.out), self.flat(got), self.flat(want), strict=True)
        for i, (o, g, w) in enumerate(triples):
            if not has_tangent(o) or i in self.case.aside:
                continue
            g = torch.zeros_like(o) if g is None else g
            w = torch.zeros_like(o) if w is None else w
            scale = max(1.0, w.abs().max().item()) if w.numel() else 1.0
            message = f"{self.case.op}, output {i}: {claim}\n"
            torch.testing.assert_close(
                g, w, rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m, start=message: start + m
            )

    def flat(self, out_dot: Any) -> list[Tensor | None]:
        """One tangent per output."""
        return [None] * len(flat(self.out)) if out_dot is None else flat(out_dot)


def check_rule(case: Case, rule: Rule | None = None, rank: int = 0) -> None:
    """Raise AssertionError unless the rule (default: that of the table) is the derivative of ``case.op``."""
    rule = TABLE[case.op] if rule is None else rule
    for number, made in enumerate(case.calls):
        rng = seeded(case, number, rank)
        primals = primals_of(case, made, rng)
        assert rule.applies(primals), f"{case.op}: the precondition does not hold in call {number}"
        dots = like(active_of(rule, primals), rng)
        assert dots, f"{case.op}: nothing is active in call {number}"
        trial = Trial(case, made, rule, primals, run(case, primals), dots, rng)
        check_unchanged(trial)
        if case.formula:
            check_formula(trial)
        if made.smooth:
            check_differences(trial)
        if made.smooth and case.reverse:
            check_transposed(trial)
        check_linear(trial)
        check_subsets(trial)
        check_layouts(trial)


def check_unchanged(trial: Trial) -> None:
    """A rule writes neither to primals nor to tangents."""

    def tensors() -> list[Tensor]:
        leaves = tree_flatten((trial.out, trial.primals, trial.dots))[0]
        return [x for x in leaves if isinstance(x, Tensor)]

    before = [x.clone() for x in tensors()]
    trial.jvp(trial.dots)
    for x, old in zip(tensors(), before, strict=True):
        message = f"{trial.case.op}: the rule writes to its arguments"
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True, msg=message)


def check_formula(trial: Trial) -> None:
    """PyTorch's own forward formula, where it has one, for the outputs that it knows to vary."""
    torch.manual_seed(0)
    try:
        formula = derive(trial.case.op, trial.out, trial.primals, trial.dots)
    except NotDerivable:
        return
    out_dot = trial.jvp(trial.dots)
    pairs = zip(trial.flat(out_dot), trial.flat(formula), strict=True)
    told = [ours if isinstance(theirs, Unknown) else theirs for ours, theirs in pairs]
    trial.agree("rule != PyTorch's forward formula", out_dot, told)


def check_differences(trial: Trial) -> None:
    def moved(h: float) -> list[Any]:
        return flat(run(trial.case, zipped(lambda x, x_dot: x + h * x_dot, trial.primals, trial.dots)))

    slopes = [
        ((ahead - behind) / (2 * STEP)).nan_to_num(0) if has_tangent(ahead) else None  # 0 for inf - inf
        for ahead, behind in zip(moved(STEP), moved(-STEP), strict=True)
    ]
    trial.agree("rule != central differences", trial.jvp(trial.dots), slopes, tolerance=1e-6)


def check_transposed(trial: Trial) -> None:
    """<u, J v> = <J' u, v>, with J' from the backward."""
    inputs = zipped(lambda x, _: x.clone().requires_grad_(), {n: trial.primals[n] for n in trial.dots}, trial.dots)
    with torch.enable_grad():
        outs = flat(run(trial.case, trial.primals | inputs))
    live = [i for i, o in enumerate(outs) if has_tangent(o) and o.requires_grad and i not in trial.case.aside]
    if not live:
        return
    cotangents = like([outs[i] for i in live], trial.rng)
    leaves, tangents = tree_flatten(inputs)[0], tree_flatten(trial.dots)[0]
    grads = torch.autograd.grad([outs[i] for i in live], leaves, cotangents, allow_unused=True)
    out_dots = trial.flat(trial.jvp(trial.dots))

    def product(us: Sequence[Any], vs: Sequence[Any]) -> float:
        pairs = [(u, v) for u, v in zip(us, vs, strict=True) if u is not None and v is not None]
        return sum((u.conj() * v).real.sum().item() for u, v in pairs)

    left, right = product(cotangents, [out_dots[i] for i in live]), product(grads, tangents)
    message = f"{trial.case.op}: <u, J v> = {left:.12g}, but <J' u, v> = {right:.12g}"
    assert math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-6), message


def check_linear(trial: Trial) -> None:
    others = like(trial.dots, trial.rng)
    mixed = trial.jvp(zipped(lambda v, w: 0.7 * v - 1.3 * w, trial.dots, others))
    parts = zip(trial.flat(trial.jvp(trial.dots)), trial.flat(trial.jvp(others)), strict=True)
    expected = [None if v is None or w is None else 0.7 * v - 1.3 * w for v, w in parts]
    trial.agree("J (0.7 v - 1.3 w) != 0.7 J v - 1.3 J w", mixed, expected)


def check_subsets(trial: Trial) -> None:
    """Leaving an input out is giving it a zero tangent."""
    leaves, structure = tree_flatten(trial.dots, is_leaf=lambda x: x is None)
    present = [i for i, x in enumerate(leaves) if x is not None]
    for count in range(1, len(present)):
        for kept in itertools.combinations(present, count):
            some = tree_unflatten([x if i in kept else None for i, x in enumerate(leaves)], structure)
            some = {name: dot for name, dot in some.items() if any(d is not None for d in flat(dot))}
            zeros = [x if i in kept or x is None else torch.zeros_like(x) for i, x in enumerate(leaves)]
            claim = f"with only {', '.join(some)} active: != explicit zeros"
            trial.agree(claim, trial.jvp(some), trial.jvp(tree_unflatten(zeros, structure)))


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def stepped(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 77)], -1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.dim() and has_tangent(x) else x


def check_layouts(trial: Trial) -> None:
    """The tangents come in any strides, those of their primals or others."""
    for layout in (transposed, stepped):
        primals = zipped(layout, trial.primals) if trial.case.strided else trial.primals
        out_dot = trial.jvp(zipped(layout, trial.dots), primals, run(trial.case, primals))
        trial.agree(f"wrong on {layout.__name__} input", out_dot, trial.jvp(trial.dots))
    dense = zipped(lambda x: expanded(x).contiguous(), trial.dots)
    out_dot = trial.jvp(zipped(expanded, trial.dots))
    trial.agree("wrong on expanded tangents", out_dot, trial.jvp(dense))
    if trial.case.strided and trial.made.smooth:
        primals = zipped(lambda x: expanded(x).contiguous(), trial.primals)
        strided = zipped(expanded, trial.primals)
        out_dot = trial.jvp(trial.dots, strided, run(trial.case, strided))
        trial.agree("wrong on expanded input", out_dot, trial.jvp(trial.dots, primals, run(trial.case, primals)))


# ---------------------------------------------------------------------------------------------- the table


def test_every_rule_has_one_row():
    """But those of other packages' ops, which are in the table once somebody has asked for them."""
    own = [op for op in TABLE if op._schema.name not in BY_NAME]
    assert sorted(str(case.op) for case in CASES) == sorted(map(str, own))


@pytest.mark.parametrize("case", ON_ONE_PROCESS)
def test_rule_is_the_derivative(case: Case):
    check_rule(case)


def check_symbolic(case: Case, primals: Values, dots: Values) -> None:
    leaves, structure = tree_flatten((primals, dots))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    guards: list[str] = []

    def tangents(*given: Tensor) -> list[Tensor]:
        values = iter(given)
        replaced = [next(values) if isinstance(x, Tensor) else x for x in leaves]
        primals, dots = tree_unflatten(replaced, structure)
        out = run(case, primals)
        shape_env = getattr(getattr(given[0], "fake_mode", None), "shape_env", None)
        known = len(shape_env.guards) if shape_env else 0
        out_dot, source = tangents_of(case.op, out, primals, dots)
        assert source == "table"
        guards.extend(str(guard.expr) for guard in (shape_env.guards[known:] if shape_env else []))
        return [x for x in flat(out_dot) if isinstance(x, Tensor)]

    graph = make_fx(tangents, tracing_mode="symbolic")(*tensors)
    # an addition may ask whether there is more than one element to add, and no more
    assert all(guard.startswith("Ne(") for guard in guards), guards
    for got, want in zip(graph(*tensors), tangents(*tensors), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ON_ONE_PROCESS)
def test_rule_traces_with_symbolic_sizes(case: Case):
    for number, made in enumerate(case.calls):
        rng = seeded(case, number)
        primals = primals_of(case, made, rng)
        check_symbolic(case, primals, like(active_of(TABLE[case.op], primals), rng))


@pytest.mark.parametrize("precision", PRECISIONS[:2])
@pytest.mark.parametrize("case", ON_ONE_PROCESS)
def test_rule_in_bfloat16_is_off_by_a_few_roundings(case: Case, precision: str):
    for number, made in enumerate(case.calls):
        rng = seeded(case, number)
        primals = primals_of(case, made, rng)
        if any(isinstance(x, Tensor) and x.is_complex() for x in tree_flatten(primals)[0]):
            continue
        rounded = zipped(lambda x: x.bfloat16() if x.dtype == torch.float64 else x, primals)
        exact = zipped(lambda x: x.double() if x.dtype == torch.bfloat16 else x, rounded)
        try:
            out = run(case, rounded)
        except (NotImplementedError, RuntimeError) as error:
            if "BFloat16" not in str(error):
                raise
            continue
        rule = TABLE[case.op]
        dots = like(active_of(rule, rounded), rng)
        trial = Trial(case, made, rule, rounded, out, dots, rng)
        double = apply_rule(rule, run(case, exact), exact, zipped(lambda x: x.double(), dots))
        pairs = zip(flat(out), trial.flat(double), strict=True)
        expected = [x.to(o.dtype) if isinstance(x, Tensor) else None for o, x in pairs]
        if precision == "model":
            trial.agree("in bfloat16 != in float64", trial.jvp(dots), expected, tolerance=2**-6)
            continue
        wide = zipped(lambda x: x.float() if x.dtype == torch.bfloat16 else x, dots)
        found, _ = tangents_of(case.op, out, rounded, wide, precision)
        found = [d if isinstance(d, Tensor) else None for d in trial.flat(found)]
        pairs = zip(found, trial.flat(double), strict=True)
        expected = [None if d is None else x.to(d.dtype) for d, x in pairs]
        trial.agree(f"with {precision} != in float64", found, expected, tolerance=2**-6)


# --------------------------------------------------------------------------------------- wrong rules


@contextmanager
def table_without(*ops: OpOverload) -> Iterator[None]:
    saved = {op: TABLE.pop(op) for op in ops if op in TABLE}
    try:
        yield
    finally:
        for op in ops:
            TABLE.pop(op, None)
        TABLE.update(saved)


@pytest.mark.parametrize("case", ON_ONE_PROCESS)
def test_a_term_off_by_a_thousandth_is_caught(case: Case):
    rule = TABLE[case.op]
    for i, term in enumerate(rule.terms):

        def scaled(*args: Any, fn: Any = term.fn, **dots: Any) -> Any:
            return tree_map(lambda x: x * 1.001 if has_tangent(x) else x, fn(*args, **dots))

        terms = [*rule.terms[:i], replace(term, fn=scaled), *rule.terms[i + 1 :]]
        with pytest.raises(AssertionError):
            check_rule(case, replace(rule, terms=terms))


def row_of(op: OpOverload) -> Case:
    return next(case for case in CASES if case.op is op)


def as_if_contiguous(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


def half_missing(x: Tensor, dim: Any, keepdim: bool, x_dot: Tensor) -> Tensor:
    return ((x - x.mean(dim, keepdim=True)) * x_dot).mean(dim, keepdim)


WRONG = {
    "off by 0.1 %": (aten.sin.default, lambda y, x, *, x_dot: 1.001 * x_dot * x.cos()),
    "wrong sign": (aten.cos.default, lambda y, x, *, x_dot: x_dot * x.sin()),
    "wrong at kinks": (aten.relu.default, lambda y, x, *, x_dot: torch.where(x >= 0, x_dot, 0)),
    "wrong at ties": (aten.max.default, lambda y, x, *, x_dot: x_dot.flatten()[x.argmax()]),
    "conjugated": (aten.exp.default, lambda y, x, *, x_dot: x_dot * y.conj()),
    "dim ignored": (aten.cumsum.default, lambda y, x, *_, x_dot: x_dot.cumsum(-1)),
    "keepdim ignored": (aten.sum.dim_IntList, lambda y, x, dim, *_, x_dot: x_dot.sum(dim)),
    "correction ignored": (
        aten.var.correction,
        lambda y, x, dim, _, keepdim, *, x_dot: 2 * half_missing(x, dim, keepdim, x_dot),
    ),
    "alpha ignored": (aten.add.Tensor, lambda y, a, b, *_, b_dot: b_dot),
    "bias kept": (aten.addmm.default, lambda y, a, b, c, *_, b_dot: torch.addmm(a, b_dot, c)),
    "padding kept": (
        aten.constant_pad_nd.default,
        lambda y, x, pad, value, *, x_dot: aten.constant_pad_nd(x_dot, pad, value),
    ),
    "not linear": (aten.neg.default, lambda y, x, *, x_dot: -x_dot + 1e-6 * x_dot * x_dot),
    "operand forgotten": (aten.mul.Tensor, lambda y, a, b, *, a_dot=None, b_dot=None: a_dot * b),
    "primal for a missing tangent": (
        aten.where.self,
        lambda y, c, a, b, *, a_dot=None, b_dot=None: torch.where(
            c, a if a_dot is None else a_dot, b if b_dot is None else b_dot
        ),
    ),
    "wrong on a strided tangent": (aten.clone.default, lambda y, x, *_, x_dot: as_if_contiguous(x_dot)),
    "wrong on a strided primal": (aten.sin.default, lambda y, x, *, x_dot: as_if_contiguous(x).cos() * x_dot),
    "none": (aten.tanh.default, lambda y, x, *, x_dot: None),
    "tangent of a constant": (aten.floor.default, lambda y, x, *, x_dot: x_dot),
    "writes to the tangent": (aten.neg.default, lambda y, x, *, x_dot: x_dot.neg_()),
    "writes to the primal": (aten.exp.default, lambda y, x, *, x_dot: y.mul_(x_dot)),
    "wrong shape": (aten.neg.default, lambda y, x, *, x_dot: x_dot.new_ones(7)),
    "complex for real": (aten.neg.default, lambda y, x, *, x_dot: -1j * x_dot),
    "too few outputs": (aten.sort.default, lambda out, x, *_, x_dot: (x_dot,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule_is_caught(name: str):
    op, fn = WRONG[name]
    with table_without(op):
        jvp(op)(fn)
        wrong = TABLE[op]
    with pytest.raises(AssertionError):
        check_rule(row_of(op), wrong)


# ------------------------------------------------------------------------------- registration, engine


@pytest.mark.parametrize("again", [linear, bilinear, no_tangent])
@pytest.mark.parametrize("op", [aten.mul.Tensor, aten.neg.default, aten.floor.default])
def test_registering_twice_raises(again: Any, op: OpOverload):
    before = list(TABLE[op].terms)
    with pytest.raises(ValueError, match="already has a rule"):
        again(op)
    assert TABLE[op].terms == before


MALFORMED = {
    "names no tangent": lambda y, x: x,
    "must take the output and 1 arguments": lambda x, *, x_dot: x_dot,
    "'z_dot' is not the tangent of one of": lambda y, x, *, z_dot: z_dot,
    "'y_dot' is not the tangent of one of": lambda y, x, *, y_dot: y_dot,
    "each of several tangents needs the default None": lambda y, x, *, x_dot, z_dot: x_dot,
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_rule_raises_and_leaves_no_trace(message: str):
    op = aten.erfinv.default
    with table_without(op):
        with pytest.raises(ValueError, match=message):
            jvp(op)(MALFORMED[message])
        assert op not in TABLE


def test_tangent_of_a_number_raises_and_leaves_no_trace():
    op = aten.logit.default
    with table_without(op):
        with pytest.raises(ValueError, match="no tensor argument eps"):
            jvp(op)(lambda y, x, eps, *, eps_dot: eps_dot)
        with pytest.raises(ValueError, match="no tensor argument weight"):
            linear(op, wrt="weight")
        assert op not in TABLE


def test_terms_with_different_preconditions_raise():
    with table_without(aten.hypot.default):
        linear(aten.hypot.default, wrt="self", when=lambda *_: True)
        with pytest.raises(ValueError, match="different preconditions"):
            linear(aten.hypot.default, wrt="other")


def tangents(op: OpOverload, *args: Any, **dots: Any) -> tuple[Any, str]:
    return tangents_of(op, op(*args), bind(op, args, {}), dots)


def test_argument_that_the_rule_does_not_know_is_derived():
    x, c_dot = torch.rand(3, 4, 2), torch.randn(4, 2)
    with table_without(aten.mul.Tensor):
        jvp(aten.mul.Tensor)(lambda y, a, b, *, a_dot: a_dot * b)
        out_dot, source = tangents(aten.mul.Tensor, x, c_dot, other=c_dot)
    assert source == "derived"
    torch.testing.assert_close(out_dot, x * c_dot)


def test_call_outside_the_precondition_is_derived():
    x = torch.randn(3, dtype=torch.complex128)
    x_dot = torch.randn_like(x)
    out_dot, source = tangents(aten.abs.default, x, self=x_dot)
    assert source == "derived"
    torch.testing.assert_close(out_dot, (x.conj() * x_dot).real / x.abs())


def test_collective_without_a_tangent_is_refused():
    x = torch.randn(4)
    for op, reduce_op, how in ((c10d.all_reduce, "product", ()), (c10d.reduce_scatter_tensor, "max", (2,))):
        arguments = bind(op.default, (x, reduce_op, *how, "0"), {})
        with pytest.raises(NoRule, match=f"it reduces by {reduce_op}"):
            tangents_of(op.default, x, arguments, {"input": x})


def test_attention_with_dropout_is_refused():
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(NoRule, match="precondition"):
        tangents_of(op, (q, q[..., 0]), bind(op, (q, q, q, 0.1), {}), {"query": q})


def test_fused_attention_of_the_cpu_in_float32():
    """The op itself, for which attention in float64 stands in above."""
    q, k, v, q_dot, k_dot, v_dot = torch.randn(6, 2, 3, 5, 4)
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    (o_dot, lse_dot), source = tangents(op, q, k, v, 0.0, True, query=q_dot, key=k_dot, value=v_dot)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.mT / 2).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    expected = torch.func.jvp(plain, (q, k, v), (q_dot, k_dot, v_dot))[1]
    assert source == "table"
    torch.testing.assert_close((o_dot, lse_dot), expected)


# ------------------------------------------------------------------------------------------ collectives


def check_collectives(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        if case.group:
            check_rule(case, rank=rank)
    dist.destroy_process_group()


@pytest.mark.long
def test_collectives_on_two_processes(tmp_path: Path):
    torch.multiprocessing.spawn(check_collectives, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_determinant_of_singular_matrices(n: int, dtype: torch.dtype, differentiable: bool):
    """The cofactors of ones with two equal rows, or all, whose pivots are zero or what rounding leaves of it."""
    a, a_dot = torch.randn(2, 4000, n, n, dtype=dtype)  # a step aside has met another singular one once in a thousand
    a[:2000, -1] = a[:2000, 0]
    a[2000:3000] = a[2000:3000, :1]
    u, s, vh = torch.linalg.svd(a.to(torch.complex128))
    others = torch.stack([torch.cat((s[:, :i], s[:, i + 1 :]), 1).prod(1) for i in range(n)], 1)
    cofactors = (torch.linalg.det(u) * torch.linalg.det(vh))[:, None, None] * (vh.mH * others[:, None]) @ u.mH
    want = (cofactors @ a_dot.to(u.dtype)).diagonal(0, -2, -1).sum(-1)
    settings = {"differentiable_tangent": True} if differentiable else {}
    got = jvpgraph.jvp(torch.linalg.det, (a,), (a_dot,), backend="eager", **settings)[1]
    torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=1e3 * n * torch.finfo(dtype).eps * 4**n)


FAR_FROM_ZERO = {
    "layer norm": (lambda x: F.layer_norm(x, (64,)), (256, 64), (96, 64)),
    "group norm": (lambda x: F.group_norm(x, 2), (16, 8, 16), (12, 8, 24)),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), (64, 8), (48, 8)),
    "instance norm": (F.instance_norm, (8, 4, 32), (6, 4, 48)),
    "log_softmax": (lambda x: x.log_softmax(-1), (64, 64), (48, 96)),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.arange(len(x)), reduction="none"), (64, 64), (48, 96)),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAR_FROM_ZERO)
@pytest.mark.parametrize("backend", ["op_by_op", "eager", "inductor"])
def test_what_is_far_from_zero_is_as_near_as_pytorchs(backend, name, dtype):
    """Where values and tangents have large means, of which nothing is left: rounding of one must not meet the other.

    At two sizes, with gradients of the value.
    """
    fn, *shapes = FAR_FROM_ZERO[name]
    slack = 4 if backend == "inductor" else 1.5  # it computes means and deviations in another way
    for shape in shapes:
        x, x_dot = (30 + torch.randn(shape) / 10).to(dtype), (10 + torch.randn(shape)).to(dtype)
        exact = torch.func.jvp(fn, (x.double(),), (x_dot.double(),))[1]
        torchs = torch.func.jvp(fn, (x,), (x_dot,))[1]
        primal, twin, wide = (t.clone().requires_grad_() for t in (x, x, x.double()))
        y, ours = jvpgraph.jvp(fn, (primal,), (x_dot,), backend=backend)
        assert (ours - exact).norm() < slack * (torchs - exact).norm()
        weights = torch.randn_like(y)
        outs = (y, fn(twin), fn(wide))
        found, own, right = (torch.autograd.grad((o * weights).sum(), t)[0] for o, t in zip(outs, (primal, twin, wide)))
        assert (found - right).norm() < 3 * (own - right).norm() + 1e-6 * right.norm()
