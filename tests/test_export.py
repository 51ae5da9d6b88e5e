"""A student on its way out: whole pipelines, LoRA files, single files, plain networks; and prompts sampled by it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from jvpgraph.trainer import settings
from jvpgraph.trainer.cli import main
from jvpgraph.trainer.config import DataConfig, RunConfig, SamplingConfig
from jvpgraph.trainer.data.sample import Sample
from jvpgraph.trainer.export import export_run, keys, lora
from jvpgraph.trainer.export.prompts import sample_prompts
from jvpgraph.trainer.export.task import Task
from jvpgraph.trainer.model.adapters import adapter_of, diffusers_model
from jvpgraph.trainer.model.schedulers import even_times, scheduler_for
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow
from tests.tiny_pipelines import make

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:diffusers"),
]

RCM = [math.atan(80.0), 1.3, 1.0, 0.6]
PIPELINES = {
    "wan": "WanPipeline",
    "flux": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "qwen_image": "QwenImagePipeline",
    "ltx": "LTXPipeline",
    "sana": "SanaPipeline",
}
EVERY_PIPELINE = pytest.mark.parametrize("name", PIPELINES)

LATENTS = {
    "wan": [4, 2, 2, 2],
    "flux": [2, 4, 4],
    "sd3": [4, 4, 4],
    "qwen_image": [2, 4, 4],
    "ltx": [4, 2, 2, 2],
    "sana": [4, 4, 4],
}
CONDITIONS: dict[str, dict[str, list[int]]] = {
    "wan": {"encoder_hidden_states": [5, 10]},
    "flux": {"encoder_hidden_states": [5, 12], "pooled_projections": [10]},
    "sd3": {"encoder_hidden_states": [5, 12], "pooled_projections": [10]},
    "qwen_image": {"encoder_hidden_states": [5, 12]},
    "ltx": {"encoder_hidden_states": [5, 12], "encoder_attention_mask": [5]},
    "sana": {"encoder_hidden_states": [5, 12], "encoder_attention_mask": [5]},
}
# What a call needs besides a prompt, so that it is quick; guidance is in the student.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "wan": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 16},
    "flux": {"height": 16, "width": 16, "max_sequence_length": 16},
    "sd3": {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
    "qwen_image": {"height": 16, "width": 16, "true_cfg_scale": 1.0},
    "ltx": {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 16},
    "sana": {
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "max_sequence_length": 16,
    },
}


def pipeline(name: str) -> Any:
    """Flux without a guidance scale, of which a run has to be told."""
    return make(PIPELINES[name], **({"guidance_embeds": False} if name == "flux" else {}))


class Noise:
    """Random latents and conditions; masks are ones."""

    def __init__(self, latents: list[int], conditions: dict[str, list[int]]) -> None:
        self.latents, self.conditions = latents, conditions

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        rng = torch.Generator().manual_seed(index)
        cond = {
            name: torch.ones(shape) if name.endswith("mask") else torch.randn(shape, generator=rng)
            for name, shape in self.conditions.items()
        }
        return Sample(f"noise/{index}", torch.randn(self.latents, generator=rng), cond)


def trained(name: str, folder: Path, *overrides: str, steps: int = 1) -> Path:
    """A run of one step from the pipeline in `folder`/checkpoint."""
    if not (folder / "checkpoint").exists():
        pipeline(name).save_pretrained(folder / "checkpoint")
    data = {"latents": LATENTS[name], "conditions": CONDITIONS[name]}
    run = folder / "run"
    config = {
        "out": str(run),
        "threads": 1,
        "device": "cpu",
        "model": {
            "load": "jvpgraph.trainer.adapters:diffusers_model",
            "options": {"path": str(folder / "checkpoint")},
        },
        "student": {"backend": "eager"},
        "data": {"source": {"load": "tests.test_export:Noise", "options": data}},
        "stages": [{"objective": {"name": "dcm"}, "steps": steps, "batch": 2, "student": {"lr": 1e-2}}],
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(config))
    return train(settings.load(RunConfig, file, overrides))


LORA = 'student.lora={rank: 2, alpha: 4, targets: [to_q, to_k, to_v, "to_out.0"]}'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs by pipeline, made when they are asked for; with whole weights or with adapters."""
    made: dict[tuple[str, bool], Path] = {}

    def run_of(name: str, adapters: bool = False) -> Path:
        if (name, adapters) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, adapters] = trained(name, folder, *([LORA] if adapters else []))
        return made[name, adapters]

    return run_of


def loaded(folder: Path, **more: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, name: str, **more: Any) -> Tensor:
    torch.manual_seed(3)
    arguments = {"num_inference_steps": 4, **ARGUMENTS[name], **more}
    return pipe("a cat", generator=torch.Generator().manual_seed(5), output_type="latent", **arguments)[0]


# ---------------------------------------------------------------- schedulers


@EVERY_PIPELINE
@pytest.mark.parametrize("times", [RCM, even_times(RCM), [1.4]], ids=["rcm", "even", "one"])
def test_a_saved_pipeline_keeps_its_times(name: str, times: list[float], tmp_path: Path) -> None:
    pipe = pipeline(name)
    net = pipe.transformer
    pipe.scheduler = scheduler_for(TrigFlow(net, adapter_of(net)), times).scheduler
    steps, levels = len(times), [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times]
    expected = latents(pipe, name, num_inference_steps=steps)
    pipe.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    torch.testing.assert_close(latents(again, name, num_inference_steps=steps), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.scheduler.sigmas, torch.tensor([*levels, 0.0]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.scheduler.timesteps, 1000 * torch.tensor(levels), rtol=1e-6, atol=0)


def test_even_times_are_near_those_of_rcm() -> None:
    even = even_times(RCM)
    assert max(abs(a - b) for a, b in zip(even, RCM)) < 0.03
    assert even[0] == pytest.approx(math.pi / 2)
    assert even[-1] == pytest.approx(0.6)
    assert even_times([1.5]) == pytest.approx([math.pi / 2])


def test_a_scheduler_of_other_coordinates_refuses_to_be_saved(tmp_path: Path) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    model = diffusers_model(name="DiTTransformer2DModel", config=config)
    with pytest.raises(ValueError, match="does not keep its times"):
        scheduler_for(model, RCM).scheduler.save_pretrained(tmp_path)


# ---------------------------------------------------------------- pipelines and prompts


@pytest.mark.slow
@EVERY_PIPELINE
def test_the_exported_pipeline_makes_what_sample_makes(
    name: str, runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(name)
    size = [f"{key}={json.dumps(value)}" for key, value in ARGUMENTS[name].items()]
    arguments = ["--prompts", "a cat", "a dog", "--call", *size, "--out", str(tmp_path / "prompts"), "--seed", "3"]
    assert main(["sample", str(run), *arguments]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.stem for file in files] == ["0000", "0001"]
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0

    pipe = loaded(tmp_path / "out")
    assert type(pipe.scheduler) is diffusers.FlowMatchLCMScheduler
    for i, (prompt, file) in enumerate(zip(["a cat", "a dog"], files)):
        torch.manual_seed(3 + i)
        generator = torch.Generator().manual_seed(3 + i)
        made = pipe(prompt, generator=generator, num_inference_steps=4, output_type="pil", **ARGUMENTS[name])[0][0]
        frames = made if isinstance(made, list) else [made]
        assert file.suffix == (".webp" if name in ("wan", "ltx") else ".png")
        with Image.open(file) as picture:
            assert getattr(picture, "n_frames", 1) == len(frames)
            for index, frame in enumerate(frames):
                picture.seek(index)
                assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(frame.convert("RGB")))
    assert (pipe.transformer.state_dict().keys()) == load_run(run).student.net.state_dict().keys()
    before = loaded(run.parent / "checkpoint").transformer.state_dict()
    assert any(not torch.equal(before[key], value) for key, value in pipe.transformer.state_dict().items())


@pytest.mark.long
def test_the_code_of_the_card_runs_where_there_is_no_jvpgraph(runs: Callable[..., Path], tmp_path: Path) -> None:
    expected = {}
    for times in ("even", "run"):
        out = export_run(runs("sd3"), tmp_path / times, own_times=times == "run")
        assert json.loads((out / "sampling.json").read_text())["times"]["4"] == RCM
        (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        assert ("trust_remote_code=True" in code) == (times == "run")
        code = code.replace('"a prompt"', '"a prompt", height=16, width=16')
        check = f"import sys; sys.modules['jvpgraph'] = None\n{code}\nprint(pipe.scheduler.timesteps.tolist())"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        expected[times] = json.loads(done.stdout.splitlines()[-1])
    assert expected["even"] == pytest.approx([1000.0, 802.07, 604.15, 406.22], abs=0.01)
    assert expected["run"] == pytest.approx([987.65, 782.73, 609.0, 406.22], abs=0.1)


# ---------------------------------------------------------------- LoRA


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "qwen_image", "ltx", "sana"])
def test_a_lora_file_is_taken_by_the_pipeline(name: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    run = runs(name, adapters=True)
    whole = loaded(export_run(run, tmp_path / "whole"))
    out = export_run(run, tmp_path / "lora", format="lora")
    pipe = loaded(run.parent / "checkpoint")
    pipe.load_lora_weights(out)
    pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_pretrained(out, subfolder="scheduler")
    expected, found = latents(whole, name), latents(pipe, name)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    pipe.disable_lora()
    assert (latents(pipe, name) - expected).abs().max() > 1e-3


@pytest.mark.long
def test_a_lora_of_whole_weights_says_what_it_misses(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("sd3")
    with pytest.raises(ValueError, match="whole weights, not adapters"):
        export_run(run, tmp_path / "none", format="lora")
    assert not (tmp_path / "none").exists()
    errors = []
    for rank in (1, 4, 64):
        out = export_run(run, tmp_path / f"rank-{rank}", format="lora", rank=rank)
        said = re.search(r"misses ([\d.]+)% of what", capsys.readouterr().out)
        assert said is not None
        assert said.group(0) in (out / "README.md").read_text()
        pipe = loaded(run.parent / "checkpoint")
        pipe.load_lora_weights(out)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        left = right = 0.0
        teacher, student = loaded(run.parent / "checkpoint").transformer, load_run(run).student.net
        for key, value in student.state_dict().items():
            left += (value - pipe.transformer.state_dict()[key]).double().square().sum().item()
            right += (value - teacher.state_dict()[key]).double().square().sum().item()
        errors.append(100 * (left / right) ** 0.5)
        assert float(said.group(1)) == pytest.approx(errors[-1], rel=0.01, abs=0.01)
    assert errors[0] > errors[1] > errors[2] > 0  # norms and biases are left out


def test_low_rank_is_exact_where_the_rank_is() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, generator=rng).double(), torch.randn(30, 3, generator=rng).double()
    for rank in (3, 5, 64):
        (found_a, found_b), missed = lora.low_rank(b @ a, rank)
        assert (found_a.shape, found_b.shape) == ((rank, 20), (30, rank))
        torch.testing.assert_close((found_b @ found_a).double(), b @ a, rtol=1e-5, atol=1e-5)
        assert missed < 1e-20
    _, missed = lora.low_rank(b @ a, 1)
    assert missed == pytest.approx(torch.linalg.svdvals(b @ a)[1:].square().sum().item())


# ---------------------------------------------------------------- original names


def narrow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values with one column each: converters cut rows only."""
    rng = torch.Generator().manual_seed(0)
    return {key: torch.randn(len(value), *[1] * (value.dim() - 1), generator=rng) for key, value in state.items()}


WIDE = {"num_attention_heads": 24, "attention_head_dim": 128}  # the converters' own 3072
NETWORKS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", single_file_utils.convert_wan_transformer_to_diffusers, {}),
    "wan, images": (
        "WanTransformer3DModel",
        single_file_utils.convert_wan_transformer_to_diffusers,
        {"image_dim": 1280, "added_kv_proj_dim": 1536, "num_attention_heads": 12},
    ),
    "flux": (
        "FluxTransformer2DModel",
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        {**WIDE, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "sd3": ("SD3Transformer2DModel", single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers, {}),
    "sd3.5 medium": (
        "SD3Transformer2DModel",
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
        {},
    ),
    "qwen_image": ("QwenImageTransformer2DModel", dict, {}),
    "mochi": (
        "MochiTransformer3DModel",
        single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers,
        {"num_layers": 48, "num_attention_heads": 2, "attention_head_dim": 8},  # the converter's own depth
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        {"num_single_layers": 2, "num_attention_heads": 2},
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        {"num_layers": None, "n_layers": 2, "n_refiner_layers": 2},
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
        {"num_single_layers": 2},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers,
        {"num_single_layers": 2},
    ),
}
PUBLISHED = {  # what diffusers knows a published file by
    "wan": "wan",
    "wan, images": "wan",
    "flux": "flux",
    "sd3": "sd3",
    "sd3.5 medium": "sd3",
    "ltx": "ltx-video",
    "hunyuan_video": "hunyuan-video",
    "chroma": "chroma",
    "mochi": "mochi-1-preview",
    "flux2": "flux2",
    "z_image": "z-image-turbo",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_original_names_are_what_the_converters_of_diffusers_read(name: str) -> None:
    cls, convert, config = NETWORKS[name]
    config = {name: value for name, value in {"num_layers": 2, **config}.items() if value is not None}
    with torch.device("meta"):
        net = getattr(diffusers, cls)(**config)
    state = narrow(net.state_dict())
    original = keys.to_original(state, cls, net.config)
    again = convert(dict(original))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    if name in PUBLISHED:
        known = single_file_utils.CHECKPOINT_KEY_NAMES[PUBLISHED[name]]
        known = [known] if isinstance(known, str) else known
        assert original.keys() & {key.removeprefix("model.diffusion_model.") for key in known}


def test_unknown_networks_and_weights_are_named() -> None:
    with pytest.raises(ValueError, match="not known for SanaTransformer2DModel, but for Wan"):
        keys.to_original({}, "SanaTransformer2DModel", {})
    with pytest.raises(ValueError, match=r"weights without an original name: a\.b"):
        keys.to_original({"a.b": torch.zeros(1)}, "WanTransformer3DModel", {})
    few = {f"single_transformer_blocks.0.attn.to_{x}.weight": torch.zeros(1) for x in "qkv"}
    with pytest.raises(ValueError, match=r"the network lacks single_transformer_blocks\.#\.proj_mlp"):
        keys.to_original(few, "FluxTransformer2DModel", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "sd3", "ltx", "qwen_image"])
def test_a_single_file_is_a_student_and_a_teacher(name: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    run = runs(name)
    out = export_run(run, tmp_path / "out", format="comfyui")
    teacher = diffusers_model(out / "run.safetensors")
    expected = load_run(run).student.net.state_dict()
    assert expected.keys() == teacher.net.state_dict().keys()
    assert all(torch.equal(teacher.net.state_dict()[key], value) for key, value in expected.items())
    again = diffusers_model(out / "run.safetensors", config=str(run.parent / "checkpoint"))
    assert again.net.config["num_layers"] == teacher.net.config["num_layers"]
    assert "sigmas by hand: `1.0000" in (out / "README.md").read_text()
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json of a diffusers network for it"):
        diffusers_model(out / "run.safetensors")


# ---------------------------------------------------------------- a network of one's own, conditions


OWN = """
import torch
from torch import nn
from jvpgraph.trainer.trigflow import TrigFlow


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64 + 1, width), nn.SiLU(), nn.Linear(width, 64))

    def forward(self, x, s, labels):
        return self.layers(torch.cat([x.flatten(1), s[:, None]], dim=1)).unflatten(1, (1, 8, 8))


def teacher(width):
    return TrigFlow(Net(width))
"""


@pytest.mark.long
def test_a_network_of_ones_own_comes_back_by_the_code_of_its_card(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(OWN)
    config = {
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"load": f"{tmp_path}/my_model.py:teacher", "options": {"width": 8}},
        "student": {"backend": "eager"},
        "stages": [{"objective": {"name": "dcm"}, "steps": 1, "batch": 2, "student": {"lr": 1e-2}}],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    run = train(settings.load(RunConfig, tmp_path / "run.yaml"))
    (run / "evaluation.json").write_text(
        json.dumps({"step": 1, "seeds": [0, 1], "samplers": {"student": [{"frechet": 1.0}, {"frechet": 2.0}]}})
    )
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    names = {"README.md", "config.yaml", "model.safetensors", "my_model.py", "sampling.json"}
    assert {file.name for file in out.iterdir()} == names
    assert settings.load(RunConfig, out / "config.yaml").stages[0].steps == 1
    card = (out / "README.md").read_text()
    assert "| student | 1.5 |" in card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    check = f"{code}\nfrom safetensors.torch import save_file\nsave_file(dict(model.net.state_dict()), 'again')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = load_run(run).student.net.state_dict()
    again = load_file(out / "again")
    assert expected.keys() == again.keys()
    assert all(torch.equal(again[key], value) for key, value in expected.items())
    torch.manual_seed(5)  # the run's own seed decides what a network that it initialised itself starts from
    again = load_run(run).teacher.net.state_dict()
    assert all(torch.equal(again[key], value) for key, value in load_run(run).teacher.net.state_dict().items())
    with pytest.raises(ValueError, match="is no network of diffusers"):
        export_run(run, tmp_path / "lora", format="lora", rank=1)
    with pytest.raises(ValueError, match="not known for Net"):
        export_run(run, tmp_path / "comfyui", format="comfyui")


@pytest.mark.long
def test_a_constant_condition_is_in_the_settings_and_in_the_card(tmp_path: Path) -> None:
    make("FluxPipeline", guidance_embeds=True).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="needs the conditions guidance"):
        trained("flux", tmp_path)
    run = trained("flux", tmp_path, "conditions.guidance=3.5", "stages.0.objective.name=scm")
    out = export_run(run, tmp_path / "out")
    assert "guidance_scale=3.5, true_cfg_scale=1.0)[0]" in (out / "README.md").read_text()
    student, sample = load_run(run).student, Noise(LATENTS["flux"], CONDITIONS["flux"])[0]
    cond = {name: value[None] for name, value in sample.cond.items()}
    t = torch.tensor([1.0])
    found = student(sample.x0[None], t, cond)
    assert torch.equal(found, student(sample.x0[None], t, cond | {"guidance": torch.tensor([3.5])}))
    assert not torch.equal(found, student(sample.x0[None], t, cond | {"guidance": torch.tensor([1.0])}))

    of_data = replace(
        load_run(run).config,
        conditions={},
        data=DataConfig(Plug("jvpgraph.trainer.prepare:prepared", {"path": "data", "guidance": 7.0})),
        sampling=SamplingConfig(call={"height": 64, "guidance_scale": 3.5}),  # the card's
    )
    told = Task(replace(load_run(run), config=of_data), run, tmp_path / "checkpoint").arguments()
    assert (told["guidance_scale"], told["height"]) == (7.0, 64)


# ---------------------------------------------------------------- refusals


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_and_leaves_nothing(runs: Callable[..., Path], tmp_path: Path) -> None:
    run, out = runs("sd3"), tmp_path / "out"
    for pipeline, said in {
        tmp_path: "has no model_index.json",
        runs("sana").parent / "checkpoint": "has a SanaTransformer2DModel, and the student is a SD3Transformer2DModel",
    }.items():
        with pytest.raises(ValueError, match=said):
            export_run(run, out, pipeline=pipeline)
        with pytest.raises(ValueError, match=said):
            sample_prompts(run, ["a cat"], pipeline=pipeline, out=out)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"does not take these arguments.*wide"):
        sample_prompts(run, ["a cat"], out=out, more={"wide": 3})
    (out / "something").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty"):
        export_run(run, out)
