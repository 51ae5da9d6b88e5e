"""Every recipe on two processes that share its weights, its batch or its tokens is the run of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.train import train
from tests.distributed.harness import run
from tests.distributed.test_train import assert_same_content, assert_same_log, config_of, train_in_rank
from tests.recipes import RECIPES, THROUGH_TANGENT

pytestmark = pytest.mark.usefixtures("one_thread")


def train_all(configs: list[RunConfig]) -> None:
    for config in configs:
        train_in_rank(config)


@pytest.mark.long
@pytest.mark.parametrize(
    "parallel", ["FSDP2", *(pytest.param(p, marks=pytest.mark.matrix) for p in ("TP", "Ulysses", "ring"))]
)
def test_as_in_one_process(tmp_path: Path, parallel: str) -> None:
    def config(name: str, parallel: str | None) -> RunConfig:
        more = {key: value for key, value in RECIPES[name].items() if key != "model"}
        return config_of(tmp_path / (parallel or "one") / name, parallel=parallel, **more)

    def is_spread(name: str) -> bool:
        """A critic looks at all tokens of a block."""
        judged = any(stage.objective.critic is not None for stage in config(name, None).stages)
        return name not in THROUGH_TANGENT and not (judged and parallel in ("Ulysses", "ring"))

    names = [*filter(is_spread, RECIPES)]
    run(2, train_all, [config(name, parallel) for name in names], timeout=900)
    for name in names:
        one, many = train(config(name, None)), tmp_path / parallel / name
        try:
            assert_same_log(many, one, tolerance=1e-7)
            assert_same_content(many, one, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
