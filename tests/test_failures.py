"""What is said when something fails: what, where and what to do, and no traceback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jvpgraph.trainer import cli
from jvpgraph.trainer.commands.failures import explain, explain_other
from jvpgraph.trainer.model.adapters import diffusers_model
from tests.test_wan_run import WAN

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_folder")


@pytest.fixture
def failure(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must fail; returns its lines: what, and what to do."""

    def call(*argv: str, status: int = 1) -> str:
        capfd.readouterr()
        assert cli.main(argv) == status
        said = capfd.readouterr().err
        assert "Traceback" not in said
        assert not Path("run").exists()
        return said

    return call


CHECKPOINTS = {
    "cut config": (lambda p: os.truncate(p / "config.json", 40), "net/config.json is damaged, or no JSON"),
    "no config": (lambda p: (p / "config.json").unlink(), "net holds no config.json of a diffusers network"),
    "lacks tensors": (lambda p: without(p, "blocks.0.attn1.to_q.weight"), "blocks.0.attn1.to_q.weight is missing"),
    "cut weights": (lambda p: os.truncate(weights(p), 4000), "net) raised "),
    "gone": (lambda p: shutil.rmtree(p), "model.options.path: net does not exist"),
}


def weights(path: Path) -> Path:
    return path / "diffusion_pytorch_model.safetensors"


def without(path: Path, name: str) -> None:
    tensors = load_file(weights(path))
    del tensors[name]
    save_file(tensors, weights(path), metadata={"format": "pt"})


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore")  # diffusers' own, of what it then does anyway
def test_a_teacher_that_cannot_be_read(failure: Any, kind: str) -> None:
    harm, words = CHECKPOINTS[kind]
    diffusers.WanTransformer3DModel(**WAN).save_pretrained("net")
    harm(Path("net"))
    said = failure(
        "train", "tiny.yaml", "model={load: 'jvpgraph.trainer.adapters:diffusers_model', options: {path: net}}"
    )
    assert words in said


def test_a_name_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"hf download some/model --local-dir FOLDER, and then path: FOLDER"):
        diffusers_model("some/model")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def teacher(:\n", "SyntaxError: invalid syntax"),
        ("import json\nx = json.loads('{')\n", "my_model.py:2 in <module>)"),
        ("def teacher():\n    return {}['width']\n", "KeyError: 'width' ("),
        ("import nowhere_at_all\n", "No module named 'nowhere_at_all'"),
        (
            "def teacher():\n    import torch\n    return torch.nn.Linear(2, 3)(torch.ones(5))\n",
            "my_model.py:3 in teacher",
        ),
    ],
)
def test_a_file_of_the_users_that_raises(failure: Any, code: str, words: str) -> None:
    Path("my_model.py").write_text(code)
    said = failure("train", "tiny.yaml", "model={load: my_model.py:teacher}")
    assert "my_model.py" in said
    assert words in said
    assert "Mend" in said


OBJECTIVE = """
from dataclasses import dataclass
from typing import ClassVar
from jvpgraph.trainer.objectives import Objective, objective

@dataclass(frozen=True)
class Wrong(Objective):
    '''It raises.'''

    name: ClassVar[str] = "wrong_NUMBER"

@objective
def wrong_loss(student, teacher, batch, rng, config: Wrong, *, iteration, fake):
    return {"loss": batch.cond["no such"]}
"""


def test_an_objective_of_the_users_that_raises(capfd: pytest.CaptureFixture[str]) -> None:
    Path("my_objective.py").write_text(OBJECTIVE)
    argv = ["train", "tiny.yaml", "imports=[my_objective.py]", "stages.0.objective=wrong_NUMBER"]
    assert cli.main(argv) == 1
    said = capfd.readouterr().err
    assert "jvpgraph train: KeyError: 'no such' (" in said
    assert "my_objective.py:14 in wrong_loss)\nMend it" in said
    assert "Traceback" not in said
    with pytest.raises(KeyError):
        cli.main([*argv, "--traceback"])


def test_a_label_that_is_met_later(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = torch.zeros(2000, dtype=torch.int64)
    labels[rng.permutation(2000)[:900]] = 99
    labels[[round(i * 1999 / 31) for i in range(32)]] = 0  # which are looked at
    save_file({"x": torch.from_numpy(rng.standard_normal((2000, 1, 8, 8), np.float32)), "l": labels}, "d.safetensors")
    options = "{path: ., latents: x, conditions: {l: labels}}"
    source = f"{{load: 'jvpgraph.trainer.data.shards:safetensors_folder', options: {options}}}"
    assert cli.main(["train", "tiny.yaml", f"data.source={source}"]) == 1
    said = capfd.readouterr().err
    assert "student, step 1: a label that the network does not know: sample d/" in said
    assert "99" in said
    assert "Traceback" not in said


def test_a_full_disk_in_the_words_of_safetensors() -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    said = explain(error, "export", Path("net"))
    assert said == "the disk is full (net): No space left on device\nFree some space and try again."
    assert explain(SafetensorError("header too large"), "export", Path("net")) == "header too large"


def test_what_is_lost_with_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2\nand so on")
    assert explain_other(error, "train") is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = explain_other(error, "train")
    assert said is not None
    assert said.startswith("another process of this run is gone or hangs ([gloo/transport/tcp/pair.cc:547] Connection")
    assert "and so on" not in said
    assert said.endswith("The same command resumes from the last checkpoint.")
    assert explain_other(RuntimeError("a bug"), "train") is None
