"""Checkpoints in real files: what is saved comes back, and what is damaged is passed over."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from jvpgraph.errors import JvpgraphError
from jvpgraph.trainer.model.ema import PowerEMA
from jvpgraph.trainer.model.optimizer import MasterAdamW
from jvpgraph.trainer.run.checkpoint import CheckpointError, Checkpoints, PerRank
from jvpgraph.trainer.run.checkpoint import dcp as own_dcp
from jvpgraph.trainer.run.checkpoint import store as store_module

EXAMPLE = "__0_0.distcp"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def tensors(value: float = 0.0, size: int = 1000) -> dict[str, Tensor]:
    return {"a": torch.full((size,), float(value)), "b": torch.full((2, 3), -value, dtype=torch.bfloat16)}


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    store = Checkpoints(folder, keep=keep)
    for step in steps:
        store.save(step, tensors(step))
    store.wait()
    return store


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def assert_loads(folder: Path, step: int) -> None:
    state = tensors()
    assert Checkpoints(folder).load(state) == step
    assert (state["a"] == step).all()
    assert (state["b"] == -step).all()


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count} if self.count else {}  # as a data loader's, its structure varies

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state.get("count", 0)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back(folder, asynchronous):
    def make(seed: int) -> dict:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
        optimizer = MasterAdamW(net.named_parameters(), lr=1e-3)
        net(torch.randn(5, 3).bfloat16()).sum().backward()
        optimizer.step()
        ema = PowerEMA(optimizer.masters, 0.1)
        ema.update(optimizer.masters)
        return {
            "net": net,
            "optimizer": optimizer,
            "ema": ema,
            "tensor": torch.randn(3, 4).t(),  # not contiguous
            "scalar": torch.tensor(seed),
            "empty": torch.zeros(0, 2),
            "step": seed,
            "text": f"seed {seed}",
            "nothing": None if seed else 0,
            "rng": {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()},
            "list": [torch.full((2,), seed), (seed, {"x": seed})],
            "array": np.arange(seed),
            "number": np.float64(seed),
            "data": PerRank(Counter(seed)),
            "own": PerRank({"seed": seed}),
            "own_rng": PerRank(torch.get_rng_state()),
        }

    original, other = make(7), make(0)
    modules = (other["net"], other["optimizer"], other["tensor"], other["data"].value)
    parameter = other["net"][0].weight
    store = Checkpoints(folder, asynchronous=asynchronous)
    assert store.load(other) is None
    store.save(7, original)
    assert store.load(other) == 7
    assert modules == (other["net"], other["optimizer"], other["tensor"], other["data"].value), "not in place"
    assert parameter is other["net"][0].weight
    for name, value in original["net"].state_dict().items():
        assert torch.equal(value, other["net"].state_dict()[name])
    for part, values in original["optimizer"].state_dict().items():
        for name, value in values.items():
            assert torch.equal(value, other["optimizer"].state_dict()[part][name])
    assert torch.equal(original["ema"].parameters["0.weight"], other["ema"].parameters["0.weight"])
    assert other["ema"].updates == 1
    for key in ("tensor", "scalar", "empty"):
        assert torch.equal(original[key], other[key])
    assert (other["step"], other["text"], other["nothing"], other["number"]) == (7, "seed 7", None, 7.0)
    assert torch.equal(original["rng"]["torch"], other["rng"]["torch"])
    assert original["rng"]["python"] == other["rng"]["python"]
    np.random.set_state(other["rng"]["numpy"])
    assert np.array_equal(np.random.get_state()[1], original["rng"]["numpy"][1])
    assert torch.equal(other["list"][0], torch.full((2,), 7))
    assert other["list"][1] == (7, {"x": 7})
    assert np.array_equal(other["array"], np.arange(7))
    assert other["data"].value.count == 7
    assert other["own"].value == {"seed": 7}
    assert torch.equal(other["own_rng"].value, original["own_rng"].value)


@pytest.mark.timing
def test_saved_tensors_do_not_change_with_the_live_ones(folder, monkeypatch):
    plain = store_module.write_plan
    monkeypatch.setattr(store_module, "write_plan", lambda *args: (time.sleep(0.3), plain(*args))[1])
    state = {**tensors(1), "numbers": [1], "own": PerRank([torch.ones(2)])}
    store = Checkpoints(folder)
    started = time.perf_counter()
    store.save(1, state)
    assert time.perf_counter() - started < 0.25, "save waited for the writer"
    state["a"].zero_()
    state["numbers"].append(2)
    state["own"].value[0].zero_()
    assert store.load(state) == 1
    assert (state["a"] == 1).all()
    assert state["numbers"] == [1]
    assert (state["own"].value[0] == 1).all()


def test_one_save_at_a_time(folder, monkeypatch):
    plain, running = store_module.write_plan, []

    def slow(*args):
        assert not running
        running.append(1)
        time.sleep(0.05)
        result = plain(*args)
        running.pop()
        return result

    monkeypatch.setattr(store_module, "write_plan", slow)
    saved(folder, 1, 2, 3)
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000003"]


def test_files_are_those_of_dcp(folder):
    """Names, plans and files are DCP's, so that its own tools read them."""
    saved(folder, 5)
    state = tensors()
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=folder / "step-00000005")
    assert (state["a"] == 5).all()


def test_the_last_ones_are_kept(folder):
    store = saved(folder, 1, 2, 3, 4, keep=2)
    assert names(folder) == ["step-00000003", "step-00000004"]
    assert store.latest() == folder / "step-00000004"
    state = tensors()
    assert store.load(state, folder / "step-00000003") == 3
    assert (state["a"] == 3).all()
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(folder, keep=0)


def test_damaged_ones_do_not_count_when_old_ones_are_deleted(folder):
    saved(folder, 1, 2)
    (folder / "step-00000002" / EXAMPLE).unlink()
    saved(folder, 3, keep=2)
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000003"]
    saved(folder, 4, keep=2)
    assert names(folder) == ["step-00000003", "step-00000004"]


def test_a_flipped_bit_found_by_loading_is_remembered_when_old_ones_are_deleted(folder):
    saved(folder, 1, 5)
    flip(folder / "step-00000005" / EXAMPLE, 300)
    store = Checkpoints(folder, keep=2)
    state = tensors()
    assert store.load(state) == 1
    store.save(3, tensors(3))
    store.wait()
    assert names(folder) == ["step-00000001", "step-00000003", "step-00000005"]
    assert_loads(folder, 3)


def test_a_step_saved_again_is_replaced_without_a_gap(folder, monkeypatch):
    store = saved(folder, 1)
    store.save(1, tensors(7))
    store.wait()
    state = tensors()
    assert store.load(state) == 1
    assert (state["a"] == 7).all()
    assert names(folder) == ["step-00000001"]

    rename = Path.rename

    def die(self, target):  # between the two renames
        if self.suffix == ".partial":
            raise OSError("killed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    store.save(1, tensors(8))
    with pytest.raises(CheckpointError, match="killed"):
        store.wait()
    monkeypatch.undo()
    assert names(folder) == ["step-00000001.replaced"]
    assert Checkpoints(folder).load(state) == 1
    assert (state["a"] == 7).all()
    saved(folder, 1)
    assert names(folder) == ["step-00000001"]
    assert_loads(folder, 1)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def copy_over(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


DAMAGE = {
    "flipped": (lambda p: flip(p / EXAMPLE, 2500), "__0_0.distcp has other content"),
    "flipped metadata": (lambda p: flip(p / ".metadata", 100), r"\.metadata has other content"),
    "flipped manifest": (lambda p: flip(p / "manifest.json", 30), "manifest.json is damaged"),
    "truncated": (lambda p: os.truncate(p / EXAMPLE, 77), r"__0_0.distcp has 77 bytes of \d+"),
    "file missing": (lambda p: (p / EXAMPLE).unlink(), "__0_0.distcp is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "copy of another": (
        lambda p: copy_over(p.with_name("step-00000001"), p),
        "it is a copy of the checkpoint of step 1",
    ),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_passed_over_with_a_warning(folder, kind, caplog):
    harm, message = DAMAGE[kind]
    store = saved(folder, 1, 2)
    assert store.latest() == folder / "step-00000002"
    harm(folder / "step-00000002")
    assert store.latest() == folder / "step-00000001"  # also who has seen it whole looks again
    assert_loads(folder, 1)
    (warning,) = {r.getMessage() for r in caplog.records}
    assert str(folder / "step-00000002") in warning
    assert re.search(message, warning)
    with pytest.raises(CheckpointError, match=message):
        store.load(tensors(), folder / "step-00000002")
    if kind == "copy of another":
        harm = DAMAGE["no manifest"][0]
    harm(folder / "step-00000001")
    for look in (store.latest, partial(store.load, tensors())):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            look()


def test_old_checkpoints_go_before_the_next_one_where_that_is_asked_for(folder):
    saved(folder, 1, 2, 3)
    store = Checkpoints(folder, keep=2)
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000003"]
    flip(folder / "step-00000003" / EXAMPLE, 2500)
    store.trim(store.latest())
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000003"], "the damaged one does not count"
    store = Checkpoints(folder, keep=1)
    store.trim(store.latest())
    assert names(folder) == ["step-00000002", "step-00000003"]
    assert_loads(folder, 2)


@pytest.mark.parametrize("moment", ["checked", "read"])
def test_a_checkpoint_that_is_deleted_while_it_is_read(folder, monkeypatch, moment):
    """By the run that writes them: whoever reads takes the next one."""
    saved(folder, 1)
    run, calls = Checkpoints(folder, keep=1), []
    module, name = {"checked": (store_module, "damage"), "read": (Checkpoints, "_read")}[moment]
    original = getattr(module, name)

    def meanwhile(*args, **more):
        calls.append(1)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(module, name, original)
                run.save(2, tensors(2))
                run.wait()
        return original(*args, **more)

    monkeypatch.setattr(module, name, meanwhile)
    state = tensors()
    assert Checkpoints(folder).load_newest(state) == 2
    assert (state["a"] == 2).all()
    (folder / "step-00000002" / EXAMPLE).unlink()
    with pytest.raises(CheckpointError, match="is whole"):
        Checkpoints(folder).load_newest(state)


def test_every_flipped_bit_of_a_file_is_found(folder):
    store = saved(folder, 1)
    path = folder / "step-00000001"
    for name in (EXAMPLE, ".metadata", "manifest.json"):
        size = (path / name).stat().st_size
        for position in random.Random(0).sample(range(size), 25):
            flip(path / name, position)
            assert store._fault(path) is not None, (name, position)
            flip(path / name, position)
    assert store._fault(path) is None


KILLED = """
import os, sys, time, torch
from pathlib import Path
from jvpgraph.trainer.run import checkpoint

folder = Path(sys.argv[1])
store = checkpoint.Checkpoints(folder)
state = {"a": torch.full((1000,), 1.0), "b": torch.full((2, 3), -1.0, dtype=torch.bfloat16)}
store.save(1, state)
store.wait()
plain = os.fsync
def slow(descriptor):
    (folder / "writing").touch()
    time.sleep(60)
    plain(descriptor)
os.fsync = slow
state["a"].fill_(2)
store.save(2, state)
print("training goes on", flush=True)
store.wait()
"""


@pytest.mark.slow
def test_kill_in_the_middle_of_writing(folder, caplog):
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, str(folder)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"training goes on\n"
        deadline = time.monotonic() + 60
        while not (folder / "writing").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    (folder / "writing").unlink()
    assert names(folder) == ["step-00000001", "step-00000002.partial"]
    assert list((folder / "step-00000002.partial").iterdir())
    assert_loads(folder, 1)
    assert "step-00000002.partial: the run ended before it was complete" in caplog.text
    saved(folder, 3)
    assert names(folder) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("target", ["fsync", "limit", "short"])
def test_full_disk(folder, monkeypatch, target):
    store = saved(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if target == "fsync":

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    elif target == "limit":  # a real write that the kernel cuts off
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    else:
        plain = own_dcp.FileSystemWriter.write_data

        def cut(self, plan, planner):
            result = plain(self, plan, planner)
            os.truncate(self.path / EXAMPLE, 100)
            return result

        monkeypatch.setattr(own_dcp.FileSystemWriter, "write_data", cut)
    try:
        store.save(2, tensors(2, 100_000))
        with pytest.raises(CheckpointError) as error:
            store.save(3, tensors(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    message = str(error.value)
    assert isinstance(error.value, (JvpgraphError, OSError))
    cause = {"fsync": "No space left on device", "limit": "File too large", "short": "has 100 bytes of"}[target]
    for part in (str(folder / "step-00000002"), cause, "takes 0.4 MB", "MB are free", "intact", "Free some space"):
        assert part in message, message
    assert names(folder) == ["step-00000001"], "what was not complete takes up space"
    assert_loads(folder, 1)
    store.save(3, tensors(3))  # space was made
    store.wait()
    assert_loads(folder, 3)


def test_another_model_is_refused_with_a_list_before_anything_changes(folder):
    store = Checkpoints(folder)
    net = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 3)})
    store.save(1, {"net": net, "step": 1, "data": PerRank(3), "old": 5})
    other = nn.ModuleDict({"a": nn.Linear(2, 4), "c": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3).double()})
    state = {"net": other, "step": torch.zeros(2), "rng": PerRank(1)}
    before = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(ValueError) as error:
        store.load(state)
    assert str(error.value).splitlines()[1:] == [
        "  missing in the checkpoint: net.c.weight",
        "  missing in the checkpoint: rng",
        "  net.a.bias: float32[3] in the checkpoint, float32[4] here",
        "  net.a.weight: float32[3, 2] in the checkpoint, float32[4, 2] here",
        "  net.b.bias: float32[3] in the checkpoint, float64[3] here",
        "  net.b.weight: float32[3, 3] in the checkpoint, float64[3, 3] here",
        "  step: a value in the checkpoint, float32[2] here",
        "  unexpected in the checkpoint: data",
        "  unexpected in the checkpoint: old",
    ]
    assert all(torch.equal(before[name], p) for name, p in other.state_dict().items())
    assert store.load(part := {"net": {"a": nn.Linear(2, 3)}, "old": 0}, partial=True) == 1
    assert torch.equal(part["net"]["a"].weight, net["a"].weight)
    assert part["old"] == 5


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch /tmp/harmful",))


def test_code_is_neither_saved_nor_run(folder):
    store = Checkpoints(folder)
    for name, value in {"harmful": Harmful(), "function": lambda: 1, "own": PerRank(Path("x"))}.items():
        with pytest.raises(ValueError, match=f"the state's {name}.*cannot be saved"):
            store.save(1, {"fine": 1, name: value})
    for bad in ({1: 2}, {"a": {"x@rank0": 1}}, {"a.b": 1, "a": {"b": 2}}):
        with pytest.raises(ValueError, match=r"keys are strings|dotted name"):
            store.save(1, bad)
    store.save(1, tensors(1))
    store.wait()
    path = folder / "step-00000001"
    (path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for (posix|os).system"):
        own_dcp.Reader(path).read_metadata()


WORLD = 2


def run_rank(rank: int, folder: str, work: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.store-{work}", rank=rank, world_size=WORLD)
    globals()[work](rank, Path(folder))
    dist.destroy_process_group()


def sharded_state(value: float, rank: int) -> dict:
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = torch.arange(15.0).reshape(5, 3) + value  # uneven shards
    return {
        "weight": distribute_tensor(weight, mesh, [Shard(0)]),
        "replicated": torch.full((4,), float(value)),
        "step": int(value),
        "rng": PerRank(torch.Generator().manual_seed(rank + int(value)).get_state()),
        "loader": PerRank(Counter(10 * rank + int(value))),
    }


def two_save_and_load(rank: int, folder: Path) -> None:
    store = Checkpoints(folder, keep=2)
    for value in (1, 2, 3):
        state = sharded_state(value, rank)
        store.save(value, state)
        state["weight"].to_local().zero_()
        dist.all_reduce(torch.ones(1))  # training goes on with collectives of its own
    state = sharded_state(0, rank)
    assert store.load(state) == 3
    wanted = sharded_state(3, rank)
    assert torch.equal(state["weight"].to_local(), wanted["weight"].to_local())
    assert torch.equal(state["replicated"], wanted["replicated"])
    assert state["step"] == 3
    assert torch.equal(state["rng"].value, wanted["rng"].value)
    assert state["loader"].value.count == 10 * rank + 3
    assert names(folder) == ["step-00000002", "step-00000003"]

    # What fails on one rank fails on all, and the next one succeeds.
    plain = os.fsync
    if rank == 1:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    store.save(4, sharded_state(4, rank))
    with pytest.raises(CheckpointError, match="No space left"):
        store.wait()
    os.fsync = plain
    dist.barrier()
    assert names(folder) == ["step-00000002", "step-00000003"]
    with pytest.raises(ValueError, match="cannot be saved"):
        store.save(5, {"own": PerRank(Harmful() if rank else 1)})
    with pytest.raises(ValueError, match="missing in the checkpoint: more"):
        store.load({**sharded_state(0, rank), "more": 1})
    if rank == 0:
        flip(folder / "step-00000003" / "__1_0.distcp", 500)
    dist.barrier()
    assert store.latest() == folder / "step-00000002"
    store.save(3, sharded_state(3, rank))
    assert store.load(sharded_state(0, rank)) == 3


@pytest.mark.long
def test_two_processes_and_then_one(folder, caplog):
    mp.spawn(run_rank, (str(folder), "two_save_and_load"), nprocs=WORLD)
    assert {"__0_0.distcp", "__1_0.distcp"} <= {p.name for p in (folder / "step-00000003").iterdir()}
    state = {
        "weight": torch.zeros(5, 3),
        "replicated": torch.zeros(4),
        "step": 0,
        "rng": PerRank(torch.zeros(0)),
        "loader": PerRank(Counter()),
    }
    assert Checkpoints(folder).load(state) == 3
    assert torch.equal(state["weight"], torch.arange(15.0).reshape(5, 3) + 3)
    assert (state["step"], state["loader"].value.count) == (3, 3)


def two_load_what_one_saved(rank: int, folder: Path) -> None:
    state = sharded_state(0, rank)
    assert Checkpoints(folder).load(state) == 6
    assert torch.equal(state["weight"].full_tensor(), torch.arange(15.0).reshape(5, 3) + 6)
    assert state["loader"].value.count == (6 if rank == 0 else 10), "the second rank keeps its own"


@pytest.mark.long
def test_one_process_and_then_two(folder):
    weight = torch.arange(15.0).reshape(5, 3) + 6
    rng = PerRank(torch.get_rng_state())
    loader = PerRank(Counter(6))
    store = Checkpoints(folder)
    store.save(6, {"weight": weight, "replicated": torch.zeros(4), "step": 6, "rng": rng, "loader": loader})
    store.wait()
    mp.spawn(run_rank, (str(folder), "two_load_what_one_saved"), nprocs=WORLD)
