"""The cheapest policy that reaches an error, and the best one for a budget, from what ops add."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jvpgraph.diagnosis.records import OpRecord
from jvpgraph.precision import PRECISIONS, Policy, Precision

__all__ = ["cheapest"]


@dataclass(frozen=True, eq=False)
class _Group:
    """Equal ops of equal modules, such as the first layers of all MLPs: squares of errors and bytes, by precision."""

    module: str  # with * for numbers
    op: str  # without the overload
    errors: dict[str, float]
    traffic: dict[str, int]


Choice = dict[_Group, Precision]
STEPS = 1000


def cheapest(
    ops: Iterable[OpRecord], errors: tuple[float, float], calls: int, error: float | None, budget: float | None
) -> Policy:
    """Float32 where it wins most for its bytes, as far as the error or the budget asks for it.

    Errors of ops are taken for independent, and weighed by their influence. What the tangent is off by beyond their
    sum is owed to the values, and stays; it is known best where the diagnosis was made with float32 tangents, whose own
    errors are small. Half of the error of the value is the least that it is taken for. On a DiT of 4 to 12 layers the
    estimate is right to a third.

    Args:
        ops: the records of a diagnosis.
        errors: of the value and the tangent that come out.
        calls: how many the records are of.
        error: to be reached.
        budget: what the tangents may read and write, as a multiple of what they do with "model".

    Raises:
        ValueError: neither or both are given, the budget is below 1, or the error cannot be reached.
    """
    if (error is None) == (budget is None):
        raise ValueError("give either an error to be reached or a budget, a multiple of the bytes of tangents")
    known = [op for op in ops if op.active and all(map(math.isfinite, op.adds_in.values()))]
    value_error, tangent_error = errors
    if not known or not math.isfinite(tangent_error):
        raise ValueError("this diagnosis has no finite errors to go by: mend what it shows first")
    groups = _groups(known)
    added = sum((op.influence * op.adds) ** 2 for op in known) / calls
    of_values = max(tangent_error**2 - added, (value_error / 2) ** 2)
    least = sum(group.traffic["model"] for group in groups)
    if error is not None:
        for chosen, left in _best(groups):
            if math.sqrt(of_values + left / calls) <= error:
                return _as_policy(chosen)
        raise ValueError(
            f"no precision of tangents brings the error to {error:.1e}: float32 everywhere leaves "
            f"{math.sqrt(of_values + left / calls):.1e}, which is owed to the values, as the model rounds them"
        )
    assert budget is not None
    if budget < 1:
        raise ValueError(f"the budget is a multiple of the bytes of tangents of the model's precision, not {budget}")
    for chosen, _ in _best(groups):
        if sum(group.traffic[precision] for group, precision in chosen.items()) > budget * least:
            break
        best = chosen
    return _as_policy(best)


def _groups(ops: list[OpRecord]) -> list[_Group]:
    alike: dict[tuple[str, str], list[OpRecord]] = {}
    for op in ops:
        module = ".".join("*" if part.isdecimal() else part for part in op.module.split("."))
        alike.setdefault((module, op.op.rpartition(".")[0]), []).append(op)
    return [
        _Group(
            module,
            name,
            {precision: sum((op.influence * op.adds_in[precision]) ** 2 for op in found) for precision in PRECISIONS},
            {precision: sum(op.bytes_in[precision] for op in found) for precision in PRECISIONS},
        )
        for (module, name), found in alike.items()
    ]


def _best(groups: list[_Group]) -> Iterator[tuple[Choice, float]]:
    """The choices with ever smaller sums of squared errors, and those, from the cheapest on: a knapsack of groups, of
    which each has one of three precisions, filled in steps of a thousandth of what float32 everywhere costs more."""
    extra = {group: {p: group.traffic[p] - group.traffic["model"] for p in PRECISIONS} for group in groups}
    unit = max(sum(more["float32_matmul"] for more in extra.values()) / STEPS, 1)
    best: dict[int, tuple[float, tuple[Precision, ...]]] = {0: (0.0, ())}  # by what is spent
    for group in groups:
        grown: dict[int, tuple[float, tuple[Precision, ...]]] = {}
        for spent, (left, chosen) in best.items():
            for precision in PRECISIONS:
                cost = spent + math.ceil(extra[group][precision] / unit)
                found = left + group.errors[precision], (*chosen, precision)
                if cost not in grown or found[0] < grown[cost][0]:
                    grown[cost] = found
        best = _improving(grown)
    for left, chosen in best.values():
        yield dict(zip(groups, chosen)), left


def _improving(found: dict[int, tuple[float, tuple[Precision, ...]]]) -> dict[int, tuple[float, tuple[Precision, ...]]]:
    """What is better than all that is cheaper, from the cheapest on."""
    kept: dict[int, tuple[float, tuple[Precision, ...]]] = {}
    least = math.inf
    for cost in sorted(found):
        if found[cost][0] < least:
            kept[cost], least = found[cost], found[cost][0]
    return kept


def _as_policy(chosen: Choice) -> Policy:
    """As few patterns as say so: those of a module count for its parts, too, so that outer ones come first."""
    by_bytes = {p: sum(g.traffic["model"] for g, own in chosen.items() if own == p) for p in PRECISIONS}
    policy = Policy((), default=max(PRECISIONS, key=by_bytes.__getitem__))
    for group, precision in sorted(chosen.items(), key=lambda item: item[0].module.count(".") + bool(item[0].module)):
        if policy.at(group.module.replace("*", "0"), f"{group.op}.default") != precision:
            policy = Policy((*policy.pairs, (f"{group.module}:{group.op}", precision)), policy.default)
    return policy
