"""Tangents in float32 over several ranks: as near to the truth as on one, and paired as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import jvpgraph
from benchmarks.precision import error as error_of
from benchmarks.precision import exactly
from jvpgraph import Config, Policy
from jvpgraph.precision import PRECISIONS, Precision
from tests.distributed.harness import run
from tests.distributed.models import MODELS, QUIET
from tests.distributed.plans import sequence_parallel, tensor_parallel
from tests.distributed.test_context_parallel import own_model
from tests.distributed.test_tensor_parallel import world

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

HALF = torch.bfloat16
SETTINGS = {**{name: name for name in PRECISIONS}, "policy": Policy({"blocks.0": "model"})}
LAYOUTS = ("FSDP2", "TP", "TP+SP", "Ulysses", "ring")


def halved(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(HALF) if x.is_floating_point() else x for name, x in given.items()}


def laid_out(layout: str) -> nn.Module:
    """The DiT in bfloat16, distributed."""
    if layout in ("Ulysses", "ring"):
        return own_model(*((2, 1) if layout == "ring" else (1, 2))).to(HALF)
    model = MODELS["dit"].build().to(HALF)
    if layout == "FSDP2":
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    (tensor_parallel if layout == "TP" else sequence_parallel)("dit", model, world())
    return model


def compare(layout: str) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Errors of the tangent by precision, on one rank and on all, and how many collectives carry two."""
    net = MODELS["dit"]
    inputs, dots = halved(net.inputs()), halved(net.tangents())
    whole = net.build().to(HALF)
    exact = copy.deepcopy(whole).double()
    want = jvpgraph.transform(exact, backend="eager")(**exactly(inputs), tangents=exactly(dots))[1]

    def error(model: nn.Module, precision: Precision | Policy, **how: Any) -> tuple[float, int]:
        dual = jvpgraph.transform(model, backend="eager", config=Config(tangent_precision=precision), **how)
        y, y_dot = dual(**inputs, tangents=dots)
        y.float().square().sum().backward()
        assert y_dot.dtype == (HALF if precision == "model" else torch.float32)
        return error_of(y_dot, want), sum(r.paired for r in dual.reports)

    how = {"regions": "auto"} if layout == "FSDP2" else {}
    alone = {name: error(whole, precision)[0] for name, precision in SETTINGS.items()}
    model = laid_out(layout)
    both = {name: error(model, precision, **how) for name, precision in SETTINGS.items()}
    return alone, {name: found for name, (found, _) in both.items()}, {name: pairs for name, (_, pairs) in both.items()}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_on_one_rank(layout):
    for alone, found, paired in run(2, compare, layout):
        assert found["float32"] < 0.85 * found["model"], (alone, found)
        assert all(found[name] < 1.5 * alone[name] + 1e-4 for name in SETTINGS), (alone, found)
        assert paired["float32"] == paired["model"], paired
