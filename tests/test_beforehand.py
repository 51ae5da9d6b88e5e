"""What is found before the first step, before a folder is made and before --fresh moves one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.config import RunConfig
from tests.test_cli import SHARDS

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT_MODEL = """
from torch import nn
from jvpgraph.trainer.trigflow import TrigFlow

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.text = nn.Linear(64, 64), nn.Linear(3, 64)

    def forward(self, x, s, text):
        return (self.lin(x.flatten(1)) + self.text(text).mean(1) + s[:, None]).view_as(x)

def teacher():
    return TrigFlow(Net())
"""
TEXTS = [SHARDS[0], SHARDS[1].replace("{cls: labels}", "{text.npy: text}"), "model={load: net.py:teacher}"]


@pytest.fixture(autouse=True)
def net(tiny_folder: Path) -> None:
    (tiny_folder / "net.py").write_text(TEXT_MODEL)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Any:
    """Calls `train --fresh` over a run, which has to stay as it is."""
    Path("run").mkdir()
    Path("run/config.yaml").write_text("the old run")

    def call(*more: str, status: int = 1) -> str:
        capfd.readouterr()
        assert cli.main(["train", "tiny.yaml", "--fresh", *more]) == status
        assert [str(path) for path in Path().glob("run*/**/*") if path.is_file()] == ["run/config.yaml"]
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return said

    return call


def write_texts(texts: list[np.ndarray], *, times: float = 1.0) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open("data-0.tar", "w") as tar:
        for i, text in enumerate(texts):
            x = times * rng.standard_normal((1, 8, 8)).astype(np.float32)
            for name, value in (("x.npy", x), ("text.npy", text)):
                content = io.BytesIO()
                np.save(content, value)
                entry = tarfile.TarInfo(f"{i:04}.{name}")
                entry.size = len(content.getvalue())
                tar.addfile(entry, io.BytesIO(content.getvalue()))


def text(tokens: int = 4) -> np.ndarray:
    return np.ones((tokens, 3), np.float32)


def test_a_batch_of_a_later_stage_is_larger_than_the_data(refused: Any) -> None:
    write_texts([text()] * 12)
    two = "stages=[{objective: dcm, steps: 1, batch: 4}, {objective: dcm, steps: 1, batch: 13}]"
    assert "stages.1.batch is 13, and the data set has 12 samples" in refused(*TEXTS, two)


def test_prompts_that_do_not_fit_together(refused: Any) -> None:
    write_texts([text()] * 7 + [text(6)])
    said = refused(*TEXTS)
    assert "condition 'text' differs within a batch: [4, 3] float32 (0000, 0001" in said
    assert "[6, 3] float32 (0007)" in said
    assert "Pad it to one shape" in said
    write_texts([text(0)] * 8)
    assert "sample 0000: text is empty, [0, 3]: a prompt of 0 tokens?" in refused(*TEXTS)


def test_conditions_that_are_not_finite(refused: Any) -> None:
    """As a shard they are bad, and can be skipped; of another data set they are named."""
    write_texts([text()] * 7 + [np.full((4, 3), np.nan, np.float32)])
    said = refused(*TEXTS)
    assert "key 0007: text.npy: 12 of 12 values are NaN or infinite" in said
    assert "on_bad_shard=skip" in said
    assert cli.main(["train", "tiny.yaml", *TEXTS, "out=other", "data.source.options.on_bad_shard=skip"]) == 0


def nan_labels() -> Any:
    from jvpgraph.trainer.data.digits import digits

    data = digits()
    data.x0[0, 0, 0, :3] = torch.nan
    return data


def test_data_of_ones_own_that_is_not_finite(refused: Any) -> None:
    said = refused("data.source={load: 'tests.test_beforehand:nan_labels'}")
    assert "sample digits/0: x0: 3 of 64 values are NaN or infinite" in said


def test_missing_files_all_at_once(refused: Any) -> None:
    said = refused(
        "model.options={path: nowhere}",
        "guidance={scale: 2.0, negative_file: none.safetensors}",
        SHARDS[0],
        SHARDS[1].replace("data-*", "gone"),
        "sampling.decode={load: 'decoder.py:decode'}",
    )
    assert "4 problems before the first step" in said
    for missing in (
        "model.options.path: nowhere does not exist",
        "guidance.negative_file: none.safetensors does not exist",
        "gone.tar",
        "decoder.py: no such file",
    ):
        assert missing in said


def test_labels_out_of_range(refused: Any) -> None:
    said = refused("model.options={width: 16, depth: 1, heads: 2, classes: 7}")
    assert "the teacher cannot run with sample digits/" in said
    assert "labels [9]" in said


@pytest.mark.parametrize("content", ["torch.save", "lacks"])
def test_a_negative_file_of_another_format(refused: Any, content: str) -> None:
    if content == "torch.save":
        torch.save({"labels": torch.tensor(10)}, "negative.safetensors")
        words = "negative.safetensors is no safetensors file"
    else:
        save_file({"label": torch.tensor(10)}, "negative.safetensors")
        words = "give the same names in guidance.negative"
    assert words in refused("guidance={scale: 2.0, negative_file: negative.safetensors}")


@pytest.mark.parametrize("channels", [1, 2])
def test_latents_of_another_scale_are_measured(caplog: pytest.LogCaptureFixture, channels: int) -> None:
    """The shift and scale that the warning names silence it."""
    rng = np.random.default_rng(0)
    spread = np.array([100.0, 3.0])[:channels, None, None]
    x = (7 + spread * rng.standard_normal((16, channels, 8, 8))).astype(np.float32)
    save_file({"x": torch.from_numpy(x), "label": torch.arange(16) % 10}, "data.safetensors")
    Path("net.py").write_text(
        TEXT_MODEL.replace("64", str(64 * channels))
        .replace("text):", "labels):")
        .replace(" + self.text(text).mean(1)", "")
    )
    data = [
        "data.source.load=jvpgraph.trainer.data.shards:safetensors_folder",
        "data.source.options={path: ., latents: x, conditions: {label: labels}, scale: 2.0}",
        *("model={load: net.py:teacher}", "stages.0.steps=1"),
    ]
    assert cli.main(["train", "tiny.yaml", *data]) == 0
    (said,) = [r.getMessage() for r in caplog.records if "deviation" in r.getMessage()]
    options = said.partition("about 0 and 1: ")[2].removesuffix(" would be right").split()
    assert len(options) == 2
    caplog.clear()
    assert cli.main(["train", "tiny.yaml", *data, *options, "out=right"]) == 0
    assert not [r for r in caplog.records if "deviation" in r.getMessage()]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stages.0.objective={name: rcm, weight: -1}", "weight is -1.0 and must be 0 or above"),
        ("stages.0.objective={name: rcm, weight: .inf}", "weight is inf and must be 0 or above"),
        ("stages.0.objective={name: scm, times: {name: log_normal, std: -1}}", "std is -1.0 and must be above 0"),
        ("stages.0.objective={name: scm, tangent_warmup: -1}", "tangent_warmup is -1 and must be 0 or above"),
        ("stages.0.objective={name: dmd, simulation_steps: 0}", "simulation_steps is 0 and must be above 0"),
        ("stages.0.objective={name: dmd, times: {name: shifted_uniform, shift: 0}}", "shift is 0.0 and must be"),
        ("stages.0.objective={name: dcm, teacher_steps: 0}", "teacher_steps is 0 and must be above 0"),
        ("stages.0.objective={name: mean_flow, instant_share: 2}", "instant_share is 2.0 and must be in [0, 1]"),
        ("stages.0.student.warmup=-5", "warmup is -5 and must be 0 or above"),
        ("stages.0.student.weight_decay=-1", "weight_decay is -1.0 and must be 0 or above"),
        ("sampling.middle_times=[0.6, 1.0]", "middle_times are [0.6, 1.0]: radians that fall"),
        ("sampling.middle_times=[1.0, -0.6]", "radians that fall"),
        ("sampling.middle_times=[1.6, 1.0]", "below atan(sigma_max) = 1.558"),
        ("guidance.scale=0", "scale is 0.0 and must be above 0"),
        ("student.lora={rank: 0}", "rank is 0 and must be above 0"),
        ("data.workers=-1", "workers is -1 and must be 0 or above"),
        ("seed=-1", "seed is -1 and must be 0 or above"),
    ],
)
def test_numbers_out_of_range(setting: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        settings.load(RunConfig, Path("tiny.yaml"), [setting])
    assert words in str(error.value)


def test_a_scale_of_zero(refused: Any) -> None:
    write_texts([text()] * 8)
    said = refused(TEXTS[0], TEXTS[1].replace("latents: x.npy", "latents: x.npy, scale: 0"), TEXTS[2])
    assert "scale is 0 and shift 0.0" in said


def test_a_condition_of_all_samples_that_the_samples_have(refused: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Theirs would count, and nobody would be told."""
    told = "conditions.labels: the data's samples have a labels of their own"
    assert told in refused("conditions={labels: 3}")
    assert cli.main(["plan", "tiny.yaml", "conditions={labels: 3}"]) == 1
    assert told in capfd.readouterr().err


DECODERS = """
import torch

def none():
    return 3

def channels():
    return lambda latents: torch.zeros(len(latents), 2, 8, 8)

def nan():
    return lambda latents: latents / 0 * 0

def fails():
    return lambda latents: 1 / 0
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "decoders.py:none gave no function\nIt has to return one"),
        ("channels", "gave [1, 2, 8, 8] for latents [1, 1, 8, 8]\nIt has to give pictures [1, 1 or 3, (T,) H, W]"),
        ("nan", "gave NaN for a sample of the data\nHave it decode in float32"),
        ("fails", "decoders.py:14 in <lambda>)\nMend it; --traceback"),
    ],
)
def test_a_decoder_that_previews_could_not_use(refused: Any, name: str, words: str) -> None:
    Path("decoders.py").write_text(DECODERS)
    told = refused("log.preview_every=4", f"sampling.decode={{load: decoders.py:{name}}}")
    assert "sampling.decode: " in told
    assert words in told


ODD_DATA = """
import torch
from jvpgraph.trainer.data.sample import Sample

class Odd:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        x0 = torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(index))
        return Sample(str(index), x0, {"labels": torch.tensor(index % 10)})

def odd():
    return Odd()
"""
ODD_NET = """
from torch import nn
from jvpgraph.trainer.trigflow import TrigFlow

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, s, labels):
        return self.conv(x)

def teacher():
    return TrigFlow(Net())
"""


def test_a_length_of_tokens_that_the_latents_do_not_have(refused: Any) -> None:
    """Of 2 x 2 numbers each, for latents of 8 x 7."""
    Path("odd.py").write_text(ODD_DATA)
    Path("net.py").write_text(ODD_NET)
    guidance = "guidance={scale: 2.0, negative: {labels: 10}, keep_norm: token}"
    settings = ["data.source={load: odd.py:odd}", "model={load: net.py:teacher}", guidance]
    assert "guidance.keep_norm=token is not for such latents: set it to null (x0 [1, 1, 8, 7]" in refused(*settings)
