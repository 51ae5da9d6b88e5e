"""The trainer on many processes: the same run as in one, whatever they are and wherever it stops and goes on."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from jvpgraph.trainer import settings
from jvpgraph.trainer.commands import failures
from jvpgraph.trainer.config import ParallelConfig, RunConfig
from jvpgraph.trainer.data.digits import digits
from jvpgraph.trainer.data.sample import Sample, first_samples
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.dit import DiT, DiTConfig, call_dit, modulate
from jvpgraph.trainer.noise import RankNoise, integers, noise_like, normal, uniform
from jvpgraph.trainer.run.checkpoint import CheckpointError
from jvpgraph.trainer.run.finished import load_run, sample_run
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.run.parallel import check, joined, parallelize, sizes_of, split_tokens
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.settings import Problem, SettingsError
from jvpgraph.trainer.train import build_networks, train
from jvpgraph.trainer.trigflow import TrigFlow
from tests.distributed.harness import run
from tests.test_train import RCM, content, last_checkpoint, stage

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS: dict[str, dict[str, int]] = {
    "FSDP2": {"dp_shard": 2},
    "TP": {"tp": 2},
    "replicas": {"dp_replicate": 2},
    "HSDP": {"dp_shard": 2, "dp_replicate": 2},
    "FSDP2+TP": {"dp_shard": -1, "tp": 2},
    "Ulysses": {"cp_ulysses": 2},
    "ring": {"cp_ring": 2},
    "Ulysses x ring": {"cp_ulysses": 2, "cp_ring": 2},
    "FSDP2+Ulysses": {"dp_shard": 2, "cp_ulysses": 2},
    "HSDP+ring": {"dp_replicate": 2, "cp_ring": 2},
}
PROCESSES = {name: abs(prod(sizes.values())) * (2 if -1 in sizes.values() else 1) for name, sizes in LAYOUTS.items()}


def config_of(out: Path, stages: list[dict[str, Any]], parallel: str | None = None, **more: Any) -> RunConfig:
    """In float64: AdamW with beta_1 = 0 divides a gradient by its own size, and so makes rounding errors large."""
    data = {
        "model": {
            "load": "tests.test_train:awake",
            "options": {"width": 16, "depth": 2, "heads": 2, "dtype": "float64"},
        },
        "student": {"backend": "eager"},
        "guidance": {"scale": 1.5, "negative": {"labels": 10}},
        "threads": 1,
        "device": "cpu",
        "checkpoint": {"every": 1000},
        "log": {"every": 1},
        "parallel": LAYOUTS[parallel] if parallel else {},
    }
    return settings.from_dict(RunConfig, {**data, "out": str(out), "stages": stages, **more})


def lines(folder: Path) -> list[dict[str, float]]:
    return computed(folder / "log.jsonl")


def assert_same_log(found: Path, expected: Path, tolerance: float = 1e-9) -> None:
    """Every number of every step. The steps are those that a fault of 1e-9 has grown in."""
    got, want = lines(found), lines(expected)
    assert [line.keys() for line in got] == [line.keys() for line in want]
    for a, b in zip(got, want):
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=tolerance, abs=1e-12), (name, b["step"])


def assert_same_content(found: Path, expected: Path, scratch: Path) -> None:
    """Of the last checkpoints."""
    got, want = (content(last_checkpoint(folder), scratch / "content.pt") for folder in (found, expected))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-6, atol=1e-9), name


def torchrun(processes: int, config: RunConfig, scratch: Path, *more: str) -> subprocess.Popen[str]:
    file = scratch / "config-to-run.yaml"
    settings.save(config, file)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *command, "-m", "jvpgraph.trainer.cli", "train", str(file), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """What it said. Fails if it failed."""
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, text
    return text


# ---------------------------------------------------------------- the same run


@pytest.mark.long
@pytest.mark.parametrize(
    ("parallel", "objective"),
    [
        pytest.param("FSDP2", "scm", id="FSDP2, quickly"),
        pytest.param("FSDP2", RCM, marks=pytest.mark.matrix, id="FSDP2"),
        pytest.param("TP", RCM, marks=pytest.mark.matrix, id="TP"),
    ],
)
def test_torchrun_gives_the_run_of_one_process(tmp_path: Path, parallel: str, objective: Any) -> None:
    stages = [stage(objective, 20)]
    process = torchrun(2, config_of(tmp_path / "many", stages, parallel), tmp_path)
    one = train(config_of(tmp_path / "one", stages))
    finished(process)
    assert_same_log(tmp_path / "many", one, tolerance=1e-5)
    assert_same_content(tmp_path / "many", one, tmp_path)


def train_in_rank(config: RunConfig) -> None:
    train(config)


def train_many(config: RunConfig, parallel: str) -> Path:
    run(PROCESSES[parallel], train_in_rank, config)
    return config.out


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", LAYOUTS)
def test_accumulation_clipping_and_dropped_conditions_too(tmp_path: Path, parallel: str) -> None:
    more = {"accumulate": 2, "condition_dropout": 0.3, "student": {"lr": 1e-3, "clip_norm": 0.05}}
    stages = [stage("scm", 3, **more), stage(RCM, 4, **more), stage("mean_flow", 2), stage("dcm", 1)]
    one = train(config_of(tmp_path / "one", stages))
    many = train_many(config_of(tmp_path / "many", stages, parallel), parallel)
    assert_same_log(many, one, tolerance=1e-7)
    assert_same_content(many, one, tmp_path)


VARIANTS: list[Any] = [
    "flow_map",
    {"name": "flow_map", "method": "lagrangian", "velocity": "own"},
    "free_flow",
    {"name": "mean_flow", "velocity": "data", "own_direction": 0.5, "guidance": 1.5},
    {"name": "mean_flow", "discrete": {"first": 0.5, "end": 9}},
    {"name": "scm", "coordinates": "rf", "points": "trajectory"},
    {"name": "dcm", "target": "ema", "jitter": True, "noise": 0.5, "substeps": 2, "huber": 0.1},
]


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", ["FSDP2", "TP"])
def test_the_variants_of_objectives(tmp_path: Path, parallel: str) -> None:
    stages, more = [stage(objective, 2) for objective in VARIANTS], {"sampling": {"steps": [1]}}
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, parallel, **more), parallel)
    assert_same_log(many, one, tolerance=1e-7)
    assert_same_content(many, one, tmp_path)


@pytest.mark.matrix
def test_tokens_are_split_in_float32_too(tmp_path: Path) -> None:
    """FSDP2 reduces gradients of float32 and bfloat16 in other ways than those of float64."""
    model = {"load": "tests.test_train:awake", "options": {"width": 16, "depth": 2, "heads": 2}}
    stages = [stage("scm", 2)]
    one = train(config_of(tmp_path / "one", stages, model=model))
    many = train_many(config_of(tmp_path / "many", stages, "FSDP2+Ulysses", model=model), "FSDP2+Ulysses")
    assert_same_log(many, one, tolerance=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", ["FSDP2", "TP"])
def test_what_a_run_shows_is_the_same(tmp_path: Path, parallel: str) -> None:
    """Sample grids, snapshots of averages, samples and weights of the finished run."""
    more = {"ema": {"sigma_rel": [0.1], "snapshot_every": 2}, "sampling": {"steps": [2]}}
    more |= {"log": {"every": 1, "preview_every": 2, "preview_count": 4}}
    stages = [stage("scm", 4, student={"lr": 1e-2})]
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, parallel, **more), parallel)
    assert_same_log(many, one)
    files = {p.relative_to(one) for p in one.rglob("*") if "checkpoints" not in p.parts and p.is_file()}
    assert files == {p.relative_to(many) for p in many.rglob("*") if "checkpoints" not in p.parts and p.is_file()}
    for name in ("step-00000002.png", "step-00000004.png"):
        pictures = [(folder / "samples" / name).read_bytes() for folder in (one, many)]
        assert pictures[0] == pictures[1]
    weights = [load_run(folder).student.state_dict() for folder in (one, many)]
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-7) for name in weights[0])
    assert export_run(many, tmp_path / "net").is_dir()
    assert sample_run(many, steps=2, count=2, ema=None, seed=0, out=tmp_path / "samples").exists()


@pytest.mark.matrix
@pytest.mark.parametrize(
    "student",
    [{"lora": {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}}, {"checkpoint_blocks": True}],
    ids=["LoRA", "checkpointed blocks"],
)
def test_students_of_every_kind_are_sharded(tmp_path: Path, student: dict[str, Any]) -> None:
    stages = [stage(RCM, 4)]
    more = {"student": {"backend": "eager", **student}}
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, "FSDP2", **more), "FSDP2")
    assert_same_log(many, one, tolerance=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", ["FSDP2", "TP"])
def test_a_student_in_bf16(tmp_path: Path, parallel: str) -> None:
    stages = [stage("scm", 6)]
    more = {"student": {"backend": "eager", "dtype": "bfloat16"}}
    one = train(config_of(tmp_path / "one", stages, **more))
    many = train_many(config_of(tmp_path / "many", stages, parallel, **more), parallel)
    assert_same_log(many, one, tolerance=0.05)


def at_random(**config: int) -> TrigFlow:
    """As `awake`, but another one every time."""
    net = DiT(DiTConfig(**config)).double()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return TrigFlow(net, call_dit)


@pytest.mark.matrix
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}], ids=["whole", "LoRA"])
def test_the_fake_score_is_a_copy_of_the_teacher(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    """Also of one that is not the same when it is built again."""
    model = {"load": "tests.distributed.test_train:at_random", "options": {"width": 16, "depth": 1, "heads": 2}}
    more = {"model": model, "student": {"backend": "eager", "lora": lora}}
    one = train(config_of(tmp_path / "one", [stage(RCM, 4)], **more))
    many = train_many(config_of(tmp_path / "many", [stage(RCM, 4)], "FSDP2", **more), "FSDP2")
    assert_same_log(many, one, tolerance=1e-6)


WAN = {
    "name": "WanTransformer3DModel",
    "config": {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 32,
        "text_dim": 16,
        "freq_dim": 32,
        "rope_max_seq_len": 32,
        "cross_attn_norm": True,
    },
    "dtype": "bfloat16",
}


class Videos:
    fingerprint = "videos"

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Sample:
        rng = torch.Generator().manual_seed(int(index))
        text = {"encoder_hidden_states": torch.randn(6, 16, generator=rng)}
        return Sample(str(index), torch.randn(4, 1, 8, 8, generator=rng), text)


def wan_config(out: Path, steps: int, parallel: str | None = None, **more: Any) -> RunConfig:
    model = {"load": "jvpgraph.trainer.adapters:diffusers_model", "options": WAN}
    data = {"source": {"load": "tests.distributed.test_train:Videos"}}
    settings_of_run = {"model": model, "data": data, "guidance": {}, **more}
    return config_of(out, [stage("scm", steps, accumulate=2)], parallel, **settings_of_run)


def gradients_of_wan(config: RunConfig) -> tuple[dict[str, np.ndarray], set[torch.dtype]]:
    """Of a loss over the first four samples; and the dtypes in which FSDP2 reduces."""
    with joined(config) as layout:
        student = build_networks(config, layout).student
        batch, size = first_samples(Videos(), 4), 4 // layout.parts
        mine = batch.x0[layout.part * size : (layout.part + 1) * size]
        text = {name: c[layout.part * size : (layout.part + 1) * size] for name, c in batch.cond.items()}
        student(mine, torch.full((size,), 0.7), text).square().mean().backward()
        layout.reduce_whole(student)
        groups = [m._get_fsdp_state()._fsdp_param_group for m in student.modules() if isinstance(m, FSDPModule)]
        gradients = {name: p.grad for name, p in student.named_parameters()}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        return {name: g.float().numpy() for name, g in whole.items()}, {group._reduce_dtype for group in groups}


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", ["FSDP2", "HSDP"])
def test_a_network_of_two_dtypes(tmp_path: Path, parallel: str) -> None:
    """diffusers keeps norms, time embedding and tables of a bfloat16 network in float32."""
    one, _ = gradients_of_wan(wan_config(tmp_path, 1))
    for many, reduced_in in run(PROCESSES[parallel], gradients_of_wan, wan_config(tmp_path, 1, parallel)):
        assert reduced_in == {torch.float32}
        for name, expected in one.items():
            assert np.linalg.norm(many[name] - expected) <= 0.03 * np.linalg.norm(expected), name


@pytest.mark.matrix
def test_a_run_of_a_network_of_two_dtypes(tmp_path: Path) -> None:
    """Its checkpoints go over from one process to two, and back."""
    one = train(wan_config(tmp_path / "one", 4))
    out = tmp_path / "many"
    train(wan_config(out, 1))
    train_many(wan_config(out, 3, "FSDP2"), "FSDP2")
    train(wan_config(out, 4))
    assert_same_log(out, one, tolerance=0.05)


# ---------------------------------------------------------------- noise and data


@pytest.mark.parametrize("parts", [2, 4])
def test_every_part_gets_the_noise_it_gets_in_one_process(parts: int) -> None:
    def draws(rng: Any, size: int) -> list[torch.Tensor]:
        x = torch.empty(size, 3, 2)
        return [normal(size, rng), noise_like(x, rng), integers(1, 9, size, rng), uniform(size, rng, torch.float32)]

    whole = draws(torch.Generator().manual_seed(3), 8)
    each = [draws(RankNoise(torch.Generator().manual_seed(3), part, parts), 8 // parts) for part in range(parts)]
    for index, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[index] for part in each]), expected, rtol=0, atol=0)


def test_who_draws_past_the_functions_is_told() -> None:
    rng = RankNoise(torch.Generator(), 0, 2)
    with pytest.raises(TypeError, match=r"generator.*RankNoise"):
        torch.randn(3, generator=rng)  # type: ignore[call-overload]


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.matrix
def test_a_run_goes_on_in_other_layouts(tmp_path: Path) -> None:
    """Stopped between steps and stages; optimiser, averages, random streams and data go over."""
    plan = [("FSDP2", 3), (None, 5), ("TP", 7), ("HSDP", 9), ("FSDP2+TP", 10), ("FSDP2+Ulysses", 12)]
    whole = [stage("scm", 4, student={"lr": 1e-3, "betas": [0.9, 0.99]}), stage(RCM, 8)]
    one = train(config_of(tmp_path / "one", whole))
    for parallel, end in plan:  # runs that are made longer
        stages = [{**whole[0], "steps": min(4, end)}] + [{**whole[1], "steps": end - 4}] * (end > 4)
        config = config_of(tmp_path / "many", stages, parallel)
        if parallel is None:
            train(config)
        else:
            train_many(config, parallel)
    assert_same_log(tmp_path / "many", one, tolerance=1e-7)
    assert_same_content(tmp_path / "many", one, tmp_path)


def await_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until the run has logged it."""
    log, deadline = folder / "log.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.matrix
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("parallel", ["FSDP2", "TP"])
def test_one_rank_killed(tmp_path: Path, parallel: str) -> None:
    """The others end within a minute, and the last checkpoint goes on in one process."""
    steps = 150
    stages = [stage("scm", steps)]
    more = {"checkpoint": {"every": 5, "keep": 2}}
    one = train(config_of(tmp_path / "one", stages, **more))
    config = config_of(tmp_path / "many", stages, parallel, **more)
    process = torchrun(2, config, tmp_path)
    await_step(process, config.out, 10)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another process of this run is gone or hangs" in text
    assert "exitcode: -9" in text.replace("exitcode  : ", "exitcode: ")
    assert time.monotonic() - killed < 60
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert len(lines(config.out)) < steps

    train(config_of(config.out, stages, **more))
    assert_same_log(config.out, one, tolerance=1e-7)
    assert_same_content(config.out, one, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("every", [1000, 1], ids=["between saves", "during a save"])
def test_a_rank_that_hangs_ends_the_run(tmp_path: Path, every: int) -> None:
    """It stops without ending, so that nobody but the timeout can notice."""
    config = config_of(tmp_path / "many", [stage("scm", 10_000)], "FSDP2", checkpoint={"every": every})
    process = torchrun(2, replace(config, parallel=replace(config.parallel, timeout=5.0)), tmp_path)
    await_step(process, config.out, 3)
    first, second = children(process.pid)
    while every == 1 and not any((config.out / "checkpoints").glob("*.partial")):
        pass  # it takes milliseconds
    os.kill(second, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    try:
        while running(first):
            assert time.monotonic() < deadline, "the other rank waits for longer than its timeout"
            time.sleep(0.1)
    finally:
        os.kill(second, signal.SIGKILL)  # else torchrun gives it 30 seconds to end by itself
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Timed out" in text


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# ---------------------------------------------------------------- what is refused, and what stops all


@pytest.mark.matrix
def test_a_rank_with_bad_data_stops_all(tmp_path: Path) -> None:
    """Every rank ends with the same message, none waits for another; nothing was changed."""
    source = {"load": "tests.distributed.test_train:spoiled_digits"}
    stages = [stage("flow_matching", 4)]
    found = run(2, message_of_rank, config_of(tmp_path / "many", stages, "FSDP2", data={"source": source}))
    assert found[0] == found[1]
    assert "student, step 2: the loss is not finite" in found[0]
    assert f"rank 1: the data: x0 of sample digits/{SPOILED}" in found[0]
    assert "rank 0" not in found[0]
    before = content(last_checkpoint(tmp_path / "many"), tmp_path / "content.pt")
    assert all(bool(value.isfinite().all()) for value in before.values() if value.is_floating_point())


SPOILED = int(np.random.default_rng((0, 0)).permutation(1797)[8 + 6])
"""In the second batch, in its second half."""


def spoiled_digits() -> Any:
    data = digits()
    data.x0[SPOILED] = torch.nan
    return data


def message_of_rank(config: RunConfig) -> str:
    try:
        train(config)
    except (ValueError, FloatingPointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "it ran"


class Refused(ValueError):
    """What other ranks make of an error whose own class they cannot find."""


def kinds_of_errors() -> list[tuple[bool, str, str]]:
    """For errors of the first rank: whether this one gets the same kind, what the command says, and its advice."""
    ranks, found = Ranks(), []

    class Local(Refused):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    errors = [
        SettingsError([Problem("run.yaml", "seed", "no number")]),
        OSError(errno.ENOSPC, "No space left on device", "out/log.jsonl"),
        CheckpointError("a save"),
        Local(1, 2),
    ]
    for error in errors:
        try:
            ranks.on_first(lambda error=error: raise_(error))
        except Exception as told:
            kind = Refused if isinstance(error, Local) else type(error)
            found.append((isinstance(told, kind), str(told), failures.explain(told, "train")))
    return found


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.matrix
def test_what_fails_on_one_rank_fails_on_all_in_the_same_way(tmp_path: Path) -> None:
    """So that the command ends with the same status and gives the same advice."""
    first, second = run(2, kinds_of_errors)
    assert all(same for same, _, _ in first + second)
    for (_, message, advice), (_, told, told_advice) in zip(first, second, strict=True):
        assert told.startswith("rank 0: ")
        assert told.endswith(message)
        assert (failures.RESUMES in told_advice) == (failures.RESUMES in advice)
    assert "the disk is full (out/log.jsonl)" in second[1][2]


def headed() -> TrigFlow:
    """Its norm works on split heads, and its plan leaves the norm out."""
    return TrigFlow(Headed().double(), call_headed)


class Headed(nn.Module):
    tp_plan: ClassVar = {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.norm, self.down = nn.Linear(64, 32), nn.RMSNorm(8), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.norm(self.up(x.flatten(1)).unflatten(-1, (-1, 8)))
        return self.down(heads.flatten(1)).view_as(x)


def call_headed(net: nn.Module, x: Tensor, time: Tensor, cond: Any) -> Tensor:
    return net(x)


def named_headed() -> TrigFlow:
    """The plan says how the norm works."""
    model = headed()
    model.net.tp_plan = {**Headed.tp_plan, "norm": SequenceParallel(sequence_dim=1, use_local_output=True)}
    return model


@pytest.mark.matrix
def test_gradients_that_tensor_parallel_would_leave_in_parts(tmp_path: Path) -> None:
    stages, model = [stage("flow_matching", 3)], {"load": "tests.distributed.test_train:headed"}
    for message in run(2, message_of_rank, config_of(tmp_path / "headed", stages, "TP", model=model)):
        assert re.match(r"ValueError: parallel.tp: the gradients of net.norm.weight differ between processes", message)
    assert not (tmp_path / "headed").exists()
    one = train(config_of(tmp_path / "one", stages, model=model))
    model = {"load": "tests.distributed.test_train:named_headed"}
    many = train_many(config_of(tmp_path / "many", stages, "TP", model=model), "TP")
    assert_same_log(many, one)


class Early(DiT):
    """It gathers before its last layers."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, r: Tensor | None = None) -> Tensor:
        c_BC = self.time(t) + self.label(labels)
        h_BNC = self.context.shard(self.patch_in(self.patchify(x)) + self.positions, dim=1)
        for block in self.blocks:
            h_BNC = block(h_BNC, c_BC)
        shift, scale = self.modulation(c_BC).chunk(2, dim=-1)
        return self.unpatchify(self.patch_out(modulate(self.norm(self.context.gather(h_BNC, dim=1)), shift, scale)))


def early(**config: int) -> TrigFlow:
    torch.manual_seed(0)
    return TrigFlow(Early(DiTConfig(**config)).double(), call_dit)


@pytest.mark.matrix
def test_layers_behind_the_gather_are_refused(tmp_path: Path) -> None:
    model = {"load": "tests.distributed.test_train:early", "options": {"width": 16, "depth": 1, "heads": 2}}
    config = config_of(tmp_path / "run", [stage("flow_matching", 1)], "Ulysses", model=model)
    for message in run(2, message_of_rank, config):
        assert re.match(r"ValueError: parallel.cp_\*: net.patch_out.weight, net.patch_out.bias of .*Early see", message)
        assert "2 times too large" in message
    assert not config.out.exists()


class Diffuser(nn.Module):
    _cp_plan: ClassVar = {"": {}}


def split_by_ring() -> str:
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ValueError, match=r"parallel\.cp_ring is 3") as error:
        split_tokens(Diffuser(), mesh)
    return str(error.value)


@pytest.mark.matrix
def test_the_ring_attention_of_diffusers_has_at_most_two_processes() -> None:
    for message in run(3, split_by_ring):
        assert "Use parallel.cp_ulysses instead, or give Diffuser a method split_tokens" in message


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"dp_shard": 2}, r"parallel: dp_shard 2 makes 2 processes, and there is 1.*torchrun --nproc-per"),
        ({"cp_ring": 2, "tp": 3}, "cp_ring 2 x tp 3 makes 6 processes"),
        ({"dp_shard": 0}, "dp_shard is 0"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_before_anything_is_built(
    tmp_path: Path, parallel: dict[str, int], message: str
) -> None:
    config = config_of(tmp_path / "run", [stage("scm", 1)], model={"load": "no_such:model"})
    with pytest.raises(ValueError, match=message):
        train(replace(config, parallel=ParallelConfig(**parallel)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        ({"dp_replicate": 2, "dp_shard": 3}, {}, r"stages\.0\.batch is 8.*into 6 equal parts"),
        ({"dp_shard": 2}, {"student": {"compile": True}}, "student.compile needs one"),
        ({"tp": 2}, {"student": {"lora": {"rank": 2}}}, "and not LoRA adapters"),
        ({"tp": 2, "cp_ring": 2}, {}, "do not go together"),
        ({"tp": 2, "dp_shard": 2}, {"student": {"backend": "inductor"}}, "for which Inductor has no lowering"),
    ],
)
def test_settings_that_cannot_be_spread(sizes: dict[str, int], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(
            config_of(Path("unused"), [stage("scm", 1)], **more),
            sizes_of(ParallelConfig(**sizes), prod(sizes.values())),
        )


def test_the_rest_of_the_processes_shards() -> None:
    sizes = sizes_of(ParallelConfig(dp_shard=-1, cp_ring=2, tp=2), 16)
    assert sizes == {"dp_replicate": 1, "dp_shard": 4, "cp_ring": 2, "cp_ulysses": 1, "tp": 2}
    with pytest.raises(ValueError, match="makes 6 processes, and there are 8"):
        sizes_of(ParallelConfig(dp_shard=-1, tp=3, dp_replicate=1), 8)


class Plans(nn.Module):
    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)
        self._tp_plan = plan


def refused(plan: Any) -> str:
    try:
        parallelize(Plans(plan), init_device_mesh("cpu", (2,)))
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "Plans has no plan for tensor parallel: give its class a `tp_plan`"),
        ({"up": object()}, "splits up by object; only"),
        ({"up": "colwise"}, r"2 processes do not divide dim 0 of up.weight \[3, 4\]"),
        ({"up": "rowwise"}, "taken"),
    ],
)
def test_plans(plan: Any, message: str) -> None:
    for found in run(2, refused, plan):
        assert re.search(message, found)
