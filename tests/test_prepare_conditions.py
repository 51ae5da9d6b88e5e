"""Conditions that are no prompts: labels, sizes, a first frame; padded text; positions that a network has not."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.adapters import diffusers_model
from jvpgraph.trainer.batch import drop_condition
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.prepare import prepared
from jvpgraph.trainer.prepare.checkpoint import Encoder, read_checkpoint
from jvpgraph.trainer.prepare.positions import RULES, positions_of
from jvpgraph.trainer.run.finished import sample_run
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import Guided, TrigFlow
from tests.media_files import clip, picture
from tests.tiny_pipelines import make, save_tiny
from tests.zoo.base import randomise
from tests.zoo.cases import CASES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:diffusers"),
]

QUICK = ["threads=1", "device=cpu", "student.backend=op_by_op", "stages.0.steps=2", "stages.0.accumulate=1"]
QUICK += ["student.lora=null", "student.checkpoint_blocks=false", "stages.0.objective={name: dcm}", "stages.0.batch=2"]

DMD = "stages.0.objective={name: dmd, simulation_steps: 2, fake_updates_per_step: 1}"


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def trained(data: Path, out: Path) -> Path:
    return train(settings.load(RunConfig, data / "run.yaml", [*QUICK, f"out={out}"]))


# ---------------------------------------------------------------- labels

LABELS = {"0": "tench, Tinca tinca", "7": "cock"}


@pytest.mark.slow
def test_a_checkpoint_with_labels_goes_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DiT's own names its network after the class that it was split from."""
    checkpoint = save_tiny("DiTPipeline", tmp_path / "checkpoint")
    for file, change in (
        ("transformer/config.json", {"_class_name": "Transformer2DModel"}),
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"], "id2label": LABELS}),
    ):
        tree = json.loads((checkpoint / file).read_text())
        (checkpoint / file).write_text(json.dumps({**tree, **change}))
    assert json.loads((checkpoint / "transformer/config.json").read_text())["norm_type"] == "ada_norm_zero"
    source, data = tmp_path / "in", tmp_path / "data"
    for i, label in enumerate(("7", "cock", "Tinca tinca", "zebra", "1000")):
        picture(source / f"{i}.png", 48, 32, i, label)
    assert run("prepare", checkpoint, source, "--out", data, "--size", "64x64") == 1
    assert "a DiTPipeline makes 32x32 pixels, and nothing else. Leave out" in capsys.readouterr().err
    assert run("prepare", checkpoint, source, "--out", data) == 0
    card = json.loads((data / "card.json").read_text())
    assert card["skipped"]["count"] == 2
    assert "'zebra' is neither a number below 1000 nor a label that the pipeline knows" in str(card["skipped"]["files"])
    samples = [prepared(data)[i] for i in range(3)]
    assert [int(sample.cond["class_labels"]) for sample in samples] == [7, 7, 0]
    assert load_file(data / "negative.safetensors")["class_labels"] == 1000

    folder = trained(data, tmp_path / "run")
    assert sample_run(folder, steps=1, count=2, ema=None, seed=0, out=tmp_path / "shown.png").is_file()
    net = export_run(folder, tmp_path / "net")
    assert json.loads((net / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"


# ---------------------------------------------------------------- a first frame


def test_what_begins_with_a_picture_wants_clips_and_all_of_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny("WanImageToVideoPipeline", tmp_path / "checkpoint")
    (tmp_path / "prompts.txt").write_text("a red thing")
    size = ("--size", "32x32", "--frames", 5)
    assert run("prepare", checkpoint, tmp_path / "prompts.txt", "--out", tmp_path / "out", *size) == 1
    assert "begins with a picture.\nGive a folder of clips with captions; or" in capsys.readouterr().err
    clip(tmp_path / "in" / "a.mp4", 32, 32, 5)
    source = tmp_path / "in"
    assert run("prepare", checkpoint, source, "--out", tmp_path / "out", "--text-length", 16, *size) == 1
    assert "--text-length 16: this network takes 512, beside a picture" in capsys.readouterr().err
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    assert run("prepare", checkpoint, source, "--out", tmp_path / "out", *size) == 1
    assert "each with a time of its own" in capsys.readouterr().err

    model = diffusers_model(checkpoint / "transformer")
    x, cond = torch.zeros(1, 4, 2, 4, 4), {"encoder_hidden_states": torch.zeros(1, 16, 10)}
    cond |= {"encoder_hidden_states_image": torch.zeros(1, 17, 14), "condition": torch.zeros(1, 8, 2, 4, 4)}
    with pytest.raises(ValueError, match="takes 512 tokens of text beside a picture's, not 16"):
        model(x, torch.ones(1), cond)


@pytest.mark.slow
def test_a_network_that_sees_no_embedding_gets_none_and_clips_may_have_two_shapes(tmp_path: Path) -> None:
    """Wan 2.2's from image to video; the condition has the shape of the clip."""
    made = make("WanImageToVideoPipeline", image_dim=None, added_kv_proj_dim=None)
    made.register_modules(image_encoder=None, image_processor=None)
    made.save_pretrained(tmp_path / "checkpoint")
    for i, (width, height) in enumerate(((32, 32), (64, 32), (32, 32), (64, 32))):
        clip(tmp_path / "in" / f"{i}.mp4", width, height, 5)
    data = tmp_path / "data"
    few = ("--size", "32x32", "--aspects", "2:1", "--frames", 5, "--text-length", 8, "--max-enlarge", 9)
    assert run("prepare", tmp_path / "checkpoint", tmp_path / "in", "--out", data, *few) == 0
    first, last = prepared(data)[0], prepared(data)[3]
    assert first.cond.keys() == {"encoder_hidden_states", "condition"}
    assert first.cond["condition"].shape == (8, 2, 4, 4)
    assert last.cond["condition"].shape == (8, 2, *last.x0.shape[2:])
    assert last.x0.shape[2:] != (4, 4)
    assert first.cond["condition"][:4, 0].min() == 1  # the mask: the first frame is known
    assert first.cond["condition"][:4, 1:].max() == 0
    torch.testing.assert_close(first.cond["condition"][4:, 0], first.x0[:, 0], rtol=1e-4, atol=1e-4)
    assert settings.load(RunConfig, data / "run.yaml", []).guidance.shared == ("condition",)
    log = (trained(data, tmp_path / "run") / "log.jsonl").read_text()
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.long
def test_pictures_alone_are_first_frames_of_what_needs_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of clips of two shapes, which the student makes itself."""
    checkpoint = save_tiny("WanImageToVideoPipeline", tmp_path / "checkpoint")
    for i, (width, height) in enumerate(((32, 32), (64, 32), (32, 32), (64, 32))):
        picture(tmp_path / "in" / f"{i}.png", width, height, i)
    data = tmp_path / "data"
    few = ("--size", "32x32", "--aspects", "2:1", "--frames", 9, "--max-enlarge", 9)
    assert run("prepare", checkpoint, tmp_path / "in", "--out", data, *few) == 0
    found = prepared(data)
    assert (len(found), found.has_latents) == (4, False)
    assert {tuple(found[i].x0.shape[1:]) for i in range(4)} == {
        tuple(found[0].x0.shape[1:]),
        tuple(found[3].x0.shape[1:]),
    }
    for i in range(4):
        known = found[i].cond["condition"]
        assert known.shape == (8, *found[i].x0.shape[1:])
        assert found[i].x0.shape[1] == 3
        assert found[i].cond["encoder_hidden_states_image"].shape == (17, 14)
        assert (known[:4, 0].min(), known[:4, 1:].max()) == (1, 0)  # the mask: the first frame is known
    assert not torch.equal(found[0].cond["condition"], found[1].cond["condition"])
    assert run("inspect", data) == 0
    rcm = settings.load(RunConfig, data / "run.yaml", [*QUICK, f"out={tmp_path / 'refused'}", "stages.0.objective=rcm"])
    with pytest.raises(ValueError, match="holds prompts only"):
        train(rcm)
    config = settings.load(RunConfig, data / "run.yaml", [*QUICK, DMD, f"out={tmp_path / 'run'}"])
    assert config.stages[0].objective.name == "dmd"
    losses = [json.loads(line)["loss"] for line in (train(config) / "log.jsonl").read_text().splitlines()]
    assert torch.tensor(losses).isfinite().all()


# ---------------------------------------------------------------- what the negative prompt has from the sample


class Sums(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return x * self.zero + sum(value.reshape(-1, 1) for value in cond.values())


def test_a_negative_prompt_has_the_samples_own_size() -> None:
    model = TrigFlow(Sums(), call=lambda net, x, time, cond: net(x, cond))
    x, t = torch.zeros(2, 1), torch.full((2,), 0.3, dtype=torch.float64)
    cond = {"text": torch.tensor([1.0, 2.0]), "size": torch.tensor([10.0, 20.0])}
    negative = {"text": torch.tensor([5.0])}
    F = Guided(model, 3.0, negative, shared=("size",))(x, t, cond)
    F_negative = model(x, t, {"text": torch.tensor([5.0, 5.0]), "size": cond["size"]})
    torch.testing.assert_close(F, F_negative + 3 * (model(x, t, cond) - F_negative))
    dropped = drop_condition(cond, negative, 1.0, torch.Generator().manual_seed(0))
    assert dropped["text"].tolist() == [5, 5]
    assert dropped["size"].tolist() == [10, 20]


@pytest.mark.slow
def test_a_network_that_is_told_sizes_learns_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_tiny("CogView4Pipeline", tmp_path / "checkpoint")
    for i, (width, height) in enumerate(((32, 32), (64, 32), (32, 32), (64, 32))):
        picture(tmp_path / "in" / f"{i}.png", width, height, i, "a red thing " * (1 + 2 * i))
    data = tmp_path / "data"
    few = ("--size", "32x32", "--aspects", "2:1", "--max-enlarge", 9, "--text-length")
    assert run("prepare", checkpoint, tmp_path / "in", "--out", tmp_path / "out", *few, 10) == 1
    assert "--text-length 10: a CogView4Pipeline makes 16 tokens of it. Take 16." in capsys.readouterr().err
    assert run("prepare", checkpoint, tmp_path / "in", "--out", data, *few, 32) == 0
    first, last = prepared(data)[0], prepared(data)[3]
    assert first.cond["target_size"].tolist() == first.cond["original_size"].tolist() == [32, 32]
    assert last.cond["target_size"].tolist() == [24, 48]
    assert load_file(data / "negative.safetensors").keys() == {"encoder_hidden_states", "attention_mask"}
    assert settings.load(RunConfig, data / "run.yaml", []).sampling.shift == pytest.approx(0.25 + 0.75 / 4)
    trained(data, tmp_path / "run")


# ---------------------------------------------------------------- padded text

N, LENGTH = (7, 32, 40), 70


@pytest.mark.parametrize("name", ["ZImageTransformer2DModel", "CogView4Transformer2DModel"])
@torch.no_grad()
def test_padded_text_in_a_batch_is_that_of_each_alone(name: str) -> None:
    """Without the padding, as the pipelines ask; the networks' copies do so too."""
    z = name.startswith("Z")
    more = {"axes_lens": [128, 8, 8]} if z else {}
    model = diffusers_model(name=name, config=CASES[name].config | more, dtype="float64")
    randomise(model.net, 0)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 6, generator=rng, dtype=torch.float64)
    texts = [torch.randn(n, 12, generator=rng, dtype=torch.float64) for n in N]
    t = torch.tensor([0.3, 0.8, 1.3], dtype=torch.float64)
    text, mask = ("cap_feats", "cap_mask") if z else ("encoder_hidden_states", "attention_mask")
    size = {} if z else {key: torch.ones(1, 2) for key in ("original_size", "target_size", "crop_coords")}
    padded = torch.stack([pad(one, (0, 0, 0, LENGTH - len(one))) for one in texts])
    counts = torch.stack([(torch.arange(LENGTH) < n).long() for n in N])
    sizes = {key: value.expand(3, 2) for key, value in size.items()}
    together = model(x, t, {text: padded, mask: counts, **sizes})
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], {text: texts[i][None], **size}) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    spoilt = padded + 100 * (1 - counts[..., None])  # what is in the padding is of no importance
    torch.testing.assert_close(model(x, t, {text: spoilt, mask: counts, **sizes}), together)


@pytest.mark.parametrize("fails", [False, True], ids=["whole", "failed"])
def test_a_mask_is_for_one_call(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CASES["ZImageTransformer2DModel"].config | {"axes_lens": [128, 8, 8]}
    model = diffusers_model(name="ZImageTransformer2DModel", config=config)
    captions, mask = torch.randn(1, 40, 12), torch.ones(1, 40) * (torch.arange(40) < 9)
    asked = [torch.randn(4, 1, 8, 8)], torch.tensor([0.5]), list(captions)
    x, t, cond = torch.randn(1, 4, 8, 8).double(), torch.ones(1).double(), {"cap_feats": captions, "cap_mask": mask}
    with torch.no_grad():
        plain = model.net(*asked, return_dict=False)[0][0]
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(model.net.layers[0], "forward", failing)
            with pytest.raises(RuntimeError, match="half-way") if fails else nullcontext():
                model(x, t, cond)
        torch.testing.assert_close(model.net(*asked, return_dict=False)[0][0], plain)


def failing(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("half-way")


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("name", "enough", "too_many"),
    [
        ("AuraFlowTransformer2DModel", (1, 32, 32), (1, 32, 33)),
        ("CosmosTransformer3DModel", (128, 120, 120), (129, 1, 1)),
        ("HiDreamImageTransformer2DModel", (1, 32, 128), (1, 64, 65)),
        ("Lumina2Transformer2DModel", (1, 512, 512), (1, 513, 1)),
        ("SD3Transformer2DModel", (1, 96, 96), (1, 97, 1)),
        ("WanTransformer3DModel", (1024, 1024, 1024), (1, 1, 1025)),
        ("ZImageTransformer2DModel", (1, 512, 512), (1, 1, 513)),
    ],
)
def test_positions_are_those_of_the_usual_configuration(
    name: str, enough: tuple[int, int, int], too_many: tuple[int, int, int]
) -> None:
    most = positions_of(name, {"patch_size": 2} if name.startswith("HiDream") else {})
    assert most.lacks(*enough) == ""
    assert "and there are" in most.lacks(*too_many)


def test_rules_are_about_networks_with_adapters() -> None:
    assert set(RULES) <= set(importlib.import_module("jvpgraph.trainer.adapters").ADAPTERS)
    assert positions_of("FluxTransformer2DModel", {}).lacks(10**6, 10**6, 10**6) == ""


def test_sizes_beyond_a_networks_positions_are_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """AuraFlow would read the positions of other rows, without a word."""
    checkpoint = tmp_path / "checkpoint"
    make("AuraFlowPipeline", pos_embed_max_size=25).save_pretrained(checkpoint)  # 5 x 5
    picture(tmp_path / "in" / "a.png", 64, 32, 0)
    size = ("--size", "40x40", "--text-length", 8)
    assert run("prepare", checkpoint, tmp_path / "in", "--out", tmp_path / "out", *size, "--aspects", "2:1") == 1
    said = capsys.readouterr().err
    assert "56x32 pixels, 1 frames: this AuraFlowTransformer2DModel has too few positions: 7 columns" in said
    assert not (tmp_path / "out").exists()
    assert run("prepare", checkpoint, tmp_path / "in", "--out", tmp_path / "out", *size) == 0
    assert "no 56x32: this AuraFlowTransformer2DModel has too few positions" in caplog.text
    assert [bucket["name"] for bucket in json.loads((tmp_path / "out/card.json").read_text())["buckets"]] == ["40x40"]


def test_cosmos_is_prepared_for_without_its_guardrail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("Cosmos2TextToImagePipeline", tmp_path / "checkpoint")
    module: Any = importlib.import_module("diffusers.pipelines.cosmos.pipeline_cosmos2_text2image")

    def missing() -> None:
        raise ImportError("`cosmos_guardrail` is not installed")

    monkeypatch.setattr(module, "CosmosSafetyChecker", missing)
    with pytest.raises(ImportError, match="cosmos_guardrail"):
        module.Cosmos2TextToImagePipeline.from_pretrained(folder)
    encoder = Encoder(read_checkpoint(folder), torch.device("cpu"), torch.float32)
    assert encoder.latent_shape(1, 32, 32) == [4, 4, 4]
    assert module.CosmosSafetyChecker is missing
