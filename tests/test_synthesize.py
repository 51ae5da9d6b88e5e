"""Conditions without latents, and `jvpgraph synthesize`, which has a teacher make these."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save_file

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.prepared import prepared
from jvpgraph.trainer.data.prompts import listed, prompts
from jvpgraph.trainer.data.sample import BadShard, collate
from jvpgraph.trainer.evaluation.samplers import sampler_of
from jvpgraph.trainer.model.networks import build_guided, build_teacher
from jvpgraph.trainer.run.synthesis import Options, Part, parts_of, synthesize
from jvpgraph.trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
LABELS: dict[str, Any] = {
    "load": "jvpgraph.trainer.data.prompts:listed",
    "options": {"shape": [1, 8, 8], "values": {"labels": [3, 1, 4]}},
}
MORE: dict[str, Any] = {
    "data": {"source": LABELS},
    "guidance": {"scale": 2.0, "negative": {"labels": 10}},
    "sampling": {"teacher_steps": 3, "batch": 2},
}


def configuration(**more: Any) -> RunConfig:
    """Of a folder with tiny.yaml."""
    return settings.from_dict(RunConfig, json.loads(Path("tiny.yaml").read_text()) | MORE | more)


def test_prompts_are_the_conditions_of_shards_as_they_are(tmp_path: Path) -> None:
    """In their dtype, the first of them too, from tar files and from a folder of safetensors."""
    rng = np.random.default_rng(0)
    text, mask = rng.standard_normal((4, 5, 6)).astype(np.float16), rng.integers(0, 2, (4, 5))
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as shard:
        for i in range(4):
            shard.write({"__key__": f"{i}", "mask.npy": mask[i], "text.npy": text[i]})
    (tmp_path / "rows").mkdir()
    save_file({"mask": torch.tensor(mask), "text": torch.tensor(text)}, tmp_path / "rows" / "a.safetensors")
    tars = prompts(f"{tmp_path}/a.tar", conditions={"mask.npy": "m", "text.npy": "t"}, shape=[2, 3])
    rows = prompts(f"{tmp_path}/rows", conditions={"mask": "m", "text": "t"}, shape=[2, 3])
    for data in (tars, rows):
        assert not data.has_latents
        batch = collate([data[i] for i in range(len(data))])
        assert torch.equal(batch.x0, torch.zeros(4, 2, 3))
        assert torch.equal(batch.cond["m"], torch.tensor(mask))
        assert torch.equal(batch.cond["t"], torch.tensor(text))
    with pytest.raises(ValueError, match="name the fields of at least one condition"):
        prompts(f"{tmp_path}/a.tar", conditions={}, shape=[2, 3])
    with pytest.raises(ValueError, match="give each condition one value a sample"):
        listed([1], {"a": [1, 2], "b": [1]})


@pytest.mark.slow
def test_what_learns_from_latents_is_refused_and_dmd_is_not(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="objective dcm learns from latents"):
        train(configuration(stages=[{"steps": 1, "batch": 2, "objective": {"name": "dcm"}}]))
    dmd = {"name": "dmd", "fake_updates_per_step": 1, "simulation_steps": 2}
    folder = train(configuration(stages=[{"steps": 1, "batch": 2, "objective": dmd}]))
    assert (folder / "checkpoints").is_dir()


@pytest.mark.slow
def test_the_teachers_own_samples_are_what_is_read_and_trained_on(tiny_folder: Path) -> None:
    config = configuration()
    card = synthesize(config, Path("made"), Options(count=5, shard_size=4))
    assert card["samples"] == 5
    assert card["shards"] == 2
    data = prepared("made")
    labels = [int(data[i].cond["labels"]) for i in range(5)]
    assert labels == [3, 1, 4, 3, 1]  # again from the first
    samples = [data[i].x0 for i in range(5)]
    assert len({float(x.sum()) for x in samples}) == 5  # each from its own noise

    before = {path.name: path.read_bytes() for path in Path("made").iterdir() if path.is_file()}
    (Path("made") / "records" / "shape0-000001.json").unlink()  # as after a kill
    for name in ("shape0-000001.tar", "card.json", "index.json", "captions.json"):
        (Path("made") / name).unlink()
    synthesize(config, Path("made"), Options(count=5, shard_size=4))
    assert before == {path.name: path.read_bytes() for path in Path("made").iterdir() if path.is_file()}

    guided = build_guided(build_teacher(config, torch.device("cpu")), config.guidance, torch.device("cpu"))
    sample = sampler_of("flow", guided, 3, config.sampling)
    rng = torch.Generator().manual_seed(Part("shape0-000000.tar", "shape0", (), "", seed=0).seed_of_noise)
    expected = [sample(collate([data[i], data[i + 1]]), rng).float() for i in (0, 2)]
    assert torch.equal(torch.cat(expected), torch.stack(samples[:4]))

    Path("mine.yaml").write_text(
        "base: made/settings.yaml\nout: mine\ndevice: cpu\nthreads: 1\nstudent: {backend: eager}\n"
        "stages: [{steps: 1, batch: 2, objective: {name: dcm}}]\nlog: {flops: false}\n"
    )
    train(settings.load(RunConfig, Path("mine.yaml")))


@pytest.mark.slow
def test_what_was_made_otherwise_is_not_gone_on_with(tiny_folder: Path) -> None:
    synthesize(configuration(), Path("made"), Options(shard_size=2))
    other = configuration(guidance={**MORE["guidance"], "scale": 4.0})
    with pytest.raises(
        ValueError, match=r"(?s)made otherwise:\n  guidance: .*'scale': 2.0.*then.*another folder by --out"
    ):
        synthesize(other, Path("made"), Options(shard_size=2))
    model = json.loads(Path("tiny.yaml").read_text())["model"]
    faster = configuration(model={**model, "options": {**model["options"], "max_frequency": 50.0}})
    with pytest.raises(ValueError, match=r"model\.options: .*max_frequency"):
        synthesize(faster, Path("made"), Options(shard_size=2))
    with pytest.raises(ValueError, match="--seed: 0 then, 1 now"):
        synthesize(configuration(), Path("made"), Options(shard_size=2, seed=1))
    with pytest.raises(ValueError, match="is not empty, and not one of `jvpgraph synthesize`"):
        synthesize(configuration(), Path("."), Options())


@pytest.mark.slow
def test_another_prompt_in_the_same_file_makes_other_latents(tiny_folder: Path) -> None:
    file = Path("negative.safetensors")
    guidance = {"scale": 2.0, "negative_file": str(file)}
    save_file({"labels": torch.tensor(10)}, file)
    synthesize(configuration(guidance=guidance), Path("made"), Options(shard_size=2))
    save_file({"labels": torch.tensor(3)}, file)
    with pytest.raises(ValueError, match=r"made otherwise:\n  guidance\.negative: "):
        synthesize(configuration(guidance=guidance), Path("made"), Options(shard_size=2))


@pytest.mark.slow
def test_the_card_has_the_guidance_that_the_teacher_was_told(tiny_folder: Path) -> None:
    """Where the settings give another than the card that it was made from."""
    synthesize(configuration(), Path("first"), Options())
    card = json.loads(Path("first/card.json").read_text())
    Path("first/card.json").write_text(json.dumps({**card, "constants": {"guidance": 3.5}}))
    listening = {"load": "tests.test_embedded_scale:listening"}
    source = {"load": "jvpgraph.trainer.prepare:prepared", "options": {"path": "first", "guidance": 5.0}}
    guidance = {**MORE["guidance"], "shared": ["guidance"]}
    config = configuration(data={"source": source}, model=listening, guidance=guidance)
    synthesize(config, Path("made"), Options())
    assert json.loads(Path("made/card.json").read_text())["constants"] == {"guidance": 5.0}
    assert prepared("made")[0].cond["guidance"] == 5.0


class OneBad:
    """Three samples, of which the second cannot be read."""

    on_bad_shard = "skip"

    def __init__(self) -> None:
        self.inner = listed(**LABELS["options"])

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        if index == 1:
            raise BadShard("damaged")
        return self.inner[index]


@pytest.mark.slow
def test_samples_that_cannot_be_read_are_left_out(tiny_folder: Path) -> None:
    Path("bad.py").write_text("from tests.test_synthesize import OneBad as data\n")
    config = configuration(data={"source": {"load": "bad.py:data"}})
    card = synthesize(config, Path("made"), Options())
    assert card["samples"] == 2
    assert list(card["skipped"]["files"]) == ["00000001"]
    data = prepared("made")
    assert [int(data[i].cond["labels"]) for i in range(2)] == [3, 4]


# ---------------------------------------------------------------- killed, and two processes


def start(out: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jvpgraph.trainer.cli", "synthesize", "many.yaml", "--out", out]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--shard-size", "2"], env={**os.environ, **path}, **quiet)  # type: ignore[call-overload,no-any-return]


@pytest.mark.long
def test_killed_and_on_two_processes_the_bytes_are_the_same(tiny_folder: Path) -> None:
    many = {"load": LABELS["load"], "options": {"shape": [1, 8, 8], "values": {"labels": [i % 10 for i in range(40)]}}}
    tree = json.loads(Path("tiny.yaml").read_text()) | MORE | {"data": {"source": many}}
    tree["sampling"] = {"teacher_steps": 60, "batch": 2}
    Path("many.yaml").write_text(json.dumps(tree))
    whole = start("whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0, said

    killed = start("killed")
    records = Path("killed/records")
    while killed.poll() is None and not (records.is_dir() and len(list(records.iterdir())) >= 2):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    there = len(list(records.iterdir()))
    assert there < 20, "it was over before it was killed"
    assert not Path("killed/card.json").exists()
    others = [start("killed", RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank) for rank in "01"]
    for process in others:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    for path in Path("whole").rglob("*"):
        if path.is_file() and path.name != "settings.yaml":  # which names the folder
            assert path.read_bytes() == (Path("killed") / path.relative_to("whole")).read_bytes(), path


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(4, [[0, 3, 6], [9]]), (12, [[*range(9)], [9, 10, 11]]), (14, [[*range(9), 12, 18], [9, 10, 11]])],
)
def test_fewer_than_all_are_of_every_shape(count: int, wanted: list[list[int]]) -> None:
    class Shapes:
        buckets = (range(9), range(9, 12))

        def __len__(self) -> int:
            return 12

    made_by = {"--count": count, "--shard-size": 100, "--seed": 0}
    assert [list(part.numbers) for part in parts_of(Shapes(), made_by)] == wanted  # type: ignore[arg-type]


@pytest.mark.slow
def test_latents_of_a_network_of_ones_own_are_checked_without_pictures(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthesize(configuration(), Path("made"), Options(count=3))
    assert cli.main(["inspect", "made", "--check"]) == 0
    said = capsys.readouterr().out
    assert "all shards are as the index says" in said
    assert "no pictures: " in said
    assert cli.main(["inspect", "made", "--checkpoint", "elsewhere"]) == 1
