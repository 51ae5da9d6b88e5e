"""The models and the comparison that the other tests here rest on."""

from __future__ import annotations

import pytest
import torch

import jvpgraph
from tests.distributed.models import (
    MODELS,
    QUIET,
    TOLERANCE,
    Answer,
    Errors,
    backend,
    dots_of,
    errors,
    float_leaves,
    gradients,
    loss,
    reference,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_one_process_agrees_with_forward_ad(name: str):
    net, want = MODELS[name], reference(name)
    dual = jvpgraph.transform(net.build(), backend=backend(), dynamic=False)
    y, y_dot = dual(**net.inputs(), tangents=net.tangents())
    loss(y).backward()
    got = Answer(*float_leaves(y), dots_of(y_dot), gradients(dual.model))
    assert max(errors(got, want)) <= TOLERANCE
    assert min(w.abs().max().item() for w in want[:2]) > 0.1
    assert all(bool(g.any()) for g in want.gradients.values()), "a gate is closed"


def test_wrong_answers_are_noticed():
    want = reference("dit")
    assert max(errors(want, want)) == 0
    off = want._replace(tangent=want.tangent * (1 + 1e-8))
    assert errors(off, want) == Errors(0, pytest.approx(1e-8), 0)
    off = want._replace(value=torch.full_like(want.value, torch.nan))
    assert errors(off, want).value == float("inf")
    first = next(iter(want.gradients))
    missing = want._replace(gradients={n: g for n, g in want.gradients.items() if n != first})
    assert errors(missing, want).gradient == float("inf")
