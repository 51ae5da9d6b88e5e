"""jvpgraph prepare and inspect: real files, real kills, every kind of bad file, and what the trainer makes of it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.phases import times_of
from jvpgraph.trainer.model.adapters import diffusers_model
from jvpgraph.trainer.model.experts import experts
from jvpgraph.trainer.prepare import prepared
from jvpgraph.trainer.prepare.buckets import check_lengths, resolutions
from jvpgraph.trainer.prepare.captions import find, prompts_of
from jvpgraph.trainer.prepare.media import BadFile, as_rgb, look_at, read
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import level
from tests.media_files import clip, picture, turned
from tests.tiny_pipelines import pair_of_networks, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (64, 48), (48, 64), (64, 64), (128, 64)


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("SanaPipeline", tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("WanPipeline", tmp_path_factory.mktemp("wan"))


def pictures(folder: Path, count: int = 12) -> Path:
    for i in range(count):
        picture(folder / f"{i:02d}.{('jpg', 'png', 'webp')[i % 3]}", *SIZES[i % 4], i, f"a red thing {i}")
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


SMALL = ("--size", "64x64", "--shard-size", 2, "--text-length", 8)


# ---------------------------------------------------------------- from files to a run


def settings_file(data: Path, tmp_path: Path, objective: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {data}/settings.yaml\nout: {tmp_path}/run\nthreads: 1\ndevice: cpu\n"
        "student: {backend: op_by_op}\nlog: {every: 1, preview_every: 2, preview_count: 2}\n"
        f"sampling: {{steps: [1, 2]}}\nstages: [{{objective: {objective}, steps: 2, batch: 2}}]\n"
    )
    return file


ALL = ["SanaPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "WanPipeline", "LTXPipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [ALL[0], *(pytest.param(name, marks=pytest.mark.matrix) for name in ALL[1:])])
def test_pictures_are_prepared_trained_on_and_shown(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = save_tiny(name, tmp_path / "checkpoint")
    source, data = pictures(tmp_path / "in"), tmp_path / "data"
    one = ("--frames", 1) if name in ("WanPipeline", "LTXPipeline") else ()
    assert run("prepare", checkpoint, source, "--out", data, "--size", "32x32", "--aspects", "2:1", *one) == 0
    assert run("inspect", data, "--count", 2, "--check") == 0
    said = capsys.readouterr().out
    assert "12 samples" in said
    assert "all shards are as the index says" in said
    assert len(list((data / "inspect").glob("*.png"))) == 2
    folder = train(settings.load(RunConfig, settings_file(data, tmp_path, "dcm")))
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(losses))
    assert (folder / "samples" / "step-00000002.png").is_file()


@pytest.mark.slow
def test_clips_are_brought_to_a_frame_rate_and_to_lengths(wan: Path, tmp_path: Path) -> None:
    source, data = tmp_path / "in", tmp_path / "data"
    clip(source / "long.mp4", 64, 48, 30, fps=16)
    clip(source / "fast.webm", 64, 48, 40, fps=32)
    clip(source / "short.mp4", 64, 48, 6, fps=16)
    clip(source / "shorter.mp4", 64, 48, 3, fps=16)
    picture(source / "still.png", 64, 64, 0)
    assert run("prepare", wan, source, "--out", data, "--size", "64x48", "--aspects", "--frames", 17, 5) == 0
    card = json.loads((data / "card.json").read_text())
    assert {b["name"]: b["samples"] for b in card["buckets"]} == {"64x48x17": 2, "64x48x5": 1, "64x48": 1}
    assert card["fps"] == 16
    assert list(card["skipped"]["files"]) == ["shorter.mp4"]
    assert "3 frames at 16 per second" in card["skipped"]["files"]["shorter.mp4"]
    assert {tuple(prepared(data)[i].x0.shape) for i in range(4)} == {(4, 5, 6, 8), (4, 2, 6, 8), (4, 1, 6, 8)}
    assert run("inspect", data) == 0
    with Image.open(next((data / "inspect").glob("*.webp"))) as film:
        assert film.n_frames in (5, 17)


@pytest.mark.slow
def test_prompts_alone_train_what_needs_no_data(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, data = tmp_path / "prompts.txt", tmp_path / "data"
    prompts.write_text("a red thing\n\nblue\nit moves\n")
    assert run("prepare", sana, prompts, "--out", data, *SMALL) == 0
    found = prepared(data)
    assert (len(found), found.has_latents, list(found[0].x0.shape)) == (3, False, [4, 16, 16])
    assert run("inspect", data) == 0
    assert "it moves" in capsys.readouterr().out
    assert run("train", settings_file(data, tmp_path, "rcm")) == 1
    assert "prompts only: train with dmd" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run("train", settings_file(data, tmp_path, "dmd")) == 0


def test_a_sample_is_what_the_components_make_of_it(sana: Path, tmp_path: Path) -> None:
    """Shift and scale are the card's, and the negative prompt has the data's names."""
    source, data = pictures(tmp_path / "in", 3), tmp_path / "data"
    assert run("prepare", sana, source, "--out", data, "--negative", "blue", *SMALL) == 0
    found, card = prepared(data), json.loads((data / "card.json").read_text())
    assert card["latents"]["scale"] == 0.41
    sample = found[0]
    assert set(load_file(data / "negative.safetensors")) == set(sample.cond)
    assert sample.cond["encoder_hidden_states"].shape[1:] == (12,)
    assert card["checkpoint"]["files"]["vae/config.json"]
    assert [len(bucket) for bucket in found.buckets] == [1, 1, 1]


# ---------------------------------------------------------------- killed, and many processes


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "jvpgraph.trainer.cli", *(str(a) for a in arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_a_killed_preparation_goes_on_to_the_same_bytes(sana: Path, tmp_path: Path) -> None:
    """Killed once a few shards are there; then it goes on in two processes."""
    source = pictures(tmp_path / "in", 40)
    command = ("prepare", sana, source, *SMALL, "--out")
    assert run(*command, tmp_path / "whole") == 0
    process = start(*command, tmp_path / "killed")
    records = tmp_path / "killed" / "records"
    end = time.monotonic() + 240
    while not records.is_dir() or len(list(records.glob("*.json"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "card.json").exists()
    written = {p: p.stat().st_mtime_ns for p in records.glob("*.json")}
    with pytest.raises(ValueError, match=r"not prepared to the end. Run the same `jvpgraph prepare` again"):
        prepared(tmp_path / "killed")

    second = start(*command, tmp_path / "killed", RANK="1", WORLD_SIZE="2")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
    try:
        assert run(*command, tmp_path / "killed") == 0
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert {p: p.stat().st_mtime_ns for p in written} == written  # nothing was encoded twice
    expected, found = content(tmp_path / "whole"), content(tmp_path / "killed")
    here = {name for name in found if name.endswith(".draft")} | {"settings.yaml", "run.yaml"}  # with the folder's name
    assert {n: b for n, b in found.items() if n not in here} == {n: b for n, b in expected.items() if n not in here}


# ---------------------------------------------------------------- bad files


def test_bad_files_are_named_counted_and_left_out(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = pictures(tmp_path / "in", 4), tmp_path / "data"
    cut = picture(source / "cut.jpg", 64, 64, 5)
    cut.write_bytes(cut.read_bytes()[:-300])
    picture(source / "dot.png", 1, 1, 3)
    picture(source / "silent.png", 64, 64, 4, None)
    picture(source / "blank.png", 64, 64, 4, " \n")
    picture(source / "latin.png", 64, 64, 4).with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    (source / "lone.txt").write_text("nobody")
    (source / "none.mp4").write_bytes(b"")
    (source / "none.txt").write_text("a film")
    clip(source / "film.mp4", 64, 64, 4)
    (source / "other.gif").write_bytes(b"GIF89a")
    expected = {
        "blank.png": "its caption is empty",
        "cut.jpg": "not a whole picture: image file is truncated",
        "dot.png": "1x1 pixels would be enlarged 64.0 times",
        "film.mp4": "a clip, and this checkpoint makes pictures",
        "latin.png": "its caption cannot be read",
        "lone.txt": "a caption, and there is no picture or clip of its name",
        "none.mp4": "an empty file",
        "silent.png": "no caption: no silent.txt",
    }
    assert run("prepare", sana, source, "--out", data, *SMALL, "--on-bad", "fail") == 1
    said = capsys.readouterr().err
    assert "7 files cannot be used" in said
    assert "--on-bad skip" in said
    assert not data.exists()
    assert run("prepare", sana, source, "--out", data, *SMALL, "--on-bad", "skip") == 0  # the advice
    card = json.loads((data / "card.json").read_text())
    assert card["samples"] == 4
    assert list(card["skipped"]["files"]) == sorted(expected)
    assert all(card["skipped"]["files"][name].startswith(reason) for name, reason in expected.items())
    assert card["skipped"]["count"] == 8
    assert card["ignored"] == {".gif": 1}
    assert len(prepared(data)) == 4


def test_what_only_decoding_shows_stops_it_too_and_then_it_goes_on(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = pictures(tmp_path / "in", 4), tmp_path / "data"
    cut = picture(source / "cut.jpg", 64, 64, 5)
    cut.write_bytes(cut.read_bytes()[:-300])
    command = ("prepare", sana, source, "--out", data, *SMALL, "--on-bad")
    assert run(*command, "fail") == 1
    assert "cut.jpg: not a whole picture" in capsys.readouterr().err
    assert run(*command, "skip") == 0
    assert run(*command, "fail") == 1  # and what was left out is not forgotten
    picture(cut, 64, 64, 5)  # the other advice
    assert run(*command, "fail") == 0
    assert len(prepared(data)) == 5


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: folder / "nowhere", "is not a folder. Give the folder of a whole pipeline"),
        (lambda folder: folder / "vae", "holds no pipeline of diffusers.*Give the folder"),
        (lambda folder: change(folder, "DDPMPipeline"), "DDPMPipeline is none of the pipelines"),
        (lambda folder: change(folder, "WanPipeline"), "a WanPipeline has a WanTransformer3DModel. Give"),
        (lambda folder: gone(folder / "vae" / "config.json"), "not complete: vae/config.json.*Give the folder"),
        (lambda folder: gone(folder / "text_encoder" / "model.safetensors"), "cannot be loaded.*Download"),
    ],
)
def test_a_wrong_checkpoint_is_told_before_anything_is_written(
    spoil: object, problem: str, sana: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    subprocess.run(["cp", "-r", sana, folder], check=True)
    checkpoint = spoil(folder)  # type: ignore[operator]
    source, data = pictures(tmp_path / "in", 1), tmp_path / "data"
    command = ["prepare", str(checkpoint), str(source), "--out", str(data)]
    arguments = cli.parse(command)
    with pytest.raises(ValueError, match=f"(?s){problem}") as error:
        cli.module_of("prepare").run(arguments)
    assert len(str(error.value).splitlines()) <= 2
    assert not data.exists()


def change(folder: Path, name: str) -> Path:
    tree = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**tree, "_class_name": name}))
    return folder


def gone(file: Path) -> Path:
    file.unlink()
    return file.parents[1]


def test_two_networks_in_one_pipeline_are_no_student(tmp_path: Path) -> None:
    """Wan 2.2's 14B: a student would have been one of them, and its teacher the other for the rest of the noise."""
    both = pair_of_networks(tmp_path / "both")
    with pytest.raises(ValueError, match=r"two networks, one above and one below 0\.875.*\nGive one of the two"):
        diffusers_model(path=str(both))


@pytest.mark.long
def test_two_networks_become_two_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder of clips to a pipeline of four steps, by what was written."""
    monkeypatch.chdir(tmp_path)
    both, source, data = pair_of_networks(tmp_path / "both"), tmp_path / "in", tmp_path / "data"
    for i in range(3):
        clip(source / f"{i}.mp4", 16, 16, 5, fps=16)
    options = ("--size", "16x16", "--aspects", "--frames", 5, "--text-length", 16)
    assert run("prepare", both, source, "--out", data, *options) == 0
    quick = ["stages.0.steps=1", "stages.0.accumulate=1", "threads=1", "device=cpu", "student.backend=eager"]
    quick += ["student.lora.rank=2", "log.preview_every=1", "log.preview_count=1", "log.prompts=[a cat]"]
    for name in ("run", "run_low"):
        assert run("train", data / f"{name}.yaml", *quick) == 0
    high, low = (settings.load(RunConfig, Path(f"out/data-{name}/config.yaml")) for name in ("high", "low"))
    assert [Path(each.model.options["path"]).name for each in (high, low)] == ["transformer", "transformer_2"]
    assert high.teacher == low.teacher
    assert high.teacher.offload
    assert level(high.stages[0].objective.end) == pytest.approx(0.875, abs=1e-5)
    levels = [level(t) for t in times_of(low, 0, 4)]
    assert levels == pytest.approx([level(math.atan(80)), 15 / 16, 7 / 8, 5 / 8], abs=1e-5)
    assert run("sample", "out/data-low", "--steps", 4, "--count", 1) == 0
    assert run("export", "out/data-low", "--out", "made", "--format", "diffusers") == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained("made", trust_remote_code=True)
    assert pipe.config.boundary_ratio == pytest.approx(0.875, abs=1e-4)
    assert pipe.transformer_2 is not None
    assert experts(path="made").net.low is not None
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    frames = pipe("a cat", num_inference_steps=4, guidance_scale=1.0, output_type="np", **size).frames[0]
    assert np.isfinite(frames).all()


def test_what_goes_on_and_what_is_refused(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = pictures(tmp_path / "in", 4), tmp_path / "data"
    command = ("prepare", sana, source, "--out", data, *SMALL)
    assert run(*command) == 0
    (data / "run.yaml").write_text("out: changed")  # which is the user's
    before = content(data)
    assert run(*command) == 0
    assert content(data) == before
    assert run(*command, "--size", "32x32") == 1
    assert "size [64, 64] then, [32, 32] now" in capsys.readouterr().err
    assert content(data) == before

    (source / "00.jpg").rename(tmp_path / "00.jpg")
    assert run(*command) == 1
    assert "00.jpg" in capsys.readouterr().err
    assert content(data) == before
    (tmp_path / "00.jpg").rename(source / "00.jpg")

    picture(source / "new.png", 64, 64, 9)
    assert run(*command) == 0
    assert len(prepared(data)) == 5

    shard = next(data.glob("*.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 1
    shard.write_bytes(damaged)
    assert run("inspect", data, "--check") == 1
    assert f"Delete records/{shard.stem}.json" in capsys.readouterr().err
    (data / "records" / f"{shard.stem}.json").unlink()  # the advice
    assert run(*command) == 0
    assert run("inspect", data, "--check") == 0

    assert run("prepare", sana, source, "--out", source / "data") == 1
    assert run("prepare", sana, source, "--out", tmp_path) == 1
    assert "not one of `jvpgraph prepare`" in capsys.readouterr().err
    assert run(*command[:4], tmp_path / "x", "--size", "65x64") == 1
    assert "--size 65x64: this VAE and network need multiples of 4 pixels. Take 64x64." in capsys.readouterr().err


# ---------------------------------------------------------------- parts


def test_captions_come_from_everywhere(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "sub/e.jpg", "sub/f.jpg", ".hidden/g.jpg"):
        picture(tmp_path / name, 8, 8, 0, None)
    (tmp_path / "a.txt").write_text(" one\n")
    (tmp_path / "b.json").write_text('{"caption": "two"}')
    (tmp_path / "c.json").write_text('{"title": "three"}')
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "e.jpg", "text": "five"}\n{"file_name": "z.jpg"}\n')
    (tmp_path / "metadata.csv").write_text("file_name,caption\nsub/f.jpg,six\n")
    found = find(tmp_path, None)
    assert found.captions == {"a.jpg": "one", "b.jpg": "two", "sub/e.jpg": "five", "sub/f.jpg": "six"}
    assert set(found.skipped) == {"c.jpg", "d.jpg", "sub/z.jpg"}
    assert find(tmp_path, "any").captions["d.jpg"] == "any"
    (tmp_path / "metadata.csv").write_text("name\nf.jpg\n")
    with pytest.raises(ValueError, match="row 1: none of the keys file_name"):
        find(tmp_path, None)


def test_captions_keep_what_is_no_end_of_line(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 8, 8, 0, None)
    row = {"file_name": "a.jpg", "text": "one\u2028still\x85one"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert find(tmp_path, None).captions == {"a.jpg": row["text"]}
    (tmp_path / "prompts.txt").write_text(f"{row['text']}\r\n\ntwo\n", encoding="utf-8", newline="")
    assert prompts_of(tmp_path / "prompts.txt") == [row["text"], "two"]


def test_sizes_have_about_one_area_and_lengths_fit_the_vae() -> None:
    found = resolutions(832, 480, 16, ("1:1", "16:9", "9:16"))
    assert found == [(832, 480), (624, 624), (480, 848)]
    assert all(abs(w * h / (832 * 480) - 1) < 0.1 for w, h in found)
    assert check_lengths((5, 81, 5), 4) == [81, 5]
    with pytest.raises(ValueError, match=r"--frames 80: .* Take 81"):
        check_lengths((80,), 4)


def test_pictures_of_every_kind_are_read_as_they_are_shown(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert (look_at(tmp_path / "turned.jpg").width, look_at(tmp_path / "turned.jpg").height) == (20, 40)
    assert read(tmp_path / "turned.jpg", 20, 40, 1, 0, 1.0)[0].size == (20, 40)
    assert as_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 32768, np.uint16))
    assert as_rgb(deep).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_frames_are_those_that_a_player_shows(tmp_path: Path, ending: str) -> None:
    path = clip(tmp_path / f"a.{ending}", 64, 48, 30)
    media = look_at(path)
    assert (media.width, media.height, len(media.times)) == (64, 48, 30)
    for fps, frames in ((16, 30), (8, 15), (24, 44)):
        assert media.frames_at(fps) == frames
        grey = [int(np.asarray(image)[-1, -1, 0]) for image in read(path, 32, 32, 5, 3, fps)]
        expected = [20 + 200 * int((k + 3) / fps * 16 + 1e-3) // 30 for k in range(5)]
        assert np.abs(np.subtract(grey, expected)).max() <= 3
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadFile):
        read(path, 32, 32, 30, 0, 16)


def test_the_same_prompts_have_the_same_conditions_in_every_shape(sana: Path, tmp_path: Path) -> None:
    source, data = tmp_path / "in", tmp_path / "data"
    picture(source / "a.png", 64, 64, 0, "blue")
    picture(source / "b.png", 128, 64, 1, "blue")
    assert run("prepare", sana, source, "--out", data, *SMALL) == 0
    a, b = prepared(data)[0], prepared(data)[1]
    assert a.x0.shape != b.x0.shape
    assert all(torch.equal(a.cond[name], b.cond[name]) for name in a.cond)


@pytest.mark.parametrize(("quarters", "white"), [(1, (0, 1)), (2, (1, 1)), (3, (1, 0))])
def test_clips_of_phones_stand_upright(tmp_path: Path, quarters: int, white: tuple[int, int]) -> None:
    """They lie in the file, which says by how many quarters a player turns them, clockwise."""
    path = turned(clip(tmp_path / "a.mp4", 64, 32, 3), quarters)
    media = look_at(path)
    assert (media.width, media.height) == ((64, 32) if quarters == 2 else (32, 64))
    (frame,) = read(path, media.width, media.height, 1, 0, 16)
    pixels = np.asarray(frame)[..., 0]
    rows, columns = np.nonzero(pixels > 128)  # a square left of the middle, above it
    assert (rows.mean() > media.height / 2, columns.mean() > media.width / 2) == white


def test_pixels_that_are_no_squares_become_squares(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 64, 32, 3, aspect=Fraction(3, 2))
    assert (look_at(path).width, look_at(path).height) == (96, 32)
    assert read(path, 96, 32, 1, 0, 16)[0].size == (96, 32)
