"""jvpgraph.diagnose over several ranks: each sees the errors of its part."""

from __future__ import annotations

import pytest

import jvpgraph
from tests.distributed.harness import run
from tests.distributed.models import MODELS, QUIET
from tests.distributed.test_precision import HALF, LAYOUTS, halved, laid_out

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]


def diagnosed(layout: str) -> tuple[jvpgraph.Diagnosis, jvpgraph.Diagnosis]:
    """On one rank, and on all."""
    net = MODELS["dit"]
    inputs, dots = halved(net.inputs()), halved(net.tangents())
    models = net.build().to(HALF), laid_out(layout)
    alone, found = (jvpgraph.diagnose(model, kwargs=inputs, tangents=dots, steps=()) for model in models)
    return alone, found


@pytest.mark.long
@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_on_one_rank(layout):
    for alone, found in run(2, diagnosed, layout):
        assert found.tangent_error == pytest.approx(alone.tangent_error, rel=0.0 if layout == "FSDP2" else 0.4)
        assert not [loss for loss in found.losses if loss.what == "not compared"]
        assert found.worst(1)[0].badness < 2 * alone.worst(1)[0].badness
        assert {op.module for op in found.ops if op.kind == "norm"} == {
            op.module for op in alone.ops if op.kind == "norm"
        }
