"""`jvpgraph diagnose RUN`, and what a run says of its tangents when one is not finite."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import jvpgraph
from jvpgraph.trainer import cli
from jvpgraph.trainer.run import diagnosis
from jvpgraph.trainer.run.finished import load_run
from tests.tiny_runs import TINY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NETWORK = {"load": "jvpgraph.trainer.dit:dit", "options": {"width": 16, "depth": 1, "heads": 2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bfloat16 along tangents."""
    folder = tmp_path_factory.mktemp("whole")
    stage = {**TINY["stages"][0], "steps": 2, "objective": {"name": "scm"}}
    student = {"backend": "eager", "dtype": "bfloat16"}
    (folder / "tiny.yaml").write_text(json.dumps({**TINY, "model": NETWORK, "student": student, "stages": [stage]}))
    assert cli.main(["train", str(folder / "tiny.yaml"), f"out={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(whole / "tiny.yaml", "tiny.yaml")
    shutil.copytree(whole / "run", "run")
    return tmp_path


@pytest.mark.long
def test_it_writes_beside_the_curves(folder, capsys):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert cli.main(["diagnose", "run", "--times", "0.1", "1.5"]) == 0
    said = capsys.readouterr().out
    assert "TrigFlow in bfloat16, tangents in float32, against float64 (step 2 of run)" in said
    assert "t = 0.1 " in said
    assert "central differences in bfloat16" in said
    assert said.endswith("run/diagnosis.json\nrun/diagnosis.png\n")
    found = jvpgraph.Diagnosis.load("run/diagnosis.json")
    assert str(found) in said
    assert [output.time for output in found.outputs] == [0.1, 1.5]
    assert {op.precision for op in found.ops if op.active} == {"float32"}
    assert any(op.module.startswith("net.blocks.0") for op in found.ops)
    assert all(math.isfinite(output.tangent[""]) for output in found.outputs)
    with Image.open("run/diagnosis.png") as picture:
        assert picture.size[0] > 1000
    new = {"run/diagnosis.json", "run/diagnosis.png"}
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and str(path) not in new}
    assert after == before


def test_options(folder, capsys):
    argv = ["diagnose", "run", "--times", "0.7", "--count", "3", "--reference", "float32", "--no-differences"]
    assert cli.main([*argv, "--out", "here/there"]) == 0
    assert "against float32" in capsys.readouterr().out
    found = jvpgraph.Diagnosis.load("here/there/diagnosis.json")
    assert not found.differences
    assert next(op for op in found.ops if op.kind == "attention").shape[0] == 3
    assert not Path("run/diagnosis.json").exists()
    again = diagnosis.diagnose_run(Path("run"), times=(0.7,), count=3, steps=(), reference="float32")
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize(
    ("argv", "what", "do"),
    [
        (["nowhere"], "nowhere/config.yaml does not exist", "the folder of a run"),
        (["run", "--times", "0", "2"], "--times: 0, 2", "Times are in radians, between 0 (data) and 1.5708"),
        (["run", "--ema", "0.7"], "sigma_rel is 0.7", "the width of an average lies in"),
        (["run", "--out", "tiny.yaml"], "tiny.yaml", "Look whether the path is right"),
    ],
)
def test_what_goes_wrong_is_said(folder, capsys, argv, what, do):
    assert cli.main(["diagnose", *argv]) == 1
    said = capsys.readouterr().err
    assert said.startswith("jvpgraph diagnose: ")
    assert what in said
    assert do in said
    assert not Path("run/diagnosis.json").exists()


def test_a_run_without_checkpoints(folder, capsys):
    shutil.rmtree("run/checkpoints")
    assert cli.main(["diagnose", "run"]) == 1
    assert "holds no complete checkpoint: wait until the run has one" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("known", ["diagnosis", "damaged"])
def test_a_tangent_that_is_not_finite(folder, capsys, monkeypatch, known):
    """The run stops, names the module, and shows the last diagnosis if there is one."""
    if known == "diagnosis":
        assert cli.main(["diagnose", "run", "--times", "1.0", "--no-differences"]) == 0
    else:
        Path("run/diagnosis.json").write_text('{"format": 1, "model"')
    capsys.readouterr()
    original = torch.nn.LayerNorm.forward

    def forward(self, x):
        return original(self, x) + torch.sqrt(torch.relu(x - x))  # of slope infinite

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", forward)
    assert cli.main(["train", "tiny.yaml", "stages.0.steps=3", "--change", "stages"]) == 1
    said = capsys.readouterr().err
    assert "began in" in said
    assert "tangent" in said
    if known == "diagnosis":
        assert "The last diagnosis, step 2 of run: tangents off by up to" in said
        assert said.count("in net.") >= 1
    else:
        assert "`jvpgraph diagnose run` says which ops lose the tangent's digits" in said


@pytest.mark.long
def test_looks_while_it_trains(folder, caplog):
    """What is trained is the same to the bit."""
    looks = ["precision.probe_every=2", "precision.probe_limit=1e-9", "stages.0.steps=3"]
    assert cli.main(["train", "tiny.yaml", "out=plain", "stages.0.steps=3"]) == 0
    assert cli.main(["train", "tiny.yaml", "out=looked", *looks]) == 0
    said = caplog.text
    assert "step 2: tangents are off by up to" in said
    assert " in net." in said
    lines = [json.loads(line) for line in Path("looked/log.jsonl").read_text().splitlines()]
    found = {line["step"]: {name for name in line if "t=0.8" in name} for line in lines}
    assert found == {1: set(), 2: {"tangent_error/t=0.8", "tangent_growth/t=0.8"}, 3: set()}
    assert jvpgraph.Diagnosis.load("looked/diagnosis.json").about == "step 2 of looked"
    states = [load_run(Path(name)).student.state_dict() for name in ("plain", "looked")]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
