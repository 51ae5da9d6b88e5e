"""Less memory: adapters on one base, networks and averages on the CPU, moments and weights of a byte."""

from __future__ import annotations
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import jvpgraph
from jvpgraph.trainer import optional, settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.model.ema import PowerEMA, update_all
from jvpgraph.trainer.model.networks import trainable
from jvpgraph.trainer.model.offload import Traffic, nbytes, rest, units
from jvpgraph.trainer.model.optimizer import MasterAdamW
from jvpgraph.trainer.model.quantize import quantize
from jvpgraph.trainer.model.student import LoRA, make_student
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.memory import clashes
from jvpgraph.trainer.run.parallel import check, sizes_of
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow
from tests.test_train import RCM, awake, config_of, content, last_checkpoint, stage

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTERS = {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(found: Path, expected: Path, scratch: Path) -> None:
    """Logs and last checkpoints, to the bit: the ops are the same."""
    assert lines(found) == lines(expected)
    got, want = (content(last_checkpoint(folder), scratch / "content.pt") for folder in (found, expected))
    assert not got.keys() ^ want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


# ---------------------------------------------------------------- on the CPU


@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "checkpointed blocks"])
def test_a_run_whose_networks_rest_is_the_same(tmp_path: Path, blocks: bool) -> None:
    stages = [stage(RCM, 4)]
    student = {"backend": "eager", "checkpoint_blocks": blocks}
    plain = train(config_of(tmp_path / "plain", stages, student=student))
    away = {"teacher": {"offload": True}, "fake_score": {"offload": True}, "ema": {"device": "cpu"}}
    at_rest = train(config_of(tmp_path / "at rest", stages, student=student, **away))
    assert_same_run(at_rest, plain, tmp_path)


def test_parameters_are_on_the_device_while_their_block_computes() -> None:
    """Fake tensors refuse ops on two devices, so this needs no GPU."""
    with FakeTensorMode():
        model = awake(width=16, depth=2, heads=2)
        traffic = Traffic()
        where: list[set[str]] = []
        rest(model.eval(), torch.device("cuda"), traffic)
