"""The rule table: which op has which forward-mode derivative.

A rule returns tangents only. It never sees a zero: the engine (:mod:`jvpgraph.rules.apply`) leaves out the
terms of inactive inputs, adds up the others, and brings the sum to the shape and dtype of the primal output.

Four ways to state a rule, keyed by OpOverload::

    linear(aten.neg.default)              # the same op on the tangent of its first tensor
    linear(aten.where.self, wrt="self other")   # jointly linear: inactive ones become zeros
    bilinear(aten.mm.default)             # one term per operand
    no_tangent(aten.ge.Scalar)            # the output never has a tangent

    @jvp(aten.div.Tensor)
    def div(y, a, b, *, a_dot):           # the primal output, every schema argument, one tangent by keyword
        return a_dot / b

    @jvp(aten.div.Tensor)
    def div(y, a, b, *, b_dot):           # one function per operand ...
        return -y * b_dot / b

    @jvp(jvpgraph.attention.default)
    def attention(o, q, k, v, *, q_dot=None, k_dot=None):   # ... or one for several; inactive ones are None
        ...

A function may end in ``*_`` for the schema arguments that it does not need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = [
    "TABLE",
    "Rule",
    "Term",
    "bilinear",
    "is_tensor_argument",
    "jvp",
    "jvp_by_name",
    "linear",
    "no_tangent",
    "rule_of",
]

When = Callable[..., "bool | str"]  # of the schema arguments: whether the rule holds, or why it does not


@dataclass(frozen=True)
class Term:
    """One summand of a tangent: ``fn(out, *schema_args, **{name_dot: ...})``, linear in those tangents."""

    fn: Callable[..., Any]
    wrt: tuple[str, ...]  # schema argument names
    dots: tuple[str, ...]  # the keyword that carries the tangent of each of them
    takes: int | None  # how many positional arguments fn has; None: all
    joint: bool  # zeros are None (joint functions) instead of the term being left out


@dataclass
class Rule:
    """Everything known about one op. Without terms its output never has a tangent."""

    op: OpOverload
    terms: list[Term] = field(default_factory=list)
    when: When | None = None

    @property
    def wrt(self) -> tuple[str, ...]:
        return tuple(name for term in self.terms for name in term.wrt)

    def applies(self, arguments: dict[str, Any]) -> bool:
        """Whether the precondition of this rule holds for these schema arguments."""
        return not self.unmet(arguments)

    def unmet(self, arguments: dict[str, Any]) -> str:
        """Why the precondition does not hold; empty where it does."""
        holds = self.when is None or self.when(*arguments.values())
        return holds if isinstance(holds, str) else "" if holds else "the precondition of its rule does not hold"


TABLE: dict[OpOverload, Rule] = {}


def is_tensor_argument(argument: torch.Argument) -> bool:
    """Whether a schema argument is a Tensor, Tensor?, Tensor[] or Tensor?[]."""
    return "Tensor" in str(argument.type)


def _tensor_names(op: OpOverload) -> list[str]:
    return [a.name for a in op._schema.arguments if is_tensor_argument(a)]


def _add(op: OpOverload, term: Term | None, when: When | None) -> None:
    rule = TABLE.get(op) or Rule(op, when=when)
    if op in TABLE and (term is None or not rule.terms or set(term.wrt) & set(rule.wrt)):
        covered = ", ".join(rule.wrt) or "every argument (no tangent)"
        raise ValueError(f"{op} already has a rule for {covered}")
    if when is not rule.when:
        raise ValueError(f"the terms of {op} state different preconditions")
    if term is not None:
        unknown = set(term.wrt) - set(_tensor_names(op))
        if unknown:
            raise ValueError(f"{op} has no tensor argument {', '.join(sorted(unknown))}: {op._schema}")
        rule.terms.append(term)
    TABLE[op] = rule


def _substituting(op: OpOverload, wrt: tuple[str, ...]) -> Term:
    """The term that calls ``op`` itself with the tangents of ``wrt`` in place of the primals."""
    dots = tuple(f"{name}_dot" for name in wrt)
    arguments = op._schema.arguments

    def substitute(_out: Any, *args: Any, **tangents: Any) -> Any:
        named = {a.name: value for a, value in zip(arguments, args)}
        for name in wrt:
            named[name] = _or_zeros(tangents.get(f"{name}_dot"), named[name])
        positional = [named[a.name] for a in arguments if not a.kwarg_only]
        return op(*positional, **{a.name: named[a.name] for a in arguments if a.kwarg_only})

    return Term(substitute, wrt, dots, takes=None, joint=len(wrt) > 1)


def _or_zeros(tangent: Any, primal: Any) -> Any:
    if isinstance(primal, (list, tuple)):
        return [_or_zeros(t, p) for t, p in zip(tangent or [None] * len(primal), primal)]
    return torch.zeros_like(primal) if tangent is None and primal is not None else tangent


def linear(*ops: OpOverload, wrt: str | None = None, when: When | None = None) -> None:
    """Declare ops linear in the arguments ``wrt`` (space-separated; default: the first tensor argument)."""
    for op in ops:
        names = tuple(wrt.split()) if wrt else (_tensor_names(op)[0],)
        _add(op, _substituting(op, names), when)


def bilinear(*ops: OpOverload, wrt: str | None = None, when: When | None = None) -> None:
    """Declare ops linear in each of ``wrt`` separately (default: the first two tensor arguments)."""
    for op in ops:
        for name in wrt.split() if wrt else _tensor_names(op)[:2]:
            _add(op, _substituting(op, (name,)), when)


def no_tangent(*ops: OpOverload) -> None:
    """Declare that the outputs of these ops never carry a tangent (piecewise constant, integer or random)."""
    for op in ops:
        _add(op, None, None)


def jvp(*ops: OpOverload, when: When | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as rule, or as one more term of the rule, of each op.

    The function's positional parameters are the primal output (a tuple where the op has several) and the
    schema arguments in order; its keyword-only parameters are the tangents, named after its own positional
    parameters with ``_dot`` appended. It returns the tangent of the output, or a tuple with None where there
    is none.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(fn).parameters.values())
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        tangents = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if not tangents:
            raise ValueError(f"{fn.__name__} names no tangent: add a keyword-only parameter such as *, x_dot")
        joint = all(p.default is None for p in tangents)
        if not joint and len(tangents) > 1:
            raise ValueError(f"{fn.__name__}: each of several tangents needs the default None (inactive)")
        for op in ops:
            schema = [a.name for a in op._schema.arguments]
            if not variadic and len(positional) != 1 + len(schema):
                raise ValueError(f"{fn.__name__} must take the output and {len(schema)} arguments of {op}")
            named = {f"{own}_dot": name for own, name in zip(positional[1:], schema)}
            try:
                wrt = tuple(named[p.name] for p in tangents)
            except KeyError as missing:
                message = f"{fn.__name__}: {missing} is not the tangent of one of {positional[1:]}"
                raise ValueError(message) from None
            dots = tuple(p.name for p in tangents)
            _add(op, Term(fn, wrt, dots, None if variadic else len(positional), joint), when)
        return fn

    return register


# ------------------------------------------------------------------------------- ops of packages that may not be there

ByName = Callable[[Any, dict[str, Any], dict[str, Any]], Any]
BY_NAME: dict[str, tuple[ByName, tuple[str, ...], Callable[[dict[str, Any]], str]]] = {}


def jvp_by_name(*names: str, wrt: str, unmet: Callable[[dict[str, Any]], str]) -> Callable[[ByName], ByName]:
    """Register a function as the rule of ops that another package defines, once they are there.

    Their schemas differ from version to version, so the function takes the primal output, the arguments by name and the
    tangents by ``name_dot``, None where there is none.

    Args:
        names: such as "flash_attn::_flash_attn_forward".
        wrt: the arguments that may have tangents, of which a version need not have all.
        unmet: why the rule does not hold for these arguments; empty where it does.
    """

    def register(fn: ByName) -> ByName:
        for name in names:
            BY_NAME[name] = (fn, tuple(wrt.split()), unmet)
        return fn

    return register


def rule_of(op: OpOverload) -> Rule | None:
    """The rule of an op; None where there is none."""
    if op not in TABLE and op._schema.name in BY_NAME:
        fn, given, unmet = BY_NAME[op._schema.name]
        names = [argument.name for argument in op._schema.arguments]
        wrt = tuple(name for name in given if name in names)

        def term(out: Any, *args: Any, **dots: Any) -> Any:
            return fn(out, dict(zip(names, args)), {f"{name}_dot": dots.get(f"{name}_dot") for name in wrt})

        def when(*args: Any) -> bool | str:
            return unmet(dict(zip(names, args))) or True

        term.__module__ = when.__module__ = fn.__module__
        terms = [Term(term, wrt, tuple(f"{name}_dot" for name in wrt), takes=None, joint=True)]
        TABLE[op] = Rule(op, terms, when)
    return TABLE.get(op)
