"""Data of several shapes: the order of the loader, exact resume, and the same run on two processes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data import BadShard, Sample, loader
from jvpgraph.trainer.data.prepared import prepared
from jvpgraph.trainer.data.sample import first_samples, some_samples
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.run.origin import Digests, aligned, compare, origin_of
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow
from tests.distributed.harness import run
from tests.distributed.test_train import assert_same_content, assert_same_log, lines, train_in_rank
from tests.distributed.test_train import config_of as config_in_float64
from tests.test_train import RCM, content, last_checkpoint, run_until, stage
from tests.zoo.cases import CASES

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = "SD3Transformer2DModel"
CONFIG = json.loads(json.dumps(CASES[NETWORK].config))  # settings have lists
SHAPES = (4, 8, 8), (4, 4, 8), (4, 12, 6)


class Mixed:
    """Sample i has the shape of its bucket, the number i in its label, and random latents of its own."""

    def __init__(self, *sizes: int, bad: tuple[int, ...] = ()) -> None:
        self.fingerprint, self.bad, self.on_bad_shard = f"mixed {sizes}", bad, "skip"
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.buckets = [range(end - size, end) for size, end in zip(sizes, ends)]

    def __len__(self) -> int:
        return self.buckets[-1].stop

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadShard(f"hole.tar, key {index}: gone")
        number = next(i for i, bucket in enumerate(self.buckets) if index in bucket)
        rng = torch.Generator().manual_seed(index)
        cond = {
            "encoder_hidden_states": torch.randn(5, 12, generator=rng),
            "pooled_projections": torch.randn(10, generator=rng),
        }
        return Sample(str(index), torch.randn(SHAPES[number % 3], generator=rng), cond)


def mixed(*, sizes: list[int]) -> Mixed:
    return Mixed(*sizes)


def batches(data: Any, count: int, batch: int, **options: Any) -> list[Batch]:
    return list(islice(iter(loader(data, batch, 3, **options)), count))


def keys(found: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.keys for batch in found]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    share=st.integers(1, 3),
    ranks=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_all_samples_come_equally_often_in_batches_of_one_shape(
    sizes: list[int], share: int, ranks: int, epochs: int
) -> None:
    data = Mixed(*sizes)
    step = share * ranks
    if len(data) < step:
        return
    count = sum(epochs * size // step for size in sizes)
    parts = [batches(data, count, share, rank=rank, ranks=ranks) for rank in range(ranks)]
    whole = [tuple(key for part in parts for key in part[i].keys) for i in range(count)]
    assert whole == keys(batches(data, count, step))
    seen = Counter(int(key) for batch in whole for key in batch)
    for bucket in data.buckets:
        in_one = [batch for batch in whole if int(batch[0]) in bucket]
        assert all(int(key) in bucket for batch in in_one for key in batch)
        assert len(in_one) == epochs * len(bucket) // step
        times = [seen[i] for i in bucket]
        assert max(times) - min(times) <= 1


@given(data=st.data(), consumed=st.integers(0, 12))
def test_a_loader_goes_on_with_the_exact_next_batch(data: Any, consumed: int) -> None:
    mixed = Mixed(*data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=3)), 4)
    expected = keys(batches(mixed, consumed + 4, 2))
    first = loader(mixed, 2, 3)
    taken = keys(list(islice(iter(first), consumed)))
    second = loader(mixed, 2, 3)
    second.load_state_dict(first.state_dict())
    assert taken + keys(list(islice(iter(second), 4))) == expected


def test_shapes_take_turns_at_random_and_with_workers_too() -> None:
    data = Mixed(12, 12)
    found = keys(batches(data, 12, 2))
    turns = [int(batch[0]) in data.buckets[0] for batch in found]
    assert sum(turns) == 6
    assert turns not in ([True] * 6 + [False] * 6, [False] * 6 + [True] * 6)
    assert keys(batches(data, 12, 2, workers=2)) == found


def test_a_bad_sample_is_replaced_by_one_of_its_shape() -> None:
    data = Mixed(6, 4, bad=(1, 7))
    found = batches(data, 10, 2)
    assert all(len({x.shape for x in batch.x0}) == 1 for batch in found)
    assert not {"1", "7"} & {key for batch in found for key in batch.keys}
    whole = keys(found)
    halves = [batches(data, 10, 1, rank=rank, ranks=2) for rank in (0, 1)]
    assert [a.keys + b.keys for a, b in zip(*halves)] == whole
    with pytest.raises(BadShard, match="all 2 of a shape are bad"):
        batches(Mixed(6, 2, bad=(6, 7)), 4, 2)


def test_the_order_depends_on_the_batch_which_may_not_change() -> None:
    data = Mixed(6, 4)
    first = loader(data, 2, 3)
    next(iter(first))
    with pytest.raises(ValueError, match=r"saved with batches of 2 samples, this loader has 4; .* Go on with the same"):
        loader(data, 4, 3).load_state_dict(first.state_dict())
    split = loader(data, 1, 3, rank=1, ranks=2)
    split.load_state_dict(first.state_dict())


def test_the_first_samples_have_the_commonest_shape() -> None:
    batch = first_samples(Mixed(2, 5, 3, bad=(3,)), 4)
    assert batch.keys == ("2", "4", "5", "6")
    assert batch.x0.shape == (4, *SHAPES[1])
    assert len(first_samples(Mixed(2, 5, 3), 9)) == 5
    assert len(some_samples(Mixed(2, 5, 3, bad=(3,)), 9)) == 4  # for previews, of what can be read
    with pytest.raises(BadShard, match="none of 2 samples can be read"):
        some_samples(Mixed(2, bad=(0, 1)), 9)


# ---------------------------------------------------------------- runs


def config_of(out: Path, stages: list[dict[str, Any]], **more: Any) -> RunConfig:
    zero = {"encoder_hidden_states": [[0.0] * 12] * 5, "pooled_projections": [0.0] * 10}
    data = {
        "out": str(out),
        "model": {
            "load": "jvpgraph.trainer.adapters:diffusers_model",
            "options": {"name": NETWORK, "config": CONFIG, "dtype": "float64"},
        },
        "data": {"source": {"load": "tests.test_buckets:mixed", "options": {"sizes": [5, 3, 4]}}},
        "guidance": {"scale": 1.5, "negative": zero},
        "student": {"backend": "op_by_op"},
        "threads": 1,
        "device": "cpu",
        "checkpoint": {"every": 2},
        "log": {"every": 1, "preview_every": 4, "preview_count": 4},
        "stages": stages,
    }
    return settings.from_dict(RunConfig, {**data, **more})


STAGES = [stage("dcm", 2, batch=2), stage(RCM, 4, batch=2, accumulate=2)]


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(config_of(tmp_path / "whole", STAGES))
    config = config_of(tmp_path / "killed", STAGES)
    run_until(config, 3, tmp_path, delay=0.05)
    train(config)
    expected, found = (content(last_checkpoint(out), tmp_path / "content.pt") for out in (whole, config.out))
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert computed(whole / "log.jsonl") == computed(config.out / "log.jsonl")
    assert (whole / "samples" / "step-00000004.png").is_file()


@pytest.mark.ranks
@pytest.mark.long
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    many = config_of(tmp_path / "many", STAGES, parallel={"dp_shard": 2})
    one = train(config_of(tmp_path / "one", STAGES))
    run(2, train_in_rank, many)
    assert_same_log(tmp_path / "many", one, tolerance=1e-7)
    assert_same_content(tmp_path / "many", one, tmp_path)


def test_every_shape_is_tried_before_the_first_step(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", STAGES)
    small = {**config.model.options, "config": {**CONFIG, "pos_embed_max_size": 4}}
    with pytest.raises(ValueError, match=r"a sample of another shape \(x0 \[1, 4, 12, 6\]"):
        train(replace(config, model=replace(config.model, options=small)))
    assert not (tmp_path / "run").exists()


class Pictures:
    """A picture or two of each of nine shapes, more than Dynamo compiles a function for by itself."""

    def __init__(self) -> None:
        self.sizes = [(h, w) for h in (4, 5, 6) for w in (7, 8, 9)]
        self.buckets = [range(2 * i, 2 * i + 2) for i in range(len(self.sizes))]

    def __len__(self) -> int:
        return 2 * len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        rng = torch.Generator().manual_seed(index)
        return Sample(str(index), torch.randn(3, *self.sizes[index // 2], generator=rng), {})


class Convolution(torch.nn.Conv2d):
    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh() * s[:, None, None, None]


def pictures() -> Pictures:
    return Pictures()


def convolution(dtype: str) -> TrigFlow:
    return TrigFlow(Convolution(3, 3, 3, padding=1).to(getattr(torch, dtype)))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_for_each_shape_on_the_default_backend(tmp_path: Path, dtype: str) -> None:
    """Of more shapes than recompile_limit, whose losses are those of op by op."""
    settings_of = {
        "model": {"load": "tests.test_buckets:convolution", "options": {"dtype": dtype}},
        "data": {"source": {"load": "tests.test_buckets:pictures"}},
        "guidance": {},
        "log": {"every": 1},
    }
    losses = []
    limit = torch._dynamo.config.recompile_limit
    for backend in ("op_by_op", "inductor"):
        stages = [stage("scm", 9, batch=2, student={"lr": 1e-4})]
        out = train(config_of(tmp_path / backend, stages, student={"backend": backend}, **settings_of))
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert torch._dynamo.config.recompile_limit == limit < 9 == len(losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype == "float32" else 0.05)


# ---------------------------------------------------------------- shards that come and go


def write_prepared(folder: Path, **shards: list[int]) -> Path:
    """As `jvpgraph prepare` leaves it: for each bucket shards of so many samples, digits of random pixels."""
    folder.mkdir()
    index, number = [], 0
    for bucket, counts in shards.items():
        for count in counts:
            name = f"{bucket}-{number:06d}.tar"
            with webdataset.TarWriter(str(folder / name)) as tar:
                for i in range(count):
                    rng = torch.Generator().manual_seed(100 * number + i)
                    fields = {
                        "latents": torch.randn(1, 8, 8, generator=rng),
                        "labels": torch.randint(10, (), generator=rng),
                    }
                    parts = {f"{key}.safetensors": save({"": value}) for key, value in fields.items()}
                    tar.write({"__key__": f"{number}-{i}", **parts})
            index.append({"name": name, "bucket": bucket, "samples": count})
            number += 1
    latents = {"field": "latents.safetensors", "scale": 1.0, "shift": 0.0}
    buckets = [{"name": bucket, "latents": [1, 8, 8], "sizes": {}} for bucket in shards]
    card = {"constants": {}, "conditions": ["labels"], "latents": latents, "buckets": buckets}
    (folder / "card.json").write_text(json.dumps(card))
    (folder / "index.json").write_text(json.dumps({"shards": index}))
    return folder


def edit_card(folder: Path, edit: dict[str, Any]) -> None:
    card = json.loads((folder / "card.json").read_text())
    card["latents"] |= edit.get("latents", {})
    card["constants"] = edit.get("constants", card["constants"])
    for bucket, new in zip(card["buckets"], edit.get("buckets", [])):
        bucket |= new
    (folder / "card.json").write_text(json.dumps(card))


def prepared_run(out: Path, data: Path, steps: int, parallel: str | None = None) -> RunConfig:
    source = {"load": "jvpgraph.trainer.data.prepared:prepared", "options": {"path": str(data), "on_bad_shard": "skip"}}
    return config_in_float64(out, [stage("scm", steps, batch=4)], parallel, data={"source": source})


def go_on(config: RunConfig) -> None:
    if config.parallel.dp_shard == 1:
        train(config)
    else:
        run(config.parallel.dp_shard, train_in_rank, config)


@pytest.mark.long
@pytest.mark.ranks
def test_a_prepared_shard_that_goes_bad_between_stop_and_going_on(tmp_path: Path, caplog: Any) -> None:
    """On two processes the run goes on with what one process goes on with, and again when the shard is back."""
    data = write_prepared(tmp_path / "data", wide=[6, 5], tall=[4, 3])
    shard = data / "wide-000000.tar"
    whole = shard.read_bytes()
    for parallel in (None, "FSDP2"):
        out = tmp_path / str(parallel)
        go_on(prepared_run(out, data, 2, parallel))
        shard.write_bytes(whole[:2000])
        go_on(prepared_run(out, data, 6, parallel))
        shard.write_bytes(whole)
        go_on(prepared_run(out, data, 8, parallel))
        assert len(lines(out)) == 8
    assert "bad since the run began, and left out: wide-000000.tar" in caplog.text
    assert_same_log(tmp_path / "FSDP2", tmp_path / "None")


def test_numbers_stay_when_a_shard_is_gone(tmp_path: Path, caplog: Any) -> None:
    data = write_prepared(tmp_path / "data", wide=[6, 5], tall=[4, 3], square=[2])
    config = prepared_run(tmp_path / "out", data, 1)
    before = prepared(data)
    then, samples, turns = (
        origin_of(config, Digests("", ""), before, None),
        [*map(before.__getitem__, range(20))],
        batches(before, 20, 2),
    )
    (data / "tall-000002.tar").write_bytes(b"")
    now = aligned(prepared(data, on_bad_shard="skip"), then)
    assert [len(bucket) for bucket in now.buckets] == [11, 7, 2]
    for number in range(20):
        if 11 <= number < 15:
            with pytest.raises(BadShard, match=r"tall-000002\.tar: the shard went bad"):
                now[number]
        else:
            assert now[number].key == samples[number].key
            assert torch.equal(now[number].x0, samples[number].x0)
    pairs = list(zip(keys(batches(now, 20, 2)), keys(turns)))
    bad = [any(key.startswith("2-") for key in there) for _, there in pairs]
    assert 0 < sum(bad) < 20
    assert [here != there for here, there in pairs] == bad

    for edit in ({"latents": {"scale": 2.0}}, {"constants": {"guidance": 3.0}}, {"buckets": [{}, {"sizes": {"w": 1}}]}):
        edit_card(data, edit)  # while the shard is gone
        edited = origin_of(config, Digests("", ""), aligned(prepared(data, on_bad_shard="skip"), then), None)
        with pytest.raises(ValueError, match=r"data\.source: its card\.json has another normalisation"):
            compare(then, edited, [])
        edit_card(data, {"latents": {"scale": 1.0}, "constants": {}, "buckets": [{}, {"sizes": {}}]})
    assert not compare(then, origin_of(config, Digests("", ""), now, None), [])
    assert not compare(
        replace(then, meaning=None), origin_of(config, Digests("", ""), now, None), []
    )  # of an older version

    (data / "square-000004.tar").write_bytes(b"")  # a whole shape
    less = prepared(data, on_bad_shard="skip")
    assert "left out: all samples of square" in caplog.text
    assert [len(bucket) for bucket in less.buckets] == [11, 3]
    with pytest.raises(ValueError, match=r"1 of 3 shapes are bad: square-000004.tar.*\n?.*--change data.source"):
        aligned(less, then)
