"""Previews for prompts of the user's own, as files and in TensorBoard and wandb; validation beside the teacher."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.measures import Shown, clip_score, fid
from jvpgraph.trainer.pictures import frames_of, save_frames
from jvpgraph.trainer.run import prompted
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.train import train
from tests.media_files import clip
from tests.test_log import log_of
from tests.test_train import config_of, stage
from tests.tiny_pipelines import clip_tokenizer, letters, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red thing", "a round field"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips prepared for a tiny Wan, which lies beside them."""
    folder = tmp_path_factory.mktemp("clips")
    checkpoint = save_tiny("WanPipeline", folder / "wan")
    for i in range(2):
        clip(folder / "in" / f"{i}.mp4", 32, 32, 5, fps=16)
    argv = ["prepare", checkpoint, folder / "in", "--out", folder / "data", "--size", "32x32", "--aspects"]
    assert cli.main([*map(str, argv), "--frames", "5", "--caption", "a thing", "--text-length", "8"]) == 0
    return folder


def run_of(clips: Path, out: Path, steps: int, **log: Any) -> RunConfig:
    file = out.with_suffix(".yaml")
    file.write_text(
        f"base: {clips}/data/settings.yaml\nout: {out}\nthreads: 1\ndevice: cpu\nstudent: {{backend: op_by_op}}\n"
        f"sampling: {{steps: [1, 2]}}\nstages: [{{objective: dcm, steps: {steps}, batch: 2, student: {{lr: 1e-4}}}}]\n"
    )
    return settings.load(RunConfig, file, [f"log.{name}={value}" for name, value in log.items()])


def test_videos_are_written_as_mp4_too(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.linspace(0, 1, 21)[:, None].expand(21, 33)  # odd sides
    pixels = torch.stack([rows.roll(i, 0) for i in range(5)]).expand(3, -1, -1, -1)
    path = save_frames(frames_of(pixels), tmp_path / "a", 12.5, "mp4")
    with av.open(str(path)) as file:
        (stream,) = file.streams.video
        assert stream.average_rate == 12.5
        found = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert [frame.shape for frame in found] == [(22, 34, 3)] * 5
    for i, frame in enumerate(found):
        assert abs(torch.from_numpy(frame[:21, :33]).permute(2, 0, 1) / 255 - pixels[:, i]).mean() < 0.02
    assert save_frames(frames_of(pixels[:, :1]), tmp_path / "one", 16, "mp4").name == "one.png"

    config = run_of(clips, tmp_path / "run", 1, film="mp4", preview_every=1)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "av", None)
        with pytest.raises(ValueError, match="the settings ask for av: pip install av, or set webp instead of mp4"):
            train(config)
    assert not (tmp_path / "run").exists()
    shown = train(config) / "samples" / "step-00000001"
    assert {file.suffix for file in shown.iterdir()} == {".mp4"}


@pytest.mark.long
def test_prompts_become_videos_and_are_encoded_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = {"every": 1, "preview_every": 2, "preview_count": 1, "prompts": TEXTS, "tensorboard": "true", "fps": 8}
    config = run_of(clips, tmp_path / "run", 2, **log)
    folder = train(config)
    previews = folder / "samples" / "step-00000002"
    assert sorted(path.name for path in previews.iterdir()) == ["prompt-0.webp", "prompt-1.webp", "sample-0.webp"]
    with Image.open(previews / "prompt-0.webp") as video:
        assert (video.n_frames, video.size) == (5, (32, 32))
        video.load()
        assert video.info["duration"] == 125
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"images": 0})
    events.Reload()
    assert {*events.Tags()["images"]} == {"samples/grid", "samples/0", "prompts/0", "prompts/1"}
    (image,) = events.Images("prompts/1")
    assert (image.step, image.encoded_image_string[:6]) == (2, b"GIF89a")

    plain = train(run_of(clips, tmp_path / "plain", 3, every=1))

    def fail(*args: Any) -> Any:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(prompted, "Encoder", fail)
        train(run_of(clips, tmp_path / "run", 3, **log))
        with pytest.raises(AssertionError, match="encoded again"):
            train(run_of(clips, tmp_path / "run", 4, **{**log, "prompts": TEXTS[1:]}))
    assert computed(folder / "log.jsonl") == computed(plain / "log.jsonl")  # previews change nothing
    train(run_of(clips, tmp_path / "run", 4, **{**log, "prompts": TEXTS[1:]}))  # other prompts than before
    assert [path.name for path in (folder / "samples" / "step-00000004").glob("prompt*")] == ["prompt-0.webp"]
    with Image.open(folder / "samples" / "step-00000004" / "prompt-0.webp") as video:
        assert video.n_frames == 5


@pytest.mark.slow
def test_prompts_that_cannot_be_encoded_are_refused_before_there_is_a_folder(clips: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "digits", [stage("dcm", 1)], log={"prompts": TEXTS})
    with pytest.raises(ValueError, match=r"whole pipeline.*\nName one: log\.prompts_pipeline"):
        train(config)
    sana = save_tiny("SanaPipeline", tmp_path / "sana")
    with pytest.raises(ValueError, match=r"log\.prompts: .*sana gives other conditions than the data has: encoder_"):
        train(run_of(clips, tmp_path / "run", 1, prompts=TEXTS, prompts_pipeline=sana))
    assert not (tmp_path / "digits").exists()
    assert not (tmp_path / "run").exists()


def test_wandb_gets_pictures_and_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module: Any = types.ModuleType("wandb")
    module.Image = lambda picture: ("image", picture.size)
    module.Video = lambda data, format: (format, Image.open(data).n_frames)
    module.init = lambda **_: types.SimpleNamespace(log=lambda *a, **k: calls.append((*a, k)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    frames = [Image.new("RGB", (6, 4), (50 * i, 0, 0)) for i in range(3)]
    with log_of(tmp_path, wandb="project") as log:
        log.pictures(7, {"samples/grid": frames[:1], "prompts/0": frames}, 8.0)
    assert calls == [({"samples/grid": ("image", (6, 4)), "prompts/0": ("gif", 3)}, {"step": 7})]
    assert torch.initial_seed() == 0


# ---------------------------------------------------------------- validation


class Spread:
    """The deviation of what is shown, a random number, and who was asked how often."""

    asked = 0
    needs = ("real",)

    def __call__(self, shown: Any) -> dict[str, float]:
        Spread.asked += 1
        assert shown.real.shape == shown.pictures.shape
        assert shown.batch.cond["labels"].shape == (len(shown.pictures),)
        return {"spread": shown.pictures.double().std().item(), "random": float(torch.rand(()) < 2)}


def spread() -> Spread:
    return Spread()


def broken() -> Any:
    def measure(shown: Any) -> float:
        raise RuntimeError("no such luck")

    return measure


def spreads(folder: Path) -> list[float]:
    """Of the teacher, each time it was in the log."""
    key = "validation/own/spread_teacher"
    return [line[key] for line in computed(folder / "log.jsonl") if key in line]


def same() -> Any:
    return lambda pictures: torch.ones(len(pictures), 4)


def number() -> int:
    return 3


def validated(out: Path, length: int, **more: Any) -> RunConfig:
    pixels = {"load": "jvpgraph.trainer.measures:distances", "options": {"features": PIXELS}}
    measures = {"own": {"load": f"{__name__}:spread"}, "pixels": pixels}
    validation = {"every": 2, "count": 12, "measures": measures, **more}
    return config_of(
        out,
        [stage("dcm", length)],
        validation=validation,
        sampling={"teacher_steps": 3, "steps": [2], "batch": 8},
        log={"every": 3},
    )


PIXELS = {"load": "jvpgraph.trainer.features:pixels", "options": {"pool": 2}}


@pytest.mark.long
def test_figures_beside_the_teacher_are_the_same_after_a_stop(tmp_path: Path) -> None:
    Spread.asked = 0
    whole = train(validated(tmp_path / "whole", 4))
    assert Spread.asked == 3  # the student twice, the teacher once
    lines = computed(whole / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 3, 4]
    figures = {name for name in lines[0] if name.startswith("validation/")}
    assert figures == {name for name in lines[2] if name.startswith("validation/")}
    assert {"validation/own/spread", "validation/own/spread_teacher", "validation/pixels/recall_teacher"} < figures
    assert not any(name.startswith("validation/") for name in lines[1])
    assert lines[0]["validation/own/spread_teacher"] == lines[2]["validation/own/spread_teacher"]
    assert lines[0]["validation/own/spread"] != lines[2]["validation/own/spread"]
    assert lines[0]["validation/own/spread"] != lines[0]["validation/own/spread_teacher"]

    train(validated(tmp_path / "stopped", 3))
    Spread.asked = 0
    stopped = train(validated(tmp_path / "stopped", 4))
    assert Spread.asked == 1  # the teacher's are in the folder
    assert computed(stopped / "log.jsonl")[-1] == lines[-1]
    plain = train(config_of(tmp_path / "plain", [stage("dcm", 4)], log={"every": 4}))
    loss = computed(plain / "log.jsonl")[-1]["loss"]
    assert loss == pytest.approx((2 * lines[0]["loss"] + lines[1]["loss"] + lines[2]["loss"]) / 4)  # nothing changed

    other = train(validated(tmp_path / "stopped", 6, measures={"own": {"load": f"{__name__}:spread"}}))
    assert Spread.asked == 1 + 2  # the kept samples of the teacher are measured again
    assert computed(other / "log.jsonl")[-1]["validation/own/spread_teacher"] == pytest.approx(
        lines[0]["validation/own/spread_teacher"]
    )


def test_a_student_that_is_its_teacher_has_its_figures(tmp_path: Path) -> None:
    """In as many steps of the same kind, from the same noise."""
    config = validated(tmp_path / "run", 2, steps=3)
    flow = stage("flow_matching", 2, student={"lr": 1e-30})
    data = settings.to_dict(config) | {"stages": [flow], "guidance": {}}
    (line,) = computed(train(settings.from_dict(RunConfig, data)) / "log.jsonl")
    names = [name for name in line if name.startswith("validation/") and f"{name}_teacher" in line]
    assert len(names) >= 6
    for name in names:
        assert line[name] == pytest.approx(line[f"{name}_teacher"], rel=1e-5), name


@pytest.mark.parametrize(
    ("load", "options", "words"),
    [
        (
            "jvpgraph.trainer.measures:fid",
            {},
            r"torch_fidelity.* cannot be imported: .*\npip install .jvpgraph.val",
        ),
        ("jvpgraph.trainer.measures:image_reward", {}, r"ImageReward cannot be imported: .*\npip install image-reward"),
        ("jvpgraph.trainer.measures:clip_score", {"model": "/"}, r"no CLIP model in /: "),
        (f"{__name__}:number", {}, "validation.measures.it: .*number gave no function"),
        ("jvpgraph.trainer.measures:fdi", {}, "did you mean fid"),
    ],
)
def test_what_is_missing_is_named_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str, options: dict[str, Any], words: str
) -> None:
    for module in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3", "ImageReward"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        train(validated(tmp_path / "run", 2, measures={"it": {"load": load, "options": options}}))
    assert not (tmp_path / "run").exists()


def test_the_documentation_adds_a_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text(encoding="utf-8")
    (own,) = re.findall(r"```python\n# my_measures\.py\n(.*?)```", text, re.DOTALL)
    Path("my_measures.py").write_text(own)
    (yaml,) = re.findall(r"```yaml\n(validation:.*?)```", text, re.DOTALL)
    base = settings.to_dict(config_of(tmp_path / "run", [stage("dcm", 2)]))
    del base["validation"]
    Path("run.yaml").write_text(settings.yaml_tree.dump(base) + yaml)
    config = settings.load(RunConfig, Path("run.yaml"), ["validation.every=2", "sampling.teacher_steps=2"])
    measures = {name: config.validation.measures[name] for name in ("digits", "mine")}  # the others need downloads
    config = replace(config, validation=replace(config.validation, measures=measures))
    (line,) = computed(train(config) / "log.jsonl")[-1:]
    assert {"validation/mine", "validation/mine_teacher", "validation/digits/recall"} < {*line}


def test_a_measure_that_raises_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation\.measures\.it raised RuntimeError: no such luck"):
        train(validated(tmp_path / "run", 2, measures={"it": {"load": f"{__name__}:broken"}}))
    same = {"load": f"{__name__}:same"}
    distances = {"load": "jvpgraph.trainer.measures:distances", "options": {"features": same}}
    with pytest.raises(ValueError, match=r"validation\.measures\.it: the real data are all the same.*\nTake the meas"):
        train(validated(tmp_path / "run", 2, measures={"it": distances}))
    assert not (tmp_path / "run").exists()  # the teacher's samples are measured before the first step


@pytest.mark.long
def test_figures_of_a_teacher_that_is_asked_for_another_scale_are_measured_again(tmp_path: Path) -> None:
    """By a stage that was added, whose scales are others: nobody needs --change for that."""

    def config(out: str, *scales: list[float]) -> RunConfig:
        plain = settings.to_dict(validated(tmp_path / out, 2, measures={"own": {"load": f"{__name__}:spread"}}))
        stages = [stage("dcm", 2, guidance={"scale": scale}) for scale in scales]
        student = {"backend": "eager", "embed_scale": True}
        guidance = {"scale": [2.0, 6.0], "negative": {"labels": 10}}
        return settings.from_dict(RunConfig, plain | {"stages": stages, "student": student, "guidance": guidance})

    train(config("longer", [2.0, 3.0]))
    first, second = spreads(train(config("longer", [2.0, 3.0], [5.0, 6.0])))
    whole = spreads(train(config("whole", [2.0, 3.0], [5.0, 6.0])))
    assert second == whole[-1]
    assert first != second


@pytest.mark.long
def test_figures_of_a_teacher_that_is_guided_otherwise_are_measured_again(tmp_path: Path) -> None:
    """As it is by another file of the same name, or told by weights of a byte."""
    file = tmp_path / "negative.safetensors"
    save_file({"labels": torch.tensor(10)}, file)
    guidance = {"scale": 2.0, "negative_file": str(file)}

    def config(length: int, **more: Any) -> RunConfig:
        plain = settings.to_dict(validated(tmp_path / "run", length, measures={"own": {"load": f"{__name__}:spread"}}))
        return settings.from_dict(RunConfig, plain | {"guidance": guidance, **more})

    train(config(2))
    save_file({"labels": torch.tensor(3)}, file)
    with pytest.raises(ValueError, match=r"guidance\.negative_file: the file that it names was edited"):
        train(config(4))
    train(config(4), change=["guidance.negative_file"])
    pytest.importorskip("torchao")
    wide = {"model": {"load": "tests.test_train:awake", "options": {"width": 64, "depth": 1, "heads": 2}}}
    first, second = spreads(tmp_path / "run")
    assert first != second
    train(replace(config(2, **wide), out=tmp_path / "wide"))
    bytes_ = config(4, **wide, teacher={"quantization": "int8"})
    first, second = spreads(train(replace(bytes_, out=tmp_path / "wide"), change=["teacher"]))
    assert first != second
    assert first == pytest.approx(second, rel=0.02)


def test_texts_that_the_data_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("ImageReward")
    module.load = lambda name: types.SimpleNamespace(score=lambda text, picture: 1.0)
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    with pytest.raises(ValueError, match=r"measures\.it needs captions, and the data has none"):
        train(validated(tmp_path / "run", 2, measures={"it": {"load": "jvpgraph.trainer.measures:image_reward"}}))


@pytest.mark.slow
def test_captions_of_prepared_clips_are_scored(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a CLIP of random weights, whose figure is computed again here, and a scorer that is not there."""
    clip_folder = save_clip(tmp_path / "clip")
    seen: list[tuple[str, tuple[int, int]]] = []

    def score(text: str, picture: Image.Image) -> float:
        seen.append((text, picture.size))
        return float(len(seen))

    module: Any = types.ModuleType("ImageReward")
    module.load = lambda name: types.SimpleNamespace(score=score)
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    config = run_of(clips, tmp_path / "run", 1, every=1)
    measures = {
        "clip": {"load": "jvpgraph.trainer.measures:clip_score", "options": {"model": str(clip_folder), "batch": 3}},
        "reward": {"load": "jvpgraph.trainer.measures:image_reward"},
    }
    data = settings.to_dict(config)
    data["validation"] = {"every": 1, "count": 2, "measures": measures}
    data["sampling"]["teacher_steps"] = 2
    (line,) = computed(train(settings.from_dict(RunConfig, data)) / "log.jsonl")
    assert seen == [("it moves", (32, 32))] * 20  # five frames of two videos, of teacher and student
    assert (line["validation/reward_teacher"], line["validation/reward"]) == (5.5, 15.5)
    assert 0 <= line["validation/clip"] <= 100

    measure = clip_score(str(clip_folder), batch=2)
    pictures = torch.rand(3, 3, 32, 32)
    texts = ("a red thing", "a thing", "left")
    found = measure(Shown(pictures, None, Batch(pictures, {}), texts))
    model, processor = measure.parts
    cosines = []
    for picture, text in zip(pictures, texts):
        inputs = processor(text=[text], images=frames_of(picture), return_tensors="pt", truncation=True)
        scaled = model(**inputs).logits_per_image.item()
        cosines.append(max(0.0, scaled / model.logit_scale.exp().item()))
    assert found == pytest.approx(100 * sum(cosines) / 3, rel=1e-4)


def save_clip(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(letters("</w>")) + 2, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    ends = {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **ends, **heads, "max_position_embeddings": 16},
        vision_config={**vision, **heads},
        projection_dim=4,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_fid_is_the_distance_of_inception_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights; 0 for the same pictures, and what torch-fidelity's own formula gives for others."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    measure = fid(str(tmp_path / "weights.pt"), batch=3)
    a, b = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16) ** 2
    assert measure(Shown(a, a, Batch(a, {}), None)) == pytest.approx(0, abs=1e-8)
    found = measure(Shown(a, b, Batch(a, {}), None))
    features = [network((x * 255).round().to(torch.uint8))[0].double() for x in (a, b)]
    statistics = [{"mu": f.mean(0).numpy(), "sigma": torch.cov(f.T).numpy()} for f in features]
    expected = metric.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-3)
    videos = [x.unsqueeze(2).expand(-1, -1, 2, -1, -1) for x in (a, b)]
    assert measure(Shown(*videos, Batch(a, {}), None)) < found  # the same mean, a smaller covariance
