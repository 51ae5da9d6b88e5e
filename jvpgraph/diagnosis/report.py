"""What :func:`jvpgraph.diagnose` found: a table, JSON, a picture, and the records themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jvpgraph.diagnosis.cheapest import cheapest
from jvpgraph.diagnosis.kinds import KINDS
from jvpgraph.diagnosis.picture import draw
from jvpgraph.diagnosis.records import Difference, Loss, ModuleRecord, OpRecord, Output, finite_or
from jvpgraph.precision import Policy

__all__ = ["Diagnosis"]

SHOWN = 10  # rows of each part of the table
NOTABLE = 0.1  # of a sum of terms that is left over, and of elements
ROWS = {"outputs": Output, "ops": OpRecord, "modules": ModuleRecord, "losses": Loss, "differences": Difference}


@dataclass
class Diagnosis:
    """Printable; ``ops`` and ``modules`` have every figure, in order of execution.

    Attributes:
        model: the name of its class.
        reference: "float64" or "float32".
        dtype: the narrowest of its parameters.
        precision: of tangents, as in Config.
        about: what else there is to say of the model, such as where its weights are from.
        outputs: errors of what each call gives.
        ops: one record for each op with a tangent.
        modules: one for each call of a module.
        losses: digits lost on the way in, decisions that differ, and what could not be compared.
        differences: errors of central differences by precision and step.
    """

    model: str
    reference: str
    dtype: str
    precision: str
    about: str = ""
    outputs: list[Output] = field(default_factory=list)
    ops: list[OpRecord] = field(default_factory=list)
    modules: list[ModuleRecord] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def worst(self, n: int = SHOWN, where: Callable[[OpRecord], bool] = lambda record: True) -> list[OpRecord]:
        """The ``n`` places that add the largest errors, worst first: what makes inf or nan before all, and of several
        calls of one place the worst.

        Args:
            where: which records count, such as ``lambda op: op.kind == "norm"``.
        """
        worst: dict[tuple[str, str, str], OpRecord] = {}
        for record in filter(where, self.ops):
            place = (record.module, record.op, record.line)
            if place not in worst or record.badness > worst[place].badness:
                worst[place] = record
        return sorted(worst.values(), key=lambda record: (-record.badness, record.index))[:n]

    def policy(self, *, error: float | None = None, budget: float | None = None) -> Policy:
        """See :meth:`jvpgraph.Policy.auto`."""
        return cheapest(self.ops, (self.value_error, self.tangent_error), len(self.outputs), error, budget)

    @property
    def first_not_finite(self) -> OpRecord | None:
        """The first op that makes inf or nan of what is finite."""
        return next((record for record in self.ops if record.not_finite or record.value_not_finite), None)

    @property
    def value_error(self) -> float:
        """The largest of the outputs, over all calls."""
        return max((e for output in self.outputs for e in output.value.values()), default=0.0)

    @property
    def tangent_error(self) -> float:
        return max((e for output in self.outputs for e in output.tangent.values()), default=0.0)

    @property
    def best_differences(self) -> dict[str, Difference]:
        """By precision, at the step whose largest error over all calls is smallest."""
        largest: dict[tuple[str, float], Difference] = {}
        for found in self.differences:
            key = (found.precision, found.step)
            if key not in largest or found.error > largest[key].error:
                largest[key] = found
        best: dict[str, Difference] = {}
        for (precision, _), found in largest.items():
            if precision not in best or found.error < best[precision].error:
                best[precision] = found
        return best

    # ----------------------------------------------------------------------------------------------------- files

    def to_json(self) -> str:
        """All of it, inf and nan as strings."""
        return json.dumps({"format": 1, **_plain(asdict(self))})

    def save(self, path: str | Path) -> None:
        """The JSON, which :meth:`load` reads."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Diagnosis:
        """What :meth:`save` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no diagnosis, it is not even JSON: {error}") from error
        if not isinstance(found, dict) or found.pop("format", None) != 1:
            raise ValueError(f"{path} is no diagnosis of this version: make it anew with jvpgraph.diagnose")
        restored: dict[str, Any] = {name: _restored(ROWS[name], x) if name in ROWS else x for name, x in found.items()}
        return cls(**restored)

    def plot(self, path: str | Path) -> None:
        """A PNG: errors over depth of value and tangent, what each kind of op adds, and by time if there are several.

        Raises:
            ImportError: matplotlib is not installed.
        """
        draw(self, path)

    # ----------------------------------------------------------------------------------------------------- table

    def __str__(self) -> str:
        tangents = self.dtype if self.precision == "model" else self.precision
        head = f"{self.model} in {self.dtype}, tangents in {tangents}, against {self.reference}"
        head += f" ({self.about})" if self.about else ""
        parts = [[head], self._outputs(), self._overflow(), self._lost(), self._worst(), self._kinds()]
        parts += [self._cancelling(), self._amplifying(), self._differences()]
        return "\n".join(line for part in parts for line in part)

    def _outputs(self) -> list[str]:
        lines = []
        for output in self.outputs:
            at = "" if output.time is None else f"t = {output.time:<8.4g}"
            for path, error in output.tangent.items():
                name = path or "output"
                lines.append(f"  {name:10s} {at} value off by {output.value[path]:.1e}, tangent by {error:.1e}")
        return lines

    def _overflow(self) -> list[str]:
        first = self.first_not_finite
        if first is None:
            return []
        share = max(first.not_finite, first.value_not_finite)
        what = "value" if first.value_not_finite else "tangent"
        where = f" ({first.where})" if first.where else ""
        return [f"  NOT FINITE first in the {what} of {_place(first)}: {share:.1%} of it{where}"]

    def _lost(self) -> list[str]:
        shown = sorted(self.losses, key=lambda loss: -loss.error)[:SHOWN]
        return [f"  note: {loss}{_at(loss.time)}" for loss in shown] + _more(len(self.losses) - len(shown), "notes")

    def _worst(self) -> list[str]:
        rows = [
            (
                _number(op.adds),
                _number(op.adds_in["float32"]),
                _number(op.adds_value),
                _number(op.before),
                _number(op.after),
                *_named(op),
                _remarks(op) + _at(op.time),
            )
            for op in self.worst()
        ]
        head = ("adds", "if float32", "to value", "before", "after", "module", "op", "line", "")
        return ["  errors of tangents, by the op that adds them:", *_table(head, rows)] if rows else []

    def _kinds(self) -> list[str]:
        rows = []
        for kind in KINDS:
            some = [op for op in self.ops if op.kind == kind and op.active and not op.is_zero]
            sums = [_together(op.adds_in[precision] for op in some) for precision in ("model", "float32")]
            sizes = [sum(op.bytes_in[precision] for op in some) / 2**20 for precision in ("model", "float32")]
            if max(sums):
                rows.append((kind, f"{len(some)}", *map(_number, sums), *(f"{size:.3g}" for size in sizes)))
        head = ("kind", "ops", "in model", "in float32", "MiB", "in float32")
        return (
            ["  what each kind adds, sqrt(sum of squares), and reads and writes:", *_table(head, rows)] if rows else []
        )

    def _cancelling(self) -> list[str]:
        found: dict[tuple[str, str, str], tuple[float, OpRecord]] = {}
        for op in self.ops:
            left = min(op.cancels, op.epilogue)
            if left < NOTABLE and left < found.get(_key(op), (math.inf, op))[0]:
                found[_key(op)] = (left, op)
        worst = sorted(found.values(), key=lambda pair: pair[0])[:5]
        rows = [(f"{left:.1e}", *_named(op), "in the epilogue" * (op.epilogue < op.cancels)) for left, op in worst]
        head = ("left over", "module", "op", "line", "")
        return ["  sums whose terms cancel, |sum| / sum of |terms|:", *_table(head, rows)] if rows else []

    def _amplifying(self) -> list[str]:
        grown = [m for m in self.modules if m.module and finite_or(m.amplifies, 0.0) > 1 and m.norm]
        worst: dict[str, ModuleRecord] = {}
        for m in grown:
            if m.module not in worst or m.amplifies > worst[m.module].amplifies:
                worst[m.module] = m
        top = sorted(worst.values(), key=lambda m: -m.amplifies)[:5]
        rows = [(f"{m.amplifies:.3g}", _number(m.tangent_in), _number(m.tangent), m.module, m.kind) for m in top]
        head = ("grows by", "error in", "error out", "module", "")
        return ["  modules whose tangents grow:", *_table(head, rows)] if rows else []

    def _differences(self) -> list[str]:
        return [
            f"  central differences in {name}: off by {best.error:.1e} at the best step, {best.step:.3g}"
            for name, best in self.best_differences.items()
        ]


def _key(op: OpRecord) -> tuple[str, str, str]:
    return op.module, op.op, op.line


def _place(op: OpRecord) -> str:
    return f"{op.op} in {op.module or 'the model'}, {op.line}"


def _named(op: OpRecord) -> tuple[str, str, str]:
    return op.module or "(the model)", op.op, op.line


def _at(time: float | None) -> str:
    return "" if time is None else f"  at t = {time:.4g}"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.1e}"


def _remarks(op: OpRecord) -> str:
    remarks = [op.kind if op.active else f"{op.kind}, without a tangent"]
    if op.magnifies > 1:
        remarks.append(f"magnifies errors {op.magnifies:.0f} times")
    if op.not_finite or op.value_not_finite:
        remarks.append(f"not finite{f' at {op.where}' if op.where else ''}")
    elif op.largest > NOTABLE:
        remarks.append(f"reaches {op.largest:.0%} of the largest number")
    if op.underflow > NOTABLE:
        remarks.append(f"{op.underflow:.0%} underflow")
    if op.cancels < NOTABLE:
        remarks.append(f"terms cancel to {op.cancels:.0e}")
    if op.epilogue < NOTABLE:
        remarks.append(f"epilogue cancels to {op.epilogue:.0e}")
    return ", ".join(remarks)


def _together(errors: Iterable[float]) -> float:
    """Of errors that have nothing to do with each other."""
    return math.sqrt(sum(finite_or(error, 0.0) ** 2 for error in errors))


def _more(count: int, what: str) -> list[str]:
    return [f"  and {count} more {what}"] if count > 0 else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    if not rows:
        return []
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["    " + "  ".join(f"{x:{w}}" for x, w in zip(row, widths)).rstrip() for row in (head, *rows)]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _restored(row: Any, found: list[dict[str, Any]]) -> list[Any]:
    kinds = {f.name: str(f.type) for f in fields(row)}

    def value(name: str, x: Any) -> Any:
        kind = kinds[name]
        if kind == "dict[str, float]":
            return {key: float(number) for key, number in x.items()}
        if kind.startswith("tuple"):
            return tuple(x)
        return float(x) if kind.startswith("float") and x is not None else x

    return [row(**{name: value(name, x) for name, x in fields_of.items()}) for fields_of in found]
