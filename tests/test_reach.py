"""Some of the networks of tests/reach, in float64 without Inductor; `make reach` runs all of them with it."""

import pytest
import torch

import jvpgraph
from tests.reach import foreign, networks  # noqa: F401  which fill NETWORKS
from tests.reach.base import NETWORKS
from tests.reach.run import table
from tests.rounding import FLOOR
from tests.zoo.sweep import examine

SOME = ("OwnCheckpoint", "Magnitudes", "Waves", "KeptFeatures")
WITH_PACKAGES = ("FlashEither", "Blocks")


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # what the networks' own code warns about
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_PACKAGES)])
def test_is_right_as_one_graph(name, monkeypatch):
    """At two sizes: value, tangent, gradients of parameters and inputs."""
    monkeypatch.setitem(FLOOR, torch.float64, 1e-7)  # some compute parts of themselves in float32
    transform = jvpgraph.transform
    monkeypatch.setattr(jvpgraph, "transform", lambda model, **how: transform(model, **how | {"backend": "eager"}))
    with NETWORKS[name].installed():
        run = examine(NETWORKS[name], "float64", None)
    assert (run["status"], run.get("capture"), run["sizes"]) == ("right", "one graph", 2), run
    assert run["gradients"]
    torch._dynamo.reset()


def test_the_table_says_what_is_not_one_graph():
    name = next(iter(NETWORKS))
    right = {"status": "right", "capture": "one graph", "errors": {"value": 1e-7, "tangent": 2e-6}}
    text = table({name: [right, right | {"capture": "regions"}]})
    assert "| one graph, regions | 2e-06 | 2e-06 |" in text
    assert "0 of 1 are right as one graph; " in text
    assert "| one graph | 2e-06 | not run |" in table({name: [right]})
