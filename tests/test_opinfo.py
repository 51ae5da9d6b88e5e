"""A sample of ``make opinfo``, and that it sees what is wrong."""

from __future__ import annotations

import ctypes
import time
from unittest.mock import patch

import pytest
import torch

import jvpgraph
from tests.opinfo import run
from tests.opinfo.database import Call
from tests.opinfo.oracle import truth
from tests.opinfo.phases import Case, Phase, Verdict, examine
from tests.opinfo.run import sweep, unexpected, warm_up
from tests.opinfo.table import known, write_table

# Ops in which something has been wrong, and a few of everyday.
OP_BY_OP = (
    *("special.bessel_j0", "nn.functional.soft_margin_loss", "native_layer_norm", "nn.functional.binary_cross_entropy"),
    *("logcumsumexp", "mul", "index_put"),
)
EAGER = ("ldexp", "nn.functional.huber_loss", "nn.functional.group_norm")
SAMPLE = [
    *((op, "op_by_op") for op in OP_BY_OP),
    *((op, "op_by_op in place") for op in ("add", "_foreach_mul")),
    *((op, "op_by_op out=") for op in ("mul", "cat")),
    *((op, "op_by_op inference mode") for op in ("reshape", "to", "nn.functional.mse_loss")),
    *((op, "op_by_op layouts") for op in ("unfold", "diagonal_scatter")),
    *((op, "eager") for op in EAGER),
    *((op, "eager dynamic=True") for op in ("nn.functional.prelu", "nn.functional.glu")),
    *((op, "eager differentiable") for op in ("polar",)),
]


@pytest.mark.long
def test_sample():
    """Right, or refused as docs/opinfo.md says."""
    warm_up(["op_by_op", "eager"])
    listed = known()
    found = [(op, phase, found) for op, phase in SAMPLE for found in sweep(op, phase)["found"]]
    assert not [x for x in found if unexpected(x[2]["verdict"], x[0], x[1], listed)]


def _case(fn, *tensors):
    return Case(Call(fn, tensors, "call"), tuple(range(len(tensors))))


def test_forward_mode_that_returns_silent_zeros_is_not_believed():
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    right = truth(torch.special.bessel_j0, [x], [torch.ones_like(x)])
    ((slope, tolerance),) = right.tangents[0]
    assert right.suspicious
    assert tolerance > 1e-6
    torch.testing.assert_close(slope, -torch.special.bessel_j1(x), rtol=0, atol=1e-8)


def test_differences_are_not_believed_at_kinks_and_jumps():
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for fn in (lambda x: (x == 1).double(), lambda x: torch.where(x == 0, x, 3.0)):
        tangents = truth(fn, [x], [torch.ones_like(x)]).tangents[0]
        assert all(tolerance == 1e-6 for _, tolerance in tangents)  # forward AD's, or none


def test_ties_have_a_convention_and_no_derivative():
    x = torch.zeros(3, dtype=torch.float64)
    right = truth(torch.median, [x], [torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)])
    assert not right.suspicious
    assert [value.item() for value, _ in right.tangents[0]] == [2.0]  # PyTorch's mean, not the median of the slopes


def test_at_a_kink_either_convention_of_pytorchs_will_do():
    x, low = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([2, 2, 2])
    right = truth(lambda x: torch.clamp(x, low), [x], [torch.ones_like(x)])  # forward AD holds the bound back
    assert [value.tolist() for value, _ in right.tangents[0]] == [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize("part", ["value", "tangent", "zero", "gradient"])
def test_what_is_wrong_is_seen(part: str):
    x = torch.rand(3, 4, dtype=torch.float64)

    def wrong(fn, primals, tangents, **_):
        y, y_dot = fn(*primals), torch.func.jvp(fn, tuple(x.detach() for x in primals), tangents)[1]
        if part == "gradient":
            y = y + 1e-3 * (primals[0] - primals[0].detach())
        return y * (1.001 if part == "value" else 1), y_dot * {"tangent": 1.001, "zero": 0.0}.get(part, 1.0)

    with patch.object(jvpgraph, "jvp", wrong):
        verdict = examine(_case(torch.sin, x), Phase("op_by_op", 1))
    assert verdict.what == "wrong"
    assert part in verdict.why


def test_no_graph_of_what_torch_compile_takes_is_a_fault():
    def no_graph(*_, **__):
        raise jvpgraph.CaptureError("the compiler cannot compile the graph: one of our passes")

    def no_graph_either(x):
        return x.sin() if x.sum().item() else x.cos()

    with patch.object(jvpgraph, "jvp", no_graph):
        verdicts = [examine(_case(fn, torch.rand(3)), Phase("eager", 1)) for fn in (torch.sin, no_graph_either)]
    assert [verdict.what for verdict in verdicts] == ["raw", "refused"]


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_a_crash():
    def die(case, phase):
        return Verdict("right") if not case.call.tensors[0].dim() else ctypes.string_at(0)

    with patch.object(run, "examine", die):
        record = sweep("special.airy_ai", "op_by_op")
    assert set(record["counts"]) == {"right", "crash"}  # it goes on behind the case that died
    assert [found["why"] for found in record["found"]] == ["SIGSEGV"]
    with patch.object(run, "examine", lambda case, phase: time.sleep(60)), patch.object(run, "PATIENCE", 0.5):
        assert sweep("special.airy_ai", "eager")["found"][0]["why"] == "no answer"


def test_the_table_lists_what_was_refused(tmp_path):
    found = [{"verdict": "refused", "why": "aten.geqrf.default: no | formula", "case": "call", "count": 2}]
    record = {"op": "geqrf", "phase": "eager", "counts": {"refused": 2}, "found": found}
    path = tmp_path / "opinfo.md"
    assert write_table([record], path) == 0
    assert known(path) == {("refused", "geqrf", "eager")}
    assert not unexpected("refused", "geqrf", "eager", known(path))
    assert unexpected("refused", "geqrf", "op_by_op", known(path))
    assert unexpected("wrong", "geqrf", "eager", known(path))
    wrong = {**record, "found": [{**found[0], "verdict": "wrong"}]}
    assert write_table([wrong], path) == 1
