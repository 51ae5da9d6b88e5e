"""What may change between a stop and going on, what is recorded of it, and what a student may start from."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jvpgraph.trainer import cli
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.dit import dit
from jvpgraph.trainer.model.ema import PowerEMA
from jvpgraph.trainer.run.changes import ASKED, FREE, NEVER, RULES, check_changes, rule, table
from jvpgraph.trainer.run.checkpoint import Checkpoints
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.settings import from_dict, load
from jvpgraph.trainer.train import RandomState
from tests.test_cli import SHARDS, checkpoints, write_shard

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_folder")

MODEL = """
import torch
from torch import nn
from jvpgraph.trainer.trigflow import TrigFlow

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(64 + 1, 64)

    def forward(self, x, s, labels):
        return self.lin(torch.cat([x.flatten(1), s[:, None]], dim=1)).unflatten(1, (1, 8, 8))

def teacher(path=None):
    net = Net()
    if path:
        net.load_state_dict(torch.load(path))
    return TrigFlow(net)
"""


def terms_of(*objectives: Any) -> dict[str, Any]:
    return {"name": "terms", "terms": [{"objective": each} for each in objectives]}


def trained(*more: str) -> int:
    return cli.main(["train", "tiny.yaml", *more])


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Any:
    """Calls train, which must fail with status 1; returns what it said and the --change options it advises."""

    def call(*more: str) -> tuple[str, list[str]]:
        capfd.readouterr()
        assert trained(*more) == 1
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return said, [word for key in re.findall(r"--change (\S+?)[;.]?(?=\s)", said) for word in ("--change", key)]

    return call


def changed(run: str = "run") -> list[Any]:
    lines = [json.loads(line) for line in Path(run, "changes.jsonl").read_text().splitlines()]
    return [[line["step"], line["changes"]] for line in lines]


def test_every_setting_has_a_rule() -> None:
    for f in fields(RunConfig):
        assert rule(f.name) in (FREE, ASKED, NEVER)
    assert rule("data.source.options.on_bad_shard") == FREE
    assert rule("data.source.options.urls") == ASKED
    assert rule("stages.0.objective.weight") == ASKED
    assert rule("stages.10.objective.name") == NEVER
    assert rule("stages.0.objective.terms.2") == NEVER  # one more or one less
    assert rule("stages.0.objective.terms.2.weight") == ASKED
    assert rule("stages.0.objective.terms.2.objective.times.mean") == ASKED
    assert rule("ema.sigma_rel") == NEVER
    documented = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    for key, answer in RULES.items():
        assert key in table()
        if answer != NEVER and "*" not in key and key not in ("student.compile", "student.checkpoint_blocks"):
            assert f"`{key}`" in documented or key == "data.source", key


PHASE: dict[str, Any] = {"name": "dmd", "start": 1.2}
CRITIC: dict[str, Any] = {"name": "adversarial", "width": 8}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"name": "rcm", "weight": 0.1}, {"name": "rcm", "weight": 0.0}),
        (PHASE, {**PHASE, "earlier": "high"}),
        (CRITIC, {**CRITIC, "width": 16}),
        (CRITIC, {**CRITIC, "blocks": [0]}),
        (terms_of(CRITIC, PHASE), terms_of({**CRITIC, "features": "fake_score"}, PHASE)),
        (terms_of({"name": "rcm"}, CRITIC), terms_of({"name": "rcm", "weight": 0.0}, CRITIC)),
    ],
    ids=["fake score", "expert", "heads", "blocks", "whose features", "fake score of a term"],
)
def test_what_a_checkpoint_holds_neither_comes_nor_goes(old: Any, new: Any) -> None:
    """Only in stages that have not begun."""

    def config(first: Any, last: Any) -> RunConfig:
        stages = [{"objective": each, "steps": 2} for each in (first, last)]
        return from_dict(RunConfig, {"out": "run", "model": {"load": "a:b"}, "stages": stages})

    for a, b in ((old, new), (new, old)):
        with pytest.raises(ValueError, match="cannot change within a run"):
            check_changes(config(a, "scm"), config(b, "scm"), ["stages"], 1)
        with pytest.raises(ValueError, match="cannot change within a run"):
            check_changes(config("scm", a), config("scm", b), ["stages"], 3)
        assert check_changes(config("scm", a), config("scm", b), ["stages"], 2)
    assert check_changes(config("scm", "dcm"), config("scm", old), ["stages"], 2)
    with pytest.raises(ValueError, match=r"Add --change stages\.1\.objective to go on"):
        check_changes(config("scm", "dcm"), config("scm", old), [], 2)


@pytest.mark.long
def test_a_stage_that_has_not_begun_may_be_another() -> None:
    def stages(last: str) -> str:
        return f"stages=[{{objective: scm, steps: 2, batch: 4}}, {{objective: {last}, steps: 2, batch: 4}}]"

    assert trained(stages("dcm")) == 0
    for name in checkpoints()[checkpoints().index("step-00000002") + 1 :]:
        shutil.rmtree(Path("run/checkpoints") / name)
    assert trained(stages("rcm"), "--change", "stages.1.objective") == 0
    [(step, (line,))] = changed()
    assert step == 2
    assert line.startswith("stages.1.objective: {name: dcm")


@pytest.mark.long
def test_a_lower_learning_rate_and_what_cannot_change(refused: Any) -> None:
    assert trained("stages.0.steps=2") == 0
    more = ["stages.0.student.lr=5e-4", "student.backend=op_by_op", "log.every=2"]
    said, options = refused(*more)
    assert "stages.0.student.lr: 0.001 -> 0.0005" in said
    assert options == ["--change", "stages.0.student.lr"]
    assert trained(*more, *options) == 0
    assert trained(*more, *options) == 0  # the same command again
    assert changed() == [[2, ["stages.0.student.lr: 0.001 -> 0.0005"]]]
    assert "0.0005 -> 0.001" in refused()[0]
    said, options = refused(*more, "seed=4", "--change", "seed")
    assert "seed: 0 -> 4 (cannot change within a run)" in said
    assert "--from run" in said
    assert not options
    assert "cannot change within a run" in refused("stages.0.objective=scm", "--change", "stages")[0]
    assert "cannot change within a run" in refused(*more, "stages.0.steps=3", "--change", "stages")[0]
    assert trained(*more, "seed=4", "out=other", "--from", "run") == 0


def test_settings_edited_by_hand_are_changes_too(refused: Any) -> None:
    assert trained("stages.0.steps=1") == 0
    file = Path("run/config.yaml")
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 0.0007"))
    capture, options = refused_of(refused, "run/config.yaml")
    assert "stages.0.student.lr: 0.001 -> 0.0007" in capture
    assert cli.main(["train", "run/config.yaml", *options]) == 0
    assert changed() == [[1, ["stages.0.student.lr: 0.001 -> 0.0007"]]]


def refused_of(refused: Any, file: str) -> tuple[str, list[str]]:
    shutil.copy(file, "tiny.yaml")
    return refused()


@pytest.mark.slow
def test_a_teacher_that_moved_or_is_another_one(refused: Any) -> None:
    Path("my_model.py").write_text(MODEL)
    torch.manual_seed(1)
    torch.save(torch.nn.ModuleDict({"lin": torch.nn.Linear(65, 64)}).state_dict(), "a.pt")
    torch.save(torch.nn.ModuleDict({"lin": torch.nn.Linear(65, 64)}).state_dict(), "b.pt")
    model = ["model={load: my_model.py:teacher, options: {path: a.pt}}"]
    assert trained(*model, "stages.0.steps=1") == 0

    Path("a.pt").rename("moved.pt")
    moved = ["model={load: my_model.py:teacher, options: {path: moved.pt}}"]
    said, options = refused(*moved)
    assert "model.options.path: a.pt -> moved.pt" in said
    assert trained(*moved, *options, "stages.0.steps=2") == 0
    assert changed() == [[1, ["model.options.path: a.pt -> moved.pt"]]]

    Path("moved.pt").rename("a.pt")
    shutil.copy("b.pt", "moved.pt")  # in the same place, another one
    said, options = refused(*moved, "stages.0.steps=3")
    assert "model: the teacher's weights are others" in said
    assert "Put the old ones back" in said
    before = sorted(checkpoints())
    shutil.copy("a.pt", "moved.pt")
    assert trained(*moved, "stages.0.steps=2") == 0
    assert checkpoints() == before
    shutil.copy("b.pt", "moved.pt")
    assert trained(*moved, *options, "stages.0.steps=3") == 0

    Path("my_model.py").write_text(MODEL.replace("64)\n\n", "64)\n        self.scale = 2\n\n"))
    said, options = refused(*moved, "stages.0.steps=4")
    assert "model: the file that it names was edited" in said
    assert trained(*moved, *options, "stages.0.steps=4") == 0
    assert len(changed()) == 3


@pytest.mark.slow
def test_shards_that_moved_or_were_replaced(refused: Any, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(2):
        write_shard(Path(f"data-{i}.tar"), 8)
    assert trained(*SHARDS, "stages.0.steps=1") == 0
    Path("there").mkdir()
    for i in range(2):
        Path(f"data-{i}.tar").rename(f"there/data-{i}.tar")
    moved = [SHARDS[0], SHARDS[1].replace("data-*", "there/data-*")]
    said, options = refused(*moved)
    assert "data.source.options.urls: data-*.tar -> there/data-*.tar" in said
    assert trained(*moved, *options, "stages.0.steps=2") == 0
    assert "from its beginning" not in caplog.text

    data = Path("there/data-1.tar").read_bytes()
    write_noise(Path("there/data-1.tar"), 8)
    said, options = refused(*moved)
    assert "data.source: another content than when the run began: data-1.tar" in said
    assert "--change data.source" in said
    Path("there/data-1.tar").write_bytes(data)
    write_shard(Path("there/data-2.tar"), 8)
    said, options = refused(*moved)
    assert "had 16 samples and has 24" in said
    assert trained(*moved, *options) == 0
    assert "it is read from its beginning" in caplog.text


def write_noise(path: Path, samples: int) -> None:
    """The same members with other values."""
    whole = bytearray(path.read_bytes())
    rng, at = np.random.default_rng(5), 0
    for _ in range(samples):
        at = whole.index(b"\x93NUMPY", at) + 128
        whole[at : at + 256] = rng.standard_normal(64, dtype=np.float32).tobytes()
    path.write_bytes(whole)


@pytest.mark.slow
def test_a_shard_that_goes_bad_between_stop_and_going_on(refused: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With skip, which may be turned on at any time, the run goes on with the others, and again when it is back."""
    for i in range(3):
        write_shard(Path(f"data-{i}.tar"), 8)
    assert trained(*SHARDS, "stages.0.steps=1") == 0
    good = Path("data-0.tar").read_bytes()
    Path("data-0.tar").write_bytes(good[:3000])
    said, _ = refused(*SHARDS)
    assert "data-0.tar" in said
    (advice,) = re.findall(r"data\.source\.options\.on_bad_shard=skip", said)
    assert trained(*SHARDS, advice, "stages.0.steps=3") == 0
    assert "bad since the run began, and left out: data-0.tar" in caplog.text
    Path("data-0.tar").write_bytes(good)
    assert trained(*SHARDS, advice) == 0
    assert [json.loads(line)["step"] for line in Path("run/log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not Path("run/changes.jsonl").exists()


def test_a_run_on_another_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained("stages.0.steps=1", "device=auto") == 0
    assert trained("stages.0.steps=2", "device=cpu") == 0
    rng = torch.Generator().manual_seed(3)
    state = RandomState(rng).state_dict() | {"device": "cuda"}
    with pytest.raises(ValueError, match="--change device"):
        RandomState(rng).load_state_dict(state)
    RandomState(rng, elsewhere=3).load_state_dict(state)
    assert not torch.equal(rng.get_state(), state["run"])


# ---- --from


@pytest.mark.long
def test_a_student_starts_from_a_run_or_an_export(refused: Any) -> None:
    few = ["stages.0.steps=1", "out=two"]
    assert trained("stages.0.steps=2") == 0
    assert cli.main(["export", "run", "--out", "net"]) == 0
    expected = load_file("net/model.safetensors")
    for source, out in (("run", "two"), ("net", "three")):
        assert trained(few[0], f"out={out}", "--from", source) == 0
        start = load_run(Path(out), step=0).student.net.state_dict()
        assert all(torch.equal(start[name], value) for name, value in expected.items())
        assert trained(few[0], f"out={out}", "--from", source) == 0  # the same command goes on
    shutil.rmtree("net")
    assert trained("stages.0.steps=2", "out=three", "--from", "net") == 0  # and needs it no more
    assert "has begun already, from run" in refused(*few, "--from", "net")[0]
    assert trained(*few) == 0

    Path("my_model.py").write_text(MODEL)
    own = ["model={load: my_model.py:teacher}", "guidance={}"]
    assert trained(*own, "stages.0.steps=1", "out=mine") == 0
    assert cli.main(["export", "mine", "--out", "my_net"]) == 0
    assert Path("my_net/config.yaml").is_file()
    assert trained(*own, "stages.0.steps=1", "out=again", "--from", "my_net") == 0
    exported = load_file("my_net/model.safetensors")
    again = load_run(Path("again"), step=0).student.net.state_dict()
    assert all(torch.equal(again[name], value) for name, value in exported.items())

    wider = "model.options={width: 32, depth: 1, heads: 2}"
    assert "export it, and start from the exported folder" in refused(wider, "out=four", "--from", "run")[0]
    assert cli.main(["export", "run", "--out", "net"]) == 0
    assert "weights of another network than DiT" in refused(wider, "out=four", "--from", "net")[0]
    assert "Give the `out` of a run" in refused("out=four", "--from", "nowhere")[0]
    save_file({"x": torch.zeros(1)}, "net/model.safetensors")
    Path("net/model.safetensors").write_bytes(Path("net/model.safetensors").read_bytes()[:-2])
    assert "net/model.safetensors is damaged" in refused("out=four", "--from", "net")[0]
    assert not Path("four").exists()


@pytest.mark.slow
def test_the_run_of_a_deeper_network_is_another_network(refused: Any) -> None:
    """Whose first blocks would fit."""
    assert trained("stages.0.steps=1", "model.options={width: 16, depth: 3, heads: 2}") == 0
    said, _ = refused("stages.0.steps=1", "model.options={width: 16, depth: 1, heads: 2}", "out=two", "--from", "run")
    assert "unexpected in the checkpoint: ema.0.1.parameters.net.blocks.1." in said
    assert "export it, and start from the exported folder" in said


@pytest.mark.slow
def test_averages_of_a_deeper_network_are_another_network(capfd: pytest.CaptureFixture[str]) -> None:
    """Also where the checkpoint that they belong to is gone, and snapshots are all that there is."""
    shape = {"width": 16, "heads": 2}
    dit(**shape, depth=1).net.save_pretrained("net")
    assert trained("stages.0.steps=4", "model.options={path: net}", "checkpoint.keep=1", "ema.snapshot_every=1") == 0
    assert cli.main(["sample", "run", "--steps", "1", "--out", "x"]) == 0
    assert load_run(Path("run"), step=2).step == 2
    for depth in (2, 0):
        shutil.rmtree("net")
        dit(**shape, depth=depth).net.save_pretrained("net")
        with pytest.raises(ValueError, match=r"in the checkpoint.*net\.blocks\."):
            load_run(Path("run"))
        with pytest.raises(ValueError, match=r"weights are those of another network: net\.blocks\."):
            load_run(Path("run"), step=2)


@pytest.mark.slow
@pytest.mark.parametrize(("then", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_student_starts_from_a_run_of_another_dtype(then: str, now: str) -> None:
    """Its averages are float32, whatever its parameters are."""
    assert trained("stages.0.steps=2", f"student.dtype={then}") == 0
    assert trained("stages.0.steps=1", f"student.dtype={now}", "out=two", "--from", "run") == 0
    before = load_run(Path("run")).student
    after = load_run(Path("two"), step=0).student
    average = Checkpoints(Path("run/checkpoints"))
    kept = PowerEMA(dict(before.named_parameters()), 0.1)
    average.load({"ema": {"0.1": kept}}, partial=True)
    dtype = getattr(torch, now)
    assert {p.dtype for p in after.parameters()} == {dtype}
    for name, p in after.named_parameters():
        assert torch.equal(p, kept.parameters[name].to(dtype))


@pytest.mark.slow
def test_adapters_on_another_network_than_they_were_trained_on_are_refused(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Samples and exports would be those of a network that nobody trained."""
    shape = {"width": 16, "depth": 1, "heads": 2}
    dit(**shape).net.save_pretrained("net")
    own = ["model.options={path: net}", "student.lora={rank: 2, targets: [qkv]}"]
    assert trained("stages.0.steps=1", *own) == 0
    assert cli.main(["sample", "run", "--steps", "1", "--out", "x"]) == 0
    few = ["evaluation={features: {load: jvpgraph.trainer.features:pixels}, count: 32}", "sampling.teacher_steps=2"]
    assert trained("stages.0.steps=1", "model.options={path: net}", "out=full", *few) == 0
    dit(**shape, seed=1).net.save_pretrained("net")
    for command in (["sample", "run", "--steps", "1", "--out", "x"], ["export", "run", "--out", "y"]):
        capfd.readouterr()
        assert cli.main(command) == 1
        said = capfd.readouterr().err
        assert "others than those that the adapters in run were trained on" in said
        assert "Traceback" not in said
    assert not Path("y").exists()
    assert cli.main(["sample", "full", "--steps", "1", "--out", "x"]) == 0  # whose weights are all its own
    assert cli.main(["evaluate", "full", "--steps", "1", "--seeds", "0"]) == 0
    assert "the teacher has other weights than when the run in full began" in caplog.text


TIED = """
import torch
from torch import nn
from jvpgraph.trainer.trigflow import TrigFlow

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.again = self.c

    def forward(self, x, s, labels):
        return self.again(self.b(self.a(x.flatten(1) * (1 + s[:, None])).sin())).view_as(x)

def teacher():
    torch.manual_seed(0)
    return TrigFlow(Net())
"""


def test_weights_under_two_names_are_saved_once_and_found_again() -> None:
    Path("tied.py").write_text(TIED)
    own = ["model={load: tied.py:teacher}", "guidance={}", "stages.0.steps=1"]
    assert trained(*own) == 0
    assert cli.main(["export", "run", "--out", "net"]) == 0
    assert trained(*own, "out=two", "--from", "net") == 0
    start = load_run(Path("two"), step=0).student.net
    assert start.b.weight is start.a.weight
    for name, value in load_file("net/model.safetensors").items():
        assert torch.equal(start.state_dict()[name], value)


@pytest.mark.long
def test_a_run_of_one_time_and_no_scale_starts_one_with_both(refused: Any) -> None:
    """As its export does: what is new begins as nothing."""
    assert trained("stages.0.steps=1", "stages.0.objective=dcm") == 0
    now = [
        "stages.0.steps=1",
        "stages.0.objective=mean_flow",
        SEVERAL,
        "student={second_time: true, embed_scale: true}",
    ]
    assert trained(*now, "out=two", "--from", "run") == 0
    before, start = load_run(Path("run")).student, load_run(Path("two"), step=0).student
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.2, 0.7])
    cond = {"labels": torch.tensor([3, 4])}
    wanted = before(x, t, cond)
    for scale in (2.0, 6.0):
        assert torch.equal(start(x, t, {**cond, "guidance_scale": torch.full((2,), scale)}, t), wanted)


LORA = "student.lora={rank: 2, alpha: 2, targets: [qkv]}"
SEVERAL = "guidance={scale: [2, 6], negative: {labels: 10}}"


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (
            [LORA],
            [LORA.replace("alpha: 2", "alpha: 64")],
            "its adapters act with alpha 2, and student.lora.alpha is 64",
        ),
        ([LORA], [LORA, "model.options.seed=5"], "its adapters were trained on other weights than those of `model`"),
        (["student.second_time=true"], [], "its student.second_time is set, and what that has learnt would be lost"),
        ([SEVERAL, "student.embed_scale=true"], [], "its student.embed_scale is set"),
        (
            [SEVERAL, "student.embed_scale={embedder: time, scale: 2}"],
            [SEVERAL, "student.embed_scale={embedder: time, scale: 3}"],
            "the same weights would be another network",
        ),
    ],
    ids=["alpha", "base", "second time", "scale", "place"],
)
def test_weights_that_would_be_another_network_are_refused(
    refused: Any, then: list[str], now: list[str], said: str
) -> None:
    """A run's student is more than its weights."""
    objective = "stages.0.objective=mean_flow" if "second_time" in str(then) else "stages.0.objective=dcm"
    assert trained("stages.0.steps=1", objective, *then) == 0
    assert said in refused("stages.0.steps=1", "stages.0.objective=dcm", *now, "out=other", "--from", "run")[0]
    assert not Path("other").exists()
    assert trained("stages.0.steps=1", objective, *then, "out=other", "--from", "run") == 0


@pytest.mark.slow
def test_a_change_that_the_checkpoint_does_not_fit_leaves_the_folder(refused: Any) -> None:
    before_all = ["stages.0.steps=1", "stages.0.objective={name: adversarial, width: 8, blocks: [0]}"]
    named = "teacher.model={load: jvpgraph.trainer.dit:dit, options: {width: %d, depth: 1, heads: 2}}"
    assert trained(*before_all, named % 16) == 0
    files = [Path("run") / name for name in ("config.yaml", "origin.json")]
    before = [file.read_bytes() for file in files]
    said, _ = refused(*before_all, named % 32, "--change", "teacher")
    assert "is of another state" in said
    assert [file.read_bytes() for file in files] == before
    assert not Path("run/changes.jsonl").exists()
    assert trained(*before_all, named % 16) == 0


def test_samples_of_a_random_teacher_are_those_of_its_run() -> None:
    """A network that draws its start from torch's generator."""
    Path("my_model.py").write_text(MODEL)
    assert trained("model={load: my_model.py:teacher}", "stages.0.steps=1", "seed=5") == 0
    torch.manual_seed(99)
    teachers = [load_run(Path("run"), step=step).teacher.net.lin.weight for step in (0, 1)]
    start = load_run(Path("run"), step=0).student.net.lin.weight
    assert all(torch.equal(weight, start) for weight in teachers)
    assert load(RunConfig, Path("run/config.yaml")).seed == 5
