"""What a diagnosis is made of: plain numbers and names, which JSON can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Difference", "Loss", "ModuleRecord", "OpRecord", "finite_or"]

MAGNIFIED = 4.0  # times an error is more than it adds up to


@dataclass(frozen=True)
class OpRecord:
    """An op, in one call of the model: one whose result has a tangent, or that computes values which others' tangents
    are made of.

    Errors are norm-wise and relative to the reference: ``|found - reference| / |reference|``, infinite where something
    is not finite, and nan where the reference is zero and what was found is not.
    """

    index: int  # in order of execution, among the records of a call
    time: float | None  # at which the model was called, if several were asked for
    module: str  # dotted name; "" for the model itself
    op: str  # such as "aten.add.Tensor"
    kind: str  # one of KINDS
    line: str  # of the user's code
    dtype: str  # of the primal result
    precision: str  # of the tangent's computation: "model", "float32" or "float32_matmul"
    shape: tuple[int, ...]
    value: float  # error of the primal
    tangent: float  # error of the tangent
    adds: float  # error that the op makes out of exact inputs, in the precision that it has; nan where it has no say
    adds_in: dict[str, float]  # the same in each precision
    adds_value: float  # the same of the primal
    before: float  # the largest error among the values and tangents that it takes
    norm: float  # of the reference's tangent
    bytes_in: dict[str, int]  # that its tangents take, read and written, in each precision
    influence: float = 1.0  # of its error on that of the output, both relative, as if nothing were magnified
    cancels: float = 1.0  # |sum of terms| / sum of |terms|; 1 where there is one term
    epilogue: float = 1.0  # of attention: |o_dot| / (|p v_dot + h v| + |r o|), r centred by the mean over keys
    not_finite: float = 0.0  # share of the tangent's elements that are inf or nan, and not in the reference
    value_not_finite: float = 0.0  # the same of the primal
    underflow: float = 0.0  # share that is zero, and not in the reference
    largest: float = 0.0  # element of the tangent, as a share of the largest number of its dtype
    where: str = ""  # the part of the result that is not finite, if it is a part
    active: bool = True  # whether it has a tangent
    is_zero: bool = False  # the reference's tangent is nothing but rounding, and its error says nothing

    @property
    def bytes(self) -> int:
        """That its tangents take in the precision that they have."""
        return self.bytes_in[self.precision]

    @property
    def overflows(self) -> bool:
        """Whether it makes inf or nan out of what is finite."""
        return (self.not_finite > 0 or self.value_not_finite > 0) and math.inf in (self.adds, self.adds_value)

    @property
    def magnifies(self) -> float:
        """By how much errors grow from what it takes to what it gives, if it adds none of that size; else 1. Sines of
        large angles do so, and sums that cancel."""
        known = max(self.before, self._added)
        if self.is_zero or not known or not math.isfinite(self.after) or self.after <= MAGNIFIED * known:
            return 1.0
        return self.after / known

    @property
    def after(self) -> float:
        """The larger of the errors of value and tangent."""
        return max(finite_or(self.tangent, 0.0), finite_or(self.value, 0.0))

    @property
    def badness(self) -> float:
        """By which records are sorted: the error that it adds to its tangent, or to its value, or that it has magnified
        those to which it was given."""
        if self.overflows:
            return math.inf
        return max(self._added, self.after if self.magnifies > 1 else 0.0)

    @property
    def _added(self) -> float:
        return max(0.0 if self.is_zero else finite_or(self.adds, 0.0), finite_or(self.adds_value, 0.0))


@dataclass(frozen=True)
class ModuleRecord:
    """What a module does to its tangents, in one call of it."""

    index: int  # in order of leaving
    time: float | None
    module: str
    kind: str  # its class
    depth: int  # of nesting
    value: float  # error of what it gives
    tangent: float
    value_in: float  # error of what it takes
    tangent_in: float
    norm: float  # of the reference's tangents that it gives; 0 where there are none
    norm_in: float  # of those that it takes; if some have the shape of what it gives, as in a residual stream, of those
    adds: float = 0.0  # the largest error that one of its own ops adds
    adds_op: str = ""

    @property
    def amplifies(self) -> float:
        """|tangents out| / |tangents in|; nan without tangents."""
        return self.norm / self.norm_in if self.norm_in else math.nan


@dataclass(frozen=True)
class Loss:
    """Something that is known about digits lost on the way, or that could not be compared."""

    what: str  # "time", "given", "decision", "number", "not compared"
    module: str
    op: str
    line: str
    text: str
    error: float = 0.0
    time: float | None = None

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.module, self.op, self.line) if part)
        return f"{self.text} ({where})" if where else self.text


@dataclass(frozen=True)
class Difference:
    """The error of the tangent that central differences give: ``(f(x + h x_dot) - f(x - h x_dot)) / 2h``."""

    precision: str  # that the model is run in: its own dtype, or "float32"
    step: float  # h
    error: float
    time: float | None = None


@dataclass
class Output:
    """Errors of what the model returns, by the dotted path of the output; "" for a bare tensor."""

    time: float | None
    value: dict[str, float] = field(default_factory=dict)
    tangent: dict[str, float] = field(default_factory=dict)


def finite_or(x: float, other: float) -> float:
    """``x`` unless it is nan."""
    return other if math.isnan(x) else x
