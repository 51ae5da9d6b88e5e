"""Families of diffusers' transformers, exactly and on the default backend; ``make zoo`` runs all classes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

import jvpgraph
from tests.rounding import RoundedOtherwise
from tests.zoo import sweep
from tests.zoo.base import QUIET, model_class
from tests.zoo.cases import CASES, missing_classes
from tests.zoo.oracle import random_tangents
from tests.zoo.run import examine

WHOLE = (
    "SanaTransformer2DModel",  # linear attention, depthwise convolutions
    "FluxTransformer2DModel",  # double and single stream, guidance
    "MochiTransformer3DModel",  # attends to as many text tokens as the mask says
    "WanTransformer3DModel",  # video
    "ZImageTransformer2DModel",  # lists of latents
    "QwenImageTransformer2DModel",  # complex rotary embedding
    "T5FilmDecoder",  # attention written by hand
)

# Dynamo looks at .grad of what a region is given.
NOT_A_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
# Its first call fills a cache under a context manager that Dynamo does not know.
FIRST_IN_REGIONS = ("ZImageTransformer2DModel",)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(NOT_A_LEAF),
    *(pytest.mark.filterwarnings(quiet) for quiet in QUIET),
]


@pytest.mark.long
@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", WHOLE)
def test_one_graph(name):
    """One class of each family, at one size, as each has a graph of its own: `make zoo-exact` has all of both."""
    result = examine(CASES[name], variants=(1,))
    assert result.right, str(result)
    assert result.capture == ("regions" if name in FIRST_IN_REGIONS else "whole")
    assert result.table > 50


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # an error, raised inside the compiler, would look like a failure of its own
def test_default(one_thread):
    """Inductor in float32, symbolic sizes, of which the second changes every dim, compiled once: value, tangent,
    gradients of parameters and inputs. Here one class with one block of each kind; `make zoo` has all."""
    name = "LongCatImageTransformer2DModel"
    run = sweep.examine(sweep.shallow(CASES[name], 1), "float32", True)
    assert (run["status"], run.get("capture"), run["sizes"]) == ("right", "one graph", 2), sweep.line(name, run)
    assert run["gradients"]


class TestSweep:
    """The tool behind ``make zoo``."""

    @pytest.mark.long
    def test_wrong_is_told(self, monkeypatch):
        right = sweep.dual_answer

        def off(*args):
            found = right(*args)
            return replace(found, tangent=[1.01 * dot for dot in found.tangent])

        monkeypatch.setattr(sweep, "dual_answer", off)
        plain = iter([0.0, 1.0])  # by how much torch.compile is off
        monkeypatch.setattr(sweep, "_plain", lambda *_: dict.fromkeys(sweep.KINDS, next(plain)))
        monkeypatch.setattr(sweep.jvpgraph, "transform", partial(jvpgraph.transform, backend="eager"))
        run = sweep.examine(CASES["PriorTransformer"], "float32", None, variants=(1,))
        assert run["status"] == "wrong"
        assert set(run["wrong"][1]) == {"tangent"}
        assert sweep.bad({"name": "PriorTransformer", "runs": [run]})
        assert "0 of 1 right as one graph in all runs, 1 wrong" in sweep.section([{"name": "x", "runs": [run]}])
        alike = sweep.examine(CASES["PriorTransformer"], "float32", None, variants=(1,))
        assert (alike["status"], set(alike["compiled"][1])) == ("compiled", {"tangent"})
        assert sweep.bad({"name": "PriorTransformer", "runs": [alike]})

    def test_what_the_model_itself_raises_is_no_fault_of_ours(self, monkeypatch):
        """But what is raised otherwise is, also where the model raises something."""

        def raises(text):
            def fails(*_, **__):
                raise ValueError(text)

            return fails

        case = CASES["PriorTransformer"]
        monkeypatch.setattr(sweep, "dual_answer", raises("ours"))
        assert sweep.examine(case, "float32", None, variants=(1,))["status"] == "failed"
        monkeypatch.setattr(model_class(case.name), "forward", raises("the model's"))
        run = sweep.examine(case, "float32", None, variants=(1,))
        assert (run["status"], run["cause"]) == ("the model itself raises", "ValueError: the model's")
        assert not sweep.bad({"name": case.name, "runs": [run]})
        monkeypatch.setattr(sweep, "Wanted", raises("ours"))
        run = sweep.examine(case, "float32", None, variants=(1,))
        assert run["status"] == "failed"
        assert sweep.bad({"name": case.name, "runs": [run]})

    def test_only_what_was_rounded_is_rounded_otherwise(self):
        """A gradient that cancels out depends on it; whole numbers and what is random do not."""
        x = torch.arange(1.0, 65.0).requires_grad_()
        with RoundedOtherwise():
            assert torch.equal(2 * x + 1, torch.arange(3.0, 131.0, 2))
            moved, drawn = x.sin(), torch.manual_seed(0) and torch.rand(3)
            (cancelling,) = torch.autograd.grad(((x / 3).exp() - (x / 3).exp()).sum() + x.sum(), x)
        assert torch.equal(drawn, torch.manual_seed(0) and torch.rand(3))
        off = (moved - x.sin()).abs()
        assert 0 < off.max() <= 2**-24
        assert (cancelling - 1).abs().max() > 1
        assert not torch.equal(moved, x.sin())

    def test_shards_are_all_of_it(self):
        parts = [sweep.shard(list(CASES), f"{i}/7") for i in range(7)]
        assert sorted(chain(*parts)) == sorted(CASES)

    def test_goes_on_where_it_stopped(self, tmp_path, monkeypatch):
        """And says which process died in which run."""
        calls = []

        def run(command, **_):
            calls.append(command)
            return SimpleNamespace(returncode=-11)

        monkeypatch.setattr(sweep.subprocess, "run", run)
        done = {"dtype": "float32", "dynamic": None, "checkpointing": False, "status": "right", "errors": {}}
        sweep.write(tmp_path, "PriorTransformer", [done])
        assert sweep.sweep(["PriorTransformer"], tmp_path, minutes=1) == []
        runs = sweep.runs_of(tmp_path, "PriorTransformer")
        assert [r["status"] for r in runs] == ["right", "failed", "failed", "failed"]
        assert len(calls) == 3
        assert "ended with -11" in runs[1]["cause"]

    def test_what_was_done_is_told(self):
        """The runs of a sweep that has not come to its end, and the models with fewer layers."""
        run = {"dtype": "float32", "dynamic": None, "checkpointing": False, "status": "right", "errors": {}}
        run |= {"capture": "one graph", "cause": ""}
        case = sweep.shallow(CASES["DiTTransformer2DModel"], 1)
        done = [
            {"name": "DiTTransformer2DModel", "runs": [run | {"layers": case.config["num_layers"]}]},
            {"name": "FluxTransformer2DModel", "runs": [run | {"layers": 1}, run]},
        ]
        text = sweep.section(done)
        assert f"So far 2 of {len(CASES)} classes: float32 without `dynamic=True` 2, bfloat16 with" in text
        assert "fewer layers than in float64: DiTTransformer2DModel." in text

    def test_its_section_is_replaced(self):
        new = sweep.section([])
        once = sweep.with_section("# The zoo\n\ntext\n", new)
        assert sweep.with_section(once, new) == once
        assert once.startswith("# The zoo\n\ntext\n\n## What")


@pytest.mark.long
def test_attention_written_by_hand_is_fused():
    """T5FilmDecoder spells softmax(q k') v out."""
    case = sweep.shallow(CASES["T5FilmDecoder"], 1)
    inputs = case.inputs(0)
    with torch.no_grad():
        found = jvpgraph.transform(case.build(), backend="eager").explain(
            **inputs, tangents=random_tangents(inputs, case.tangents)
        )
    assert found.fused == len(found.swapped) > 0
    assert not found.left


@pytest.mark.long
def test_data_dependent_models_are_right_with_regions():
    result = examine(CASES["OmniGenTransformer2DModel"], variants=(0,))
    assert result.capture == "regions"
    assert "data-dependent" in result.cause
    assert result.right, str(result)
    assert "2 x OmniGenBlock" in result.regions


def test_no_class_is_missing():
    """Every transformer of the installed diffusers has a case or a reason."""
    assert missing_classes() == []
