"""Data sets and the loader: shards written by webdataset and safetensors, every way to damage them, exact resume."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import multiprocessing.util
import os
import pickle
import re
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torchdata.stateful_dataloader import StatefulDataLoader

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.data import BadShard, Sample, collate, digits, loader, safetensors_folder, webdataset

pytestmark = pytest.mark.usefixtures("one_thread")
PER_SHARD = 6
FIELDS = {"latents": "latents.npy", "conditions": {"text.npy": "text", "cls": "labels"}}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Numbers:
    """Sample i is the number i."""

    def __init__(self, size: int, fingerprint: str = "numbers") -> None:
        self.size, self.fingerprint = size, fingerprint

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), torch.tensor([float(index)]), {"labels": torch.tensor(index)})


class Holes(Numbers):
    """Some of the numbers cannot be read."""

    def __init__(self, size: int, bad: set[int], on_bad_shard: str = "skip") -> None:
        super().__init__(size)
        self.bad, self.on_bad_shard = bad, on_bad_shard

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadShard(f"hole.tar, key {index}: gone")
        return super().__getitem__(index)


def latent(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(2, 3, 3)).astype(np.float32)


def text(i: int) -> np.ndarray:
    return np.full((4, 2), i, dtype=np.float16)


def entry(i: int, **changes: object) -> dict[str, object]:
    return {"__key__": f"{i:06}", "latents.npy": latent(i), "text.npy": text(i), "cls": i % 10} | changes


def write(path: Path, entries: list[dict[str, object]]) -> Path:
    with wds.TarWriter(str(path)) as writer:
        for item in entries:
            writer.write(item)
    return path


def write_shards(folder: Path, count: int = 3) -> str:
    """`count` shards of PER_SHARD samples."""
    pattern = str(folder / "data-%03d.tar")
    with wds.ShardWriter(pattern, maxcount=PER_SHARD, verbose=0) as writer:
        for i in range(count * PER_SHARD):
            writer.write(entry(i))
    return str(folder / f"data-{{000..{count - 1:03}}}.tar")


def write_rows(folder: Path, count: int = 3, channels: int = 2) -> Path:
    for shard in range(count):
        rows = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        tensors = {
            "latents": torch.from_numpy(np.stack([latent(i)[:channels] for i in rows])),
            "text": torch.from_numpy(np.stack([text(i) for i in rows])),
            "label": torch.tensor([i % 10 for i in rows]),
        }
        save_file(tensors, folder / f"data-{shard:03}.safetensors")
    return folder


def open_rows(folder: Path, **options):
    return safetensors_folder(folder, latents="latents", conditions={"text": "text", "label": "labels"}, **options)


def take(data, count: int) -> list[Batch]:
    return list(itertools.islice(data, count))


def order(data, count: int) -> list[tuple[str, ...]]:
    return [batch.keys for batch in take(data, count)]


# ---------------------------------------------------------------- digits


def test_digits_are_normalised_and_come_back_as_grey_levels():
    data = digits()
    assert len(data) == 1797
    assert abs(data.x0.mean().item()) < 1e-5
    assert data.x0.std().item() == pytest.approx(1, abs=1e-5)
    grey = data.grey(data.x0)
    torch.testing.assert_close(grey, grey.round(), atol=1e-4, rtol=0)
    assert grey.min() == 0
    assert grey.max() == 16
    sample = data[5]
    assert sample.x0.shape == (1, 8, 8)
    assert sample.cond["labels"].shape == ()
    assert sample.cond["labels"].dtype == torch.int64


def test_digits_fast_path_equals_collated_samples():
    data = digits()
    index = torch.tensor([3, 1796, 3, 0])
    fast, slow = data.batch(index), collate([data[i] for i in index.tolist()])
    assert fast.keys == slow.keys
    assert torch.equal(fast.x0, slow.x0)
    assert torch.equal(fast.cond["labels"], slow.cond["labels"])


@pytest.mark.timing
def test_a_batch_of_digits_takes_less_than_two_milliseconds():
    stream = iter(loader(digits(), 64, 0))
    next(stream)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        batch = next(stream)
        times.append(time.perf_counter() - start)
    assert batch.x0.shape == (64, 1, 8, 8)
    assert batch.cond["labels"].shape == (64,)
    assert min(times) < 2e-3  # about 40 us; the fastest of many, because other programs run too


# ---------------------------------------------------------------- the order of the stream


@given(
    size=st.integers(1, 40),
    share=st.floats(0.01, 1),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 3),
)
def test_every_epoch_visits_every_sample_exactly_once_over_all_ranks(size, share, ranks, seed, epochs):
    ranks = min(ranks, size)
    batch = max(1, int(share * size / ranks))
    steps = math.ceil(epochs * size / (batch * ranks))
    per_rank = [order(loader(Numbers(size), batch, seed, rank=r, ranks=ranks), steps) for r in range(ranks)]
    assert {len(keys) for steps_of_rank in per_rank for keys in steps_of_rank} == {batch}
    stream = [key for step in zip(*per_rank) for keys in step for key in keys]
    for epoch in range(epochs):
        assert sorted(map(int, stream[epoch * size : (epoch + 1) * size])) == list(range(size))


def test_order_depends_on_seed_and_epoch_alone():
    data = Numbers(50)
    first = order(loader(data, 50, 0), 2)
    assert first[0] != first[1]
    assert first == order(loader(data, 50, 0), 2)
    assert first != order(loader(data, 50, 1), 2)
    halves = order(loader(data, 25, 0), 4)
    assert [halves[0] + halves[1], halves[2] + halves[3]] == first
    assert order(loader(data, 50, 0, workers=2), 2) == first


def test_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    take(loader(Numbers(10), 2, 0), 3)
    take(loader(Numbers(10), 2, 0, workers=1), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_and_their_conditions_stay_together():
    for batch in take(loader(Numbers(20), 7, 3), 6):
        assert batch.x0.flatten().tolist() == batch.cond["labels"].tolist() == [float(key) for key in batch.keys]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"rank": 2, "ranks": 2}, "rank stays below ranks"),
        ({"batch": 11}, "has 10 samples, fewer than one batch of 11"),
        ({"batch": 6, "ranks": 2}, "fewer than one batch of 6 on 2 rank"),
    ],
)
def test_loader_refuses_numbers_that_cannot_be(options, problem):
    with pytest.raises(ValueError, match=problem):
        loader(Numbers(10), **{"batch": 2, "seed": 0} | options)


# ---------------------------------------------------------------- resume


@given(size=st.integers(2, 30), seed=st.integers(0, 99), consumed=st.integers(0, 40), data=st.data())
def test_resume_gives_the_exact_next_batch_at_any_position(size, seed, consumed, data):
    batch = data.draw(st.integers(1, size), label="batch")
    whole = order(loader(Numbers(size), batch, seed), consumed + 5)
    stopped = loader(Numbers(size), batch, seed)
    assert order(stopped, consumed) == whole[:consumed]
    resumed = loader(Numbers(size), batch, seed)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))  # plain numbers and text
    assert order(resumed, 5) == whole[consumed:]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 2), (2, 1)])
@pytest.mark.parametrize("consumed", [0, 1, 4, 9])
def test_resume_with_another_number_of_workers(before, after, consumed):
    # 17 samples in batches of 4: an epoch ends inside batch 4 (counted from 0) and inside batch 8.
    whole = order(loader(Numbers(17), 4, 5), 15)
    stopped = loader(Numbers(17), 4, 5, workers=before)
    assert order(stopped, consumed) == whole[:consumed]
    resumed = loader(Numbers(17), 4, 5, workers=after)
    resumed.load_state_dict(stopped.state_dict())
    assert order(resumed, 15 - consumed) == whole[consumed:]


@pytest.mark.parametrize("workers", [0, 2])
def test_state_in_the_middle_of_a_stream_does_not_disturb_it(workers):
    whole = order(loader(Numbers(17), 4, 5), 8)
    data = loader(Numbers(17), 4, 5, workers=workers)
    states, seen = [data.state_dict()], []
    for batch in itertools.islice(data, 8):
        seen.append(batch.keys)
        states.append(data.state_dict())
    assert seen == whole
    assert [state["position"] for state in states] == list(range(0, 36, 4))


def test_iter_goes_on_where_the_last_one_stopped_and_loading_rewinds():
    data = loader(Numbers(17), 4, 5)
    start = data.state_dict()
    whole = order(loader(Numbers(17), 4, 5), 6)
    assert order(data, 3) + order(data, 3) == whole
    data.load_state_dict(start)
    assert order(data, 6) == whole


def test_state_is_the_same_on_all_ranks_and_holds_for_another_split():
    data = Numbers(24)
    two = [loader(data, 3, 0, rank=r, ranks=2) for r in range(2)]
    seen = [key for step in zip(*(order(part, 2) for part in two)) for keys in step for key in keys]
    assert two[0].state_dict() == two[1].state_dict()
    one = loader(data, 4, 0)
    one.load_state_dict(two[1].state_dict())
    seen += [key for keys in order(one, 3) for key in keys]
    assert sorted(map(int, seen)) == list(range(24))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (loader(Numbers(11), 2, 0), "the data set changed since the state was saved: samples 10 then, 11 now"),
        (loader(Numbers(10, "others"), 2, 0), "changed since .*: fingerprint numbers then, others now"),
        (loader(Numbers(10), 2, 1), "saved with seed 0, this loader has seed 1"),
    ],
)
def test_state_of_something_else_is_refused(changed, problem):
    with pytest.raises(ValueError, match=problem):
        changed.load_state_dict(loader(Numbers(10), 2, 0).state_dict())


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="not the state of a loader: it has no position, samples"):
        loader(Numbers(10), 2, 0).load_state_dict({})


def test_fingerprint_follows_names_and_lengths_of_the_shards_not_their_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here = webdataset(write_shards(tmp_path / "a"), **FIELDS)
    there = webdataset(write_shards(tmp_path / "b"), **FIELDS)
    assert here.fingerprint == there.fingerprint
    state = loader(here, 4, 0).state_dict()
    loader(there, 4, 0).load_state_dict(state)
    (tmp_path / "b/data-002.tar").rename(tmp_path / "b/data-003.tar")
    renamed = webdataset(str(tmp_path / "b/*.tar"), **FIELDS)
    with pytest.raises(ValueError, match="the data set changed since the state was saved: fingerprint"):
        loader(renamed, 4, 0).load_state_dict(state)


# ---------------------------------------------------------------- reading shards


@pytest.mark.parametrize("pattern", ["braces", "glob", "list"])
def test_webdataset_reads_what_its_writer_wrote(tmp_path, pattern):
    braces = write_shards(tmp_path)
    paths = [str(tmp_path / f"data-{i:03}.tar") for i in range(3)]
    data = webdataset({"braces": braces, "glob": str(tmp_path / "data-*.tar"), "list": paths}[pattern], **FIELDS)
    assert len(data) == 3 * PER_SHARD
    for i in range(len(data)):
        sample = data[i]
        assert sample.key == f"{i:06}"
        assert torch.equal(sample.x0, torch.from_numpy(latent(i)))
        assert torch.equal(sample.cond["text"], torch.from_numpy(text(i)))
        assert sample.cond["labels"].item() == i % 10
    with pytest.raises(IndexError):
        data[len(data)]


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("text.npy", np.arange(3), torch.arange(3)),
        ("text.pth", torch.arange(3.0).bfloat16(), torch.arange(3.0).bfloat16()),
        ("text.pt", saved(torch.arange(3)), torch.arange(3)),
        ("text.safetensors", save({"any": torch.arange(3.0).half()}), torch.arange(3.0).half()),
        ("cls", 7, torch.tensor(7)),
        ("json", [[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])),
        ("crop.json", [0.5, 2.0], torch.tensor([0.5, 2.0])),
    ],
)
def test_fields_are_decoded_by_extension(tmp_path, field, value, expected):
    path = write(tmp_path / "a.tar", [{"__key__": "one", "latents.npy": latent(0), field: value}])
    data = webdataset(str(path), latents="latents.npy", conditions={field: "extra"})
    found = data[0].cond["extra"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_keys_have_folders_and_metadata_is_no_sample(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("v1.0")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("__meta__.json", "v1.0/one.latents.npy", "v1.0/" + "x" * 200 + ".latents.npy"):
            file = io.BytesIO()
            np.save(file, latent(1))
            member = tarfile.TarInfo(name)
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    data = webdataset(str(path), latents="latents.npy", conditions={})
    assert [sample.key for sample in data] == ["v1.0/one", "v1.0/" + "x" * 200]


def test_safetensors_folder_reads_rows(tmp_path):
    data = open_rows(write_rows(tmp_path))
    assert len(data) == 3 * PER_SHARD
    for i, sample in enumerate(data):
        assert sample.key == f"data-{i // PER_SHARD:03}/{i % PER_SHARD}"
        assert torch.equal(sample.x0, torch.from_numpy(latent(i)))
        assert torch.equal(sample.cond["text"], torch.from_numpy(text(i)))
        assert sample.cond["labels"].item() == i % 10


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0.25), ([2.0, 3.0], 0.5), (1.0, [0.0, -1.0])])
def test_scale_and_shift(tmp_path, scale, shift):
    for data in (
        webdataset(write_shards(tmp_path, 1), **FIELDS, scale=scale, shift=shift),
        open_rows(write_rows(tmp_path, 1), scale=scale, shift=shift),
    ):
        by_hand = (torch.from_numpy(latent(3)).double() - channels(shift)) * channels(scale)
        assert data[3].x0.dtype == torch.float32
        torch.testing.assert_close(data[3].x0, by_hand.float())


def channels(value: float | list[float]) -> torch.Tensor:
    return torch.tensor(value).reshape(-1, 1, 1)


def test_half_precision_latents_are_scaled_in_float32(tmp_path):
    path = write(tmp_path / "a.tar", [entry(0, **{"latents.npy": latent(0).astype(np.float16)})])
    x0 = webdataset(str(path), **FIELDS, scale=1 / 3)[0].x0
    assert torch.equal(x0, torch.from_numpy(latent(0).astype(np.float16)).float() * (1 / 3))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scale": [1.0, 2.0, 3.0]}, r"scale has shape \[3\], latents \[2, 3, 3\]"),
        ({"latents": "latents.png"}, "'latents.png' has no known extension: npy"),
        ({"on_bad_shard": "ignore"}, 'on_bad_shard=\'ignore\': "stop" or "skip"'),
        ({"conditions": {"cls": "labels", "text.npy": "labels"}}, "two fields for one argument"),
        ({"conditions": {"latents.npy": "labels"}}, "named twice"),
        ({"urls": "https://example.com/a.tar"}, "only local files"),
        ({"urls": "a-{0..1.tar"}, "[Uu]nbalanced.*a-{0..1.tar"),
        ({"urls": "a-{5}.tar"}, "write {000..015}"),
        ({"urls": ["HERE/data-000.tar", "HERE/*.tar"]}, "listed more than once: .*data-000.tar"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, problem):
    options = FIELDS | {"urls": write_shards(tmp_path, 1)} | options
    if isinstance(options["urls"], list):
        options["urls"] = [url.replace("HERE", str(tmp_path)) for url in options["urls"]]
    with pytest.raises(ValueError, match=problem):
        webdataset(options.pop("urls"), **options)


def test_braces(tmp_path):
    for name in ("a-8.tar", "a-9.tar", "a-10.tar", "b-8.tar"):
        write(tmp_path / name, [entry(0)])
    data = webdataset([str(tmp_path / "a-{8..10}.tar"), str(tmp_path / "{b,c}-8.tar")], **FIELDS, on_bad_shard="skip")
    assert [shard.path.name for shard in data.shards] == ["a-8.tar", "a-9.tar", "a-10.tar", "b-8.tar"]
    write(tmp_path / "c-{1}.tar", [entry(0)])  # a name with braces is a name
    assert len(webdataset(str(tmp_path / "c-{1}.tar"), **FIELDS).shards) == 1


# ---------------------------------------------------------------- bad shards


def bad_tars(folder: Path) -> dict[str, str]:
    """Path of a shard that is bad as a whole -> what the error says."""
    plain = write(folder / "plain", [entry(0), entry(1)]).read_bytes()
    files = {
        "empty.tar": (b"", "not readable as a tar file"),
        "zeros.tar": (bytes(10240), "no samples"),
        "text.tar": (b"these are not the bytes of a tar file" * 50, "not readable as a tar file"),
        "garbage.tar": (plain[: plain.rindex(b"000001.cls") + 1024] + b"x" * 2048, "behind 000001.cls: neither a hea"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.tar").mkdir()
    packed = folder / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder / "plain", "000000.latents.npy")
    with tarfile.open(folder / "link.tar", "w") as tar:
        link = tarfile.TarInfo("000000.latents.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(link)
    with tarfile.open(folder / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("000000.cls"))
    no_text = entry(1)
    del no_text["text.npy"]
    write(folder / "incomplete.tar", [entry(0), no_text])
    problems = {name: problem for name, (_, problem) in files.items()} | {
        "missing.tar": "No such file",
        "folder.tar": "Is a directory",
        "packed.tar": "a compressed tar has no random access",
        "link.tar": "key 000000: 000000.latents.npy is a link",
        "twice.tar": "key 000000: cls is there twice",
        "incomplete.tar": r"key 000001: no text.npy \(fields of the shard: cls, latents.npy, text.npy\)",
    }
    return {str(folder / name): problem for name, problem in problems.items()}


def test_bad_shards_stop_the_run_by_name(tmp_path):
    good = write_shards(tmp_path, 1)
    for path, problem in bad_tars(tmp_path).items():
        with pytest.raises(BadShard, match=f"(?s)1 of 2 shards are bad.*{path}.*{problem}.*on_bad_shard=skip"):
            webdataset([good, path], **FIELDS)


def test_bad_shards_are_left_out_and_named_in_the_log(tmp_path, caplog):
    good, bad = write_shards(tmp_path, 2), bad_tars(tmp_path)
    with caplog.at_level(logging.WARNING, "jvpgraph.trainer.data"):
        data = webdataset([*bad, good], **FIELDS, on_bad_shard="skip")
    assert [sample.key for sample in data] == [f"{i:06}" for i in range(2 * PER_SHARD)]
    messages = [record.getMessage() for record in caplog.records]
    for count, (path, message) in enumerate(zip(bad, messages, strict=True), 1):
        assert message.startswith(path)
        assert message.endswith(f"left out: shard {count} that is bad, of {len(bad) + 2}")


@pytest.mark.parametrize("on_bad_shard", ["stop", "skip"])
def test_nothing_left_is_always_an_error(tmp_path, on_bad_shard):
    bad = bad_tars(tmp_path)
    with pytest.raises(BadShard, match=f"{len(bad)} of {len(bad)} shards are bad"):
        webdataset(list(bad), **FIELDS, on_bad_shard=on_bad_shard)
    with pytest.raises(BadShard, match="no shards"):
        webdataset([], **FIELDS, on_bad_shard=on_bad_shard)
    with pytest.raises(BadShard, match=r"nothing-\*.tar: .*No such file"):
        webdataset(str(tmp_path / "nothing-*.tar"), **FIELDS, on_bad_shard=on_bad_shard)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadShard, match="no shards"):
        open_rows(tmp_path / "none", on_bad_shard=on_bad_shard)
    path = write(tmp_path / "nan.tar", [entry(0, **{"latents.npy": np.full((2, 3, 3), np.nan, np.float32)})])
    with pytest.raises(BadShard, match=f"{path}, key 000000: latents.npy: 18 of 18 values are NaN"):
        webdataset(str(path), **FIELDS, on_bad_shard=on_bad_shard)


def test_a_tar_cut_anywhere_before_its_end_is_bad(tmp_path):
    whole = write(tmp_path / "whole.tar", [entry(i) for i in range(3)]).read_bytes()
    needed = len(whole.rstrip(b"\0"))
    needed = -(-needed // 512) * 512 + 1024  # and the two blocks of zeros; the writer pads to 10240 bytes
    cut = tmp_path / "cut.tar"
    for size in [*range(0, needed, 61), *range(0, needed, 512), needed - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(BadShard, match=r"cut\.tar"):
            webdataset(str(cut), **FIELDS)
    for size in range(needed, len(whole), 512):
        cut.write_bytes(whole[:size])
        assert len(webdataset(str(cut), **FIELDS)) == 3


def test_a_truncated_member_is_named(tmp_path):
    path = write(tmp_path / "a.tar", [entry(0), entry(1)])
    with tarfile.open(path) as tar:
        member = tar.getmember("000001.latents.npy")
    path.write_bytes(path.read_bytes()[: member.offset_data + 100])
    with pytest.raises(BadShard, match=f"{path}, key 000001: truncated: latents.npy ends at byte"):
        webdataset(str(path), **FIELDS)


class Payload:
    """Unpickled carelessly, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_is_not_run(tmp_path):
    item = {"__key__": "one", "latents.npy": latent(0), "text.pt": saved(Payload(tmp_path / "ran"))}
    path = write(tmp_path / "a.tar", [item])
    with pytest.raises(BadShard, match=r"key one: text.pt cannot be decoded \(UnpicklingError"):
        webdataset(str(path), latents="latents.npy", conditions={"text.pt": "text"})
    assert not (tmp_path / "ran").exists()


@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_damaged_byte_never_gives_anything_but_a_batch_or_bad_shard(tmp_path_factory, position, flip):
    folder = tmp_path_factory.mktemp("damage")
    data = bytearray(write(folder / "a.tar", [entry(i) for i in range(2)]).read_bytes())
    data[position % len(data)] ^= flip
    (folder / "a.tar").write_bytes(data)
    try:
        shards = list(webdataset(str(folder / "a.tar"), **FIELDS))
    except BadShard as error:
        problem = str(error)
    else:
        problem = "" if {sample.x0.shape for sample in shards} == {(2, 3, 3)} else "samples of another shape"
    assert not problem or "a.tar" in problem


def bad_samples() -> dict[str, tuple[dict[str, object], str]]:
    """What to change in a sample, and what the error says."""
    inf = latent(0)
    inf[0, 0, 0] = np.inf
    return {
        "npy": ({"latents.npy": b"not numpy"}, r"latents.npy cannot be decoded \(ValueError"),
        "pickle": ({"text.npy": pickle.dumps([1])}, "text.npy cannot be decoded"),
        "cls": ({"cls": b"cat"}, "cls cannot be decoded"),
        "shape": (
            {"latents.npy": latent(0)[:1]},
            r"latents.npy is \[1, 3, 3\] float32, but \[2, 3, 3\] float32 in the",
        ),
        "dtype": ({"latents.npy": latent(0).astype(np.float64)}, "latents.npy .* float64, but"),
        "condition": ({"text.npy": text(0).astype(np.float32)}, r"text.npy is \[4, 2\] float32, but"),
        "width": ({"text.npy": text(0)[:, :1]}, r"text.npy is \[4, 1\] float16, but \[4, 2\]"),
        "inf": ({"latents.npy": inf}, "latents.npy: 1 of 18 values are NaN or infinite"),
    }


@pytest.mark.parametrize("kind", bad_samples())
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_the_run_by_name(tmp_path, kind, workers):
    changes, problem = bad_samples()[kind]
    path = write(tmp_path / "a.tar", [entry(i, **(changes if i == 4 else {})) for i in range(PER_SHARD)])
    data = webdataset(str(path), **FIELDS)
    assert [data[i].key for i in (0, 5)] == ["000000", "000005"]
    with pytest.raises(BadShard, match=f"(?s){path}, key 000004: {problem}.*on_bad_shard=skip") as caught:
        take(loader(data, 2, 0, workers=workers), 3)
    assert type(pickle.loads(pickle.dumps(caught.value))) is BadShard


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_left_out_and_named_once(tmp_path, caplog, workers):
    inf = {"latents.npy": np.full((2, 3, 3), np.inf, np.float32)}
    path = write(tmp_path / "a.tar", [entry(i, **(inf if i in (0, 4) else {})) for i in range(PER_SHARD)])
    data = loader(webdataset(str(path), **FIELDS, on_bad_shard="skip"), 3, 1, workers=workers)
    with caplog.at_level(logging.WARNING, "jvpgraph.trainer.data"):
        batches = take(data, 8)
    assert all(len(batch) == 3 for batch in batches)
    assert {key for batch in batches for key in batch.keys} == {"000001", "000002", "000003", "000005"}
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert f"{path}, key 000000: latents.npy: 18 of 18 values" in messages[0]
    assert f"{path}, key 000004" in messages[1]
    assert sorted(message.splitlines()[1] for message in messages) == [
        "  left out: 1 of 6 samples so far",
        "  left out: 2 of 6 samples so far",
    ]


@given(size=st.integers(2, 30), seed=st.integers(0, 99), start=st.integers(0, 9), data=st.data())
def test_replacements_are_a_pure_function_of_the_position(size, seed, start, data):
    bad = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1), label="bad")
    batch = data.draw(st.integers(1, size), label="batch")
    whole = order(loader(Holes(size, bad), batch, seed), start + 4)
    clean = order(loader(Numbers(size), batch, seed), start + 4)
    for found, expected in zip(whole, clean):
        assert len(found) == batch
        assert not bad & set(map(int, found))
        assert all(a == b for a, b in zip(found, expected) if int(b) not in bad)
    resumed = loader(Holes(size, bad), batch, seed)
    resumed.load_state_dict(loader(Holes(size, bad), batch, seed).state_dict() | {"position": start * batch})
    assert order(resumed, 4) == whole[start:]


def test_replacements_come_from_the_same_place_in_the_batches_behind():
    clean = [key for keys in order(loader(Numbers(12), 3, 0), 4) for key in keys]
    bad = {int(clean[i]) for i in (1, 2, 4)}
    first = order(loader(Holes(12, bad), 3, 0), 1)[0]
    assert first == (clean[0], clean[7], clean[5])
    assert order(loader(Holes(12, bad), 3, 0, workers=2), 4) == order(loader(Holes(12, bad), 3, 0), 4)


@given(ranks=st.integers(2, 4), batch=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_replacements_do_not_depend_on_the_number_of_ranks(ranks, batch, seed, data):
    bad = data.draw(st.sets(st.integers(0, 29), max_size=10), label="bad")
    whole = order(loader(Holes(30, bad), batch * ranks, seed), 3)
    each = [order(loader(Holes(30, bad), batch, seed, rank=rank, ranks=ranks), 3) for rank in range(ranks)]
    for step, expected in enumerate(whole):
        assert sum((part[step] for part in each), ()) == expected


def test_only_bad_samples_is_an_error_even_when_skipping():
    with pytest.raises(BadShard, match=r"(?s)all 5 samples are bad, the last one:.*hole.tar, key"):
        take(loader(Holes(5, set(range(5))), 2, 0), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_or_shrinks_after_indexing_is_named(tmp_path, workers):
    write_shards(tmp_path, 2)
    data = webdataset(str(tmp_path / "*.tar"), **FIELDS)
    stream = loader(data, 4, 0, workers=workers)
    (tmp_path / "data-001.tar").write_bytes((tmp_path / "data-001.tar").read_bytes()[:2000])
    with pytest.raises(BadShard, match=r"data-001.tar, key 0000\d\d: the file became shorter"):
        take(stream, 3)
    (tmp_path / "data-001.tar").unlink()
    with pytest.raises(BadShard, match=r"data-001.tar, key 0000\d\d: .*No such file"):
        take(stream, 3)


# ---------------------------------------------------------------- bad safetensors files


def test_bad_safetensors_files(tmp_path, caplog):
    write_rows(tmp_path, 2)
    good = (tmp_path / "data-000.safetensors").read_bytes()
    rows = {"latents": torch.zeros(2, 2, 3, 3), "text": torch.zeros(2, 4, 2).half(), "label": torch.zeros(2).long()}
    damaged = {
        "e-missing": (rows | {"latents": None}, "no latents"),
        "f-lengths": (rows | {"label": torch.zeros(3).long()}, "do not have one length along dim 0: latents"),
        "g-scalar": (rows | {"label": torch.tensor(1)}, "do not have one length"),
        "h-none": ({name: value[:0] for name, value in rows.items()}, "no samples"),
        "i-shape": (rows | {"latents": torch.zeros(2, 3, 3, 3)}, r"latents is \[2, 3, 3, 3\] F32, but \[6, 2, 3, 3\]"),
        "j-dtype": (rows | {"text": torch.zeros(2, 4, 2)}, "text is .* F32, but .* F16"),
    }
    problems = {}
    for name, (tensors, problem) in damaged.items():
        save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / f"{name}.safetensors")
        problems[name] = problem
    for size in (0, 4, 100, len(good) // 2, len(good) - 1):
        (tmp_path / f"k{size}.safetensors").write_bytes(good[:size])
        problems[f"k{size}"] = "truncated, or not a safetensors file"
    with pytest.raises(BadShard, match=f"{len(problems)} of {len(problems) + 2} shards are bad"):
        open_rows(tmp_path)
    with caplog.at_level(logging.WARNING, "jvpgraph.trainer.data"):
        data = open_rows(tmp_path, on_bad_shard="skip")
    assert len(data) == 2 * PER_SHARD
    messages = [record.getMessage() for record in caplog.records]
    for name, problem in problems.items():
        assert any(re.search(f"{name}.safetensors: .*{problem}", message) for message in messages)


def test_safetensors_rows_with_nan_and_folders_that_are_none(tmp_path):
    write_rows(tmp_path, 1)
    latents = torch.zeros(6, 2, 3, 3)
    latents[3, 1, 1, 1] = math.nan
    rows = {"latents": latents, "text": torch.zeros(6, 4, 2).half(), "label": torch.zeros(6).long()}
    save_file(rows, tmp_path / "nan.safetensors")
    data = open_rows(tmp_path)
    assert data[PER_SHARD + 2].key == "nan/2"
    with pytest.raises(BadShard, match=r"nan.safetensors, key nan/3: latents: 1 of 18 values are NaN"):
        data[PER_SHARD + 3]
    with pytest.raises(ValueError, match="is not a folder"):
        open_rows(tmp_path / "nan.safetensors")


# ---------------------------------------------------------------- batches that cannot be stacked


def test_conditions_of_different_length_are_named(tmp_path):
    short = {"text.npy": text(0)[:3]}
    path = write(tmp_path / "a.tar", [entry(i, **(short if i == 4 else {})) for i in range(PER_SHARD)])
    data = webdataset(str(path), **FIELDS)
    assert data[4].cond["text"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"condition 'text' differs within a batch: .*\[3, 2\] float16 \(000004\)"):
        take(loader(data, PER_SHARD, 0), 1)


def test_collate_refuses_different_conditions_and_latents():
    one = Sample("a", torch.zeros(2), {"labels": torch.tensor(1)})
    with pytest.raises(ValueError, match=r"different conditions: \('labels',\) \(a\), \(\) \(b\)"):
        collate([one, Sample("b", torch.zeros(2), {})])
    with pytest.raises(ValueError, match=r"x0 differs within a batch: \[2\] float32 \(a\), \[3\] float32 \(b\)"):
        collate([one, Sample("b", torch.zeros(3), {"labels": torch.tensor(1)})])
    samples = [Sample(str(i), torch.zeros(3 if i else 2), {}) for i in range(9)]
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4, 5, and 3 more\)"):
        collate(samples)


# ---------------------------------------------------------------- processes


def test_workers_end_with_their_iterator_and_with_an_error():
    others = set(multiprocessing.active_children())
    stream = iter(loader(Numbers(9), 2, 0, workers=2))
    next(stream)
    assert len(set(multiprocessing.active_children()) - others) == 2
    stream.close()
    assert set(multiprocessing.active_children()) == others
    with pytest.raises(BadShard, match=r"hole\.tar"):
        take(loader(Holes(9, {3}, "stop"), 2, 0, workers=2), 5)
    assert set(multiprocessing.active_children()) == others


class Dying(Numbers):
    """Its worker dies of a signal in leaving, as one does whose thread is still in C++ when the interpreter ends."""

    def __getitem__(self, index: int) -> Sample:
        multiprocessing.util.Finalize(None, os.kill, args=(os.getpid(), signal.SIGKILL), exitpriority=-100)
        return super().__getitem__(index)


def test_workers_that_die_in_leaving_take_nothing_with_them():
    others = set(multiprocessing.active_children())
    stream = iter(loader(Dying(9), 2, 0, workers=2))
    assert [next(stream).x0.numel() for _ in range(4)] == [2] * 4
    stream.close()
    assert set(multiprocessing.active_children()) == others
    stream = iter(loader(Dying(9), 2, 0, workers=2))
    next(stream)
    with pytest.raises(KeyError, match="the error that ends the run"):
        stream.throw(KeyError("the error that ends the run"))


# Where the worker is killed while it sends, torchdata opens temporary files to find the cause, and the signal that says
# that a worker has died leaves one of them open.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
# PyTorch raises in its handler of SIGCHLD, wherever Python is: in a callback of a weak reference the error is lost, and
# comes again with the next batch.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_ends_the_run():
    others = set(multiprocessing.active_children())
    stream = iter(loader(Numbers(9), 2, 0, workers=2))
    next(stream)
    next(iter(set(multiprocessing.active_children()) - others)).kill()
    with pytest.raises(RuntimeError, match=r"worker (\(pid.*\) )?(exited unexpectedly|is killed)"):
        take(stream, 20)


def test_a_worker_that_is_killed_within_a_batch_is_told(monkeypatch):
    def broken(_self):
        raise EOFError
        yield

    monkeypatch.setattr(StatefulDataLoader, "__iter__", broken)
    with pytest.raises(RuntimeError, match="exited unexpectedly, in the middle of a batch"):
        take(loader(Numbers(9), 2, 0), 1)


@pytest.mark.long
def test_spawned_workers_read_the_same_stream(tmp_path):
    data = webdataset(write_shards(tmp_path), **FIELDS)
    expected = take(loader(data, 4, 2), 6)
    spawned = loader(data, 4, 2, workers=2)
    spawned.multiprocessing_context = "spawn"
    for a, b in zip(take(spawned, 6), expected, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.cond["text"], b.cond["text"])


@pytest.mark.slow
def test_forked_workers_read_the_same_rows(tmp_path):
    data = open_rows(write_rows(tmp_path))
    seen = take(loader(data, 6, 2, workers=2), 3)
    for a, b in zip(seen, take(loader(data, 6, 2), 3), strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.x0, b.x0)
    assert Counter(key for batch in seen for key in batch.keys) == Counter(sample.key for sample in data)
