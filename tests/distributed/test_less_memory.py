"""What saves memory, on two processes: the run of one, and that much less of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.digits import digits
from jvpgraph.trainer.data.sample import first_samples
from jvpgraph.trainer.model.parts import local
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.parallel import joined
from jvpgraph.trainer.train import build_networks, train
from tests.distributed.harness import run
from tests.distributed.test_train import assert_same_content, assert_same_log, config_of, train_many
from tests.test_train import RCM, content, last_checkpoint, stage

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"student": {"backend": "eager", "lora": {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}}}
AWAY = {"teacher": {"offload": True}, "fake_score": {"offload": True}, "ema": {"device": "cpu"}}
EIGHT = {"student": {"lr": 1e-3, "kind": "adamw_8bit"}, "fake": {"lr": 1e-3, "kind": "adamw_8bit"}}
WIDE = {"load": "tests.test_train:awake", "options": {"width": 64, "depth": 2, "heads": 2}}


def bases(config: RunConfig) -> tuple[int, int, float]:
    """Bytes of frozen parameters here, of each network by itself and of all together; and a loss."""
    with joined(config) as layout:
        networks = build_networks(config, layout)
        fake = networks.new_student()
        batch = first_samples(digits(), 4)
        t = torch.full((4,), 0.5, dtype=torch.float64)
        losses = [m(batch.x0, t, batch.cond).square().mean() for m in (networks.student, fake, networks.teacher)]
        sum(losses).backward()  # type: ignore[union-attr]
        for model in (networks.student, fake):
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        frozen = [
            local(p)
            for model in (networks.student, fake, networks.teacher)
            for p in model.parameters()
            if not p.requires_grad
        ]
        assert all(isinstance(p, DTensor) for p in networks.teacher.parameters())
        storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in frozen}
        return sum(p.nbytes for p in frozen), sum(storages.values()), float(losses[0])


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["FSDP2", pytest.param("replicas", marks=pytest.mark.matrix)])
def test_adapters_share_a_base_that_is_sharded(tmp_path: Path, parallel: str) -> None:
    config = config_of(tmp_path / "run", [stage(RCM, 4)], parallel, **LORA)
    for each, shared, _ in run(2, bases, config):
        assert shared == pytest.approx(each / 3, rel=0.1)  # the rest: rows that two processes do not divide


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", ["FSDP2", "replicas"])
def test_a_run_of_adapters_stops_and_goes_on_elsewhere(tmp_path: Path, parallel: str) -> None:
    one = train(config_of(tmp_path / "one", [stage(RCM, 5)], **LORA))
    two = train_many(config_of(tmp_path / "two", [stage(RCM, 3)], parallel, **LORA), parallel)
    train(config_of(tmp_path / "two", [stage(RCM, 4)], **LORA))
    train_many(config_of(tmp_path / "two", [stage(RCM, 5)], parallel, **LORA), parallel)
    assert_same_log(two, one, tolerance=1e-6)
    state = content(last_checkpoint(two), tmp_path / "content.pt")
    assert all("lora_" in key for key in state if key.startswith((".student.", ".fake.", ".ema.")))


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["FSDP2", pytest.param("HSDP", marks=pytest.mark.matrix)])
def test_networks_that_rest_are_sharded(tmp_path: Path, parallel: str) -> None:
    stages = [stage(RCM, 4, fake={"lr": 1e-3, "clip_norm": 0.05})]
    one = train(config_of(tmp_path / "one", stages))
    many = train_many(config_of(tmp_path / "many", stages, parallel, **AWAY), parallel)
    assert_same_log(many, one, tolerance=1e-6)
    assert_same_content(many, one, tmp_path)
    assert load_run(many).step == 4


@pytest.mark.matrix
def test_8_bit_moments_are_read_in_any_layout(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    more: dict[str, Any] = {"model": WIDE}
    one = train(config_of(tmp_path / "one", [stage("scm", 5, **EIGHT)], **more))
    two = train_many(config_of(tmp_path / "two", [stage("scm", 3, **EIGHT)], "FSDP2", **more), "FSDP2")
    train(config_of(tmp_path / "two", [stage("scm", 4, **EIGHT)], **more))
    train_many(config_of(tmp_path / "two", [stage("scm", 5, **EIGHT)], "FSDP2", **more), "FSDP2")
    assert_same_log(two, one, tolerance=1e-2)  # float32, and roundings to a byte
    state = content(last_checkpoint(two), tmp_path / "content.pt")
    assert state[".optimizer.exp_avg_sq_codes.net.blocks.0.mlp.0.weight"].float().mean() > 1


@pytest.mark.matrix
def test_a_teacher_of_bytes_in_every_replica(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    more = {"model": WIDE, "teacher": {"quantization": "int8"}}
    one = train(config_of(tmp_path / "one", [stage(RCM, 4)], **more))
    many = train_many(config_of(tmp_path / "many", [stage(RCM, 4)], "replicas", **more), "replicas")
    assert_same_log(many, one, tolerance=1e-2)


@pytest.mark.matrix
def test_adapters_on_weights_of_bytes_in_every_replica(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    more = {"model": WIDE, "teacher": {"quantization": "int8"}, **LORA}
    one = train(config_of(tmp_path / "one", [stage(RCM, 4)], **more))
    two = train_many(config_of(tmp_path / "two", [stage(RCM, 2)], "replicas", **more), "replicas")
    train_many(config_of(tmp_path / "two", [stage(RCM, 4)], "replicas", **more), "replicas")
    assert_same_log(two, one, tolerance=1e-5)
    assert load_run(two).step == 4
