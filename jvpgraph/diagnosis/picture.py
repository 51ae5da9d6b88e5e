"""The picture of a diagnosis."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvpgraph.diagnosis.kinds import KINDS

__all__ = ["draw"]

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def draw(found: Any, path: str | Path) -> None:
    """Errors over depth, on the left those of value and tangent, on the right what each kind of op adds; and below, if
    there are several, by time and by the step of central differences.

    Args:
        found: a Diagnosis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(f"the picture of a diagnosis needs matplotlib: pip install matplotlib ({error})") from error
    several = len({output.time for output in found.outputs}) > 1
    below = several or bool(found.differences)
    figure = figure_class(figsize=(11, 7.5 if below else 4), layout="constrained")
    axes = figure.subplots(2 if below else 1, 2, squeeze=False)
    worst = _worst_time(found)
    ops = [op for op in found.ops if op.time == worst]
    at = "" if worst is None else f" at t = {worst:.4g}"
    _lines(axes[0][0], f"error up to there{at}", _up_to_there(ops))
    _lines(axes[0][1], f"error that an op adds{at}", _added(ops), marks=True)
    if below:
        _by_time(axes[1][0], found)
        _by_step(axes[1][1], found)
    figure.suptitle(f"{found.model}, {found.dtype}, tangents: {found.precision}, against {found.reference}")
    figure.savefig(path, dpi=120, format="png")


Curves = dict[str, tuple[list[float], list[float]]]


def _worst_time(found: Any) -> float | None:
    errors = [(max(output.tangent.values(), default=0.0), output.time) for output in found.outputs]
    worst: float | None = max(errors, key=lambda pair: pair[0], default=(0.0, None))[1]
    return worst


def _up_to_there(ops: Sequence[Any]) -> Curves:
    places = [float(op.index) for op in ops]
    return {"value": (places, [op.value for op in ops]), "tangent": (places, [op.tangent for op in ops])}


def _added(ops: Sequence[Any]) -> Curves:
    of_kind = {kind: [op for op in ops if op.kind == kind and op.kind != "move"] for kind in KINDS}
    return {
        kind: ([float(op.index) for op in some], [op.adds for op in some]) for kind, some in of_kind.items() if some
    }


def _by_time(axis: Any, found: Any) -> None:
    rows = sorted((output for output in found.outputs if output.time is not None), key=lambda output: output.time)
    times = [row.time for row in rows]
    curves = {
        what: (times, [max(getattr(row, what).values(), default=0.0) for row in rows]) for what in ("value", "tangent")
    }
    _lines(axis, "error of the output by time", curves if rows else {}, marks=True, below="t")


def _by_step(axis: Any, found: Any) -> None:
    curves: Curves = {}
    for precision in dict.fromkeys(row.precision for row in found.differences):
        largest: dict[float, float] = {}
        for row in found.differences:
            if row.precision == precision:
                largest[row.step] = max(row.error, largest.get(row.step, 0.0))
        curves[precision] = (list(largest), list(largest.values()))
    _lines(axis, "central differences, by step", curves, marks=True, below="step")
    if curves:
        axis.set_xscale("log")
        axis.axhline(max(found.tangent_error, 1e-300), color="#555555", linestyle=":", linewidth=1, label="tangent")
        axis.legend(fontsize=8)


def _lines(axis: Any, title: str, curves: Curves, marks: bool = False, below: str = "op, in order") -> None:
    """Errors on a logarithmic scale; what is not finite is marked at the top."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(below, fontsize=9)
    if not curves:
        axis.set_axis_off()
        return
    shown = [y for _, ys in curves.values() for y in ys if math.isfinite(y) and y > 0]
    top = 10 * max(shown, default=1.0)
    for (name, (xs, ys)), colour in zip(curves.items(), COLOURS):
        drawn = [y if math.isfinite(y) and y > 0 else math.nan for y in ys]
        axis.plot(
            xs,
            drawn,
            color=colour,
            marker="." if marks else "",
            linewidth=0.5 if marks else 1,
            markersize=5,
            label=name,
        )
        lost = [x for x, y in zip(xs, ys) if math.isinf(y)]
        axis.plot(lost, [top] * len(lost), color=colour, marker="x", linestyle="", markersize=5)
    if shown:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
