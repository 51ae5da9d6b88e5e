"""Less memory: adapters on one base, networks and averages on the CPU, moments and weights of a byte."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import jvpgraph
from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig, StudentConfig
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.ema import PowerEMA, update_all
from jvpgraph.trainer.model.networks import build_student, trainable
from jvpgraph.trainer.model.offload import Traffic, nbytes, rest, units
from jvpgraph.trainer.model.optimizer import MasterAdamW
from jvpgraph.trainer.model.parts import in_bytes, widened
from jvpgraph.trainer.model.quantize import put_on_bytes, quantize
from jvpgraph.trainer.model.student import checkpointed
from jvpgraph.trainer.plan.plan import plan_run
from jvpgraph.trainer.plan.report import report, smaller
from jvpgraph.trainer.run.build import build_networks
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.log import RunLog, computed
from jvpgraph.trainer.run.memory import clashes
from jvpgraph.trainer.run.parallel import check, joined, sizes_of
from jvpgraph.trainer.settings import from_dict
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow
from tests.test_train import RCM, awake, config_of, content, last_checkpoint, stage

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTERS = {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}


def lines(folder: Path) -> list[dict[str, float]]:
    return computed(folder / "log.jsonl")


def assert_same_run(found: Path, expected: Path, scratch: Path) -> None:
    """Logs and last checkpoints, to the bit: the ops are the same."""
    assert lines(found) == lines(expected)
    got, want = (content(last_checkpoint(folder), scratch / "content.pt") for folder in (found, expected))
    assert not got.keys() ^ want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


# ---------------------------------------------------------------- on the CPU


@pytest.mark.long
@pytest.mark.parametrize("blocks", [True, False], ids=["checkpointed blocks", "plain"])
def test_a_run_whose_networks_rest_is_the_same(tmp_path: Path, blocks: bool) -> None:
    stages = [stage(RCM, 3)]
    student = {"backend": "eager", "checkpoint_blocks": blocks}
    plain = train(config_of(tmp_path / "plain", stages, student=student))
    away = {"teacher": {"offload": True}, "fake_score": {"offload": True}, "ema": {"device": "cpu"}}
    at_rest = train(config_of(tmp_path / "at rest", stages, student=student, **away))
    assert_same_run(at_rest, plain, tmp_path)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(16, 32), "b": nn.Linear(32, 16)})
        self.register_buffer("ones", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ones * self.layers["b"](self.layers["a"](x).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) * t[:, None]
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "checkpointed blocks"])
def test_parameters_are_on_the_device_while_their_block_computes(blocks: bool) -> None:
    """Fake tensors refuse ops on two devices, and so stand for a GPU: theirs is called meta here."""
    with FakeTensorMode():
        model = TrigFlow(Net())
        for block in model.net.blocks if blocks else ():
            block.__class__ = checkpointed(Block)
        traffic, device = Traffic(), torch.device("meta")
        rest(model, device, traffic)
        x, t = torch.randn(4, 8, device=device), torch.rand(4, device=device)
        whole = sum(p.nbytes for p in model.parameters())
        in_blocks = sum(p.nbytes for p in model.net.blocks.parameters())
        with torch.no_grad():
            assert model(x, t, {}).device == device
        assert traffic.take() == whole
        model(x, t, {}).sum().backward()
        assert traffic.take() == 2 * whole + 2 * in_blocks * blocks  # gradients; and what is computed again
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        optimizer = MasterAdamW(trainable(model), lr=1e-3)
        assert all(p.grad is not None and p.grad.device.type == "cpu" for p in optimizer.parameters.values())
        assert optimizer.gradient_norm().device.type == "cpu"
        assert {b.device for b in model.buffers()} == {device}


def test_averages_away_from_their_parameters() -> None:
    with FakeTensorMode():
        parameters = {name: torch.zeros(64, 2, device="meta", dtype=torch.bfloat16) for name in "ab"}
        emas = [PowerEMA(parameters, sigma, "cpu") for sigma in (0.05, 0.1)]
        assert update_all(emas, parameters) == 2 * 64 * 2 * 2  # once, for both
        assert {p.device.type for ema in emas for p in ema.parameters.values()} == {"cpu"}
    parameters = {"a": torch.zeros(4)}
    assert update_all([PowerEMA(parameters, 0.1, "cpu")], parameters) == 0


def test_a_block_that_fails_has_its_parameters_back() -> None:
    model = rest(TrigFlow(Net()), torch.device("cpu"), Traffic())
    own = list(model.parameters())
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 9), torch.rand(4), {})
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))
    assert sum(len(unit.parameters) for unit in units(model)) == len(own)


# ---------------------------------------------------------------- moments of a byte


def random_steps(optimizer: MasterAdamW, count: int, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=rng).add_(0.5).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_moments(dtype: torch.dtype) -> None:
    """Near those of float32, a quarter of their size, and the same after a stop."""
    pytest.importorskip("torchao")
    shapes = {"matrix": (64, 256), "kernel": (16, 8, 4, 16), "adapter": (128, 64), "odd": (100, 50), "bias": (4096,)}
    rng = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}

    def optimizer(kind: Any) -> MasterAdamW:
        parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        return MasterAdamW(parameters, lr=1e-2, betas=(0.9, 0.99), kind=kind)

    plain, small = optimizer("adamw"), optimizer("adamw_8bit")
    state = small.state_dict()
    assert set(state["exp_avg_codes"]) == {"matrix", "kernel", "adapter"}
    assert set(state["exp_avg_sq"]) == {"odd", "bias"}
    assert state["exp_avg_scale"]["matrix"].shape == (64, 1)
    for each in (plain, small):
        random_steps(each, 10)
    for name, value in start.items():
        moved = (plain.masters[name] - value.float()).norm()
        error = (plain.masters[name] - small.masters[name]).norm() / moved
        assert error < (0.02 if name in state["exp_avg_codes"] else 1e-5), name
        assert small.parameters[name].dtype == dtype
    saved = {part: {n: t.clone() for n, t in tensors.items()} for part, tensors in small.state_dict().items()}
    again = optimizer("adamw_8bit")
    with torch.no_grad():
        for name, parameter in again.parameters.items():
            parameter.copy_(small.parameters[name])
    again.load_state_dict(saved)
    for each in (small, again):
        random_steps(each, 3, seed=1)
    assert all(torch.equal(small.masters[name], again.masters[name]) for name in start)
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer("adamw").load_state_dict(saved)


@pytest.mark.matrix
def test_the_compiled_update_that_gpus_have() -> None:
    pytest.importorskip("torchao")
    start = {f"{n}": torch.randn(n, 256) for n in range(16, 27)}  # more shapes than Dynamo takes by itself
    found = []
    for compiled in (False, True):
        optimizer = MasterAdamW(
            {name: nn.Parameter(value.clone()) for name, value in start.items()}, lr=1e-2, kind="adamw_8bit"
        )
        if compiled:
            optimizer.adamw.update = optimizer.adamw.compiled
        random_steps(optimizer, 3)
        found.append(optimizer.masters)
    for name, value in start.items():  # some bytes are rounded the other way
        assert (found[0][name] - found[1][name]).norm() < 1e-3 * (found[0][name] - value).norm(), name


def test_float64_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = {**WIDE, "options": {**WIDE["options"], "dtype": "float64"}}
    with pytest.raises(ValueError, match=r"adamw_8bit steps in float32, and net\.positions is float64"):
        train(config_of(tmp_path / "run", EIGHT, model=model))
    assert not (tmp_path / "run").exists()


def test_8_bit_moments_are_not_for_float64() -> None:
    with pytest.raises(ValueError, match=r"steps in float32, and a is float64: set student.dtype"):
        MasterAdamW({"a": nn.Parameter(torch.zeros(4).double())}, lr=1e-3, kind="adamw_8bit")


# ---------------------------------------------------------------- weights of a byte


def dequantised(model: TrigFlow) -> TrigFlow:
    """A copy with whole weights of the same values."""
    whole = awake(width=64, depth=1, heads=2, dtype=str(next(model.net.parameters()).dtype)[6:])
    for own, other in zip(whole.net.parameters(), model.net.parameters(), strict=True):
        own.data = (other.dequantize() if hasattr(other, "qdata") else other).detach().to(own.dtype)
    return whole.requires_grad_(False).eval()


@pytest.mark.parametrize("backend", ["op_by_op", pytest.param("inductor", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_teacher_of_bytes_and_its_tangent(kind: str, dtype: str, backend: str) -> None:
    pytest.importorskip("torchao")
    model = awake(width=64, depth=1, heads=2, dtype=dtype).eval()
    before = sum(p.nbytes for p in model.net.parameters())
    small = quantize(model, kind)
    assert sum(map(nbytes, small.net.parameters())) < before * (0.6 if dtype == "bfloat16" else 0.35)
    whole = dequantised(small)
    for size in (4, 3):
        x, t, cond = torch.randn(size, 1, 8, 8).double(), torch.rand(size).double(), {"labels": torch.arange(size)}
        tangents = {"x": torch.randn_like(x), "t": t}
        found = jvpgraph.transform(small, backend=backend, dynamic=False)(x, t, cond, tangents=tangents)
        wanted = jvpgraph.transform(whole, backend="op_by_op")(x, t, cond, tangents=tangents)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).norm() < (2e-2 if dtype == "bfloat16" else 1e-5) * b.norm()


@pytest.mark.parametrize(("kind", "of_row", "of_weight"), [("int8", 0.004, 0.0), ("float8", 1e-5, 0.0626)])
def test_the_rounding_of_bytes_is_that_of_the_documentation(kind: str, of_row: float, of_weight: float) -> None:
    """A share of a row's largest weight, or of each weight."""
    pytest.importorskip("torchao")
    model = awake(width=64, depth=1, heads=2)
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    rounded = [(before[name], p) for name, p in quantize(model, kind).net.named_parameters() if hasattr(p, "qdata")]
    assert len(rounded) > 3
    for weight, p in rounded:
        most = torch.maximum(of_row * weight.abs().amax(1, keepdim=True), of_weight * weight.abs())
        assert ((p.dequantize() - weight).abs() <= most).all()
        assert not torch.equal(p.dequantize(), weight)


def test_networks_without_linear_layers_are_not_quantised() -> None:
    with pytest.raises(ValueError, match=r"Conv2d has no linear layers.*set it to null"):
        quantize(TrigFlow(nn.Conv2d(1, 1, 1)), "int8")


# ---------------------------------------------------------------- runs

WIDE = {"load": "tests.test_train:awake", "options": {"width": 64, "depth": 1, "heads": 2}}
EVERYTHING = {
    "model": WIDE,
    "teacher": {"offload": True, "quantization": "int8"},
    "fake_score": {"offload": True},
    "ema": {"sigma_rel": [0.05, 0.1], "device": "cpu", "snapshot_every": 2},
}


@pytest.mark.long
def test_a_run_with_all_of_it_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    small = {"student": {"lr": 1e-3, "kind": "adamw_8bit"}, "fake": {"lr": 1e-3, "kind": "adamw_8bit"}}
    one = train(config_of(tmp_path / "one", [stage(RCM, 4, **small)], **EVERYTHING))
    two = train(config_of(tmp_path / "two", [stage(RCM, 2, **small)], **EVERYTHING))
    train(config_of(tmp_path / "two", [stage(RCM, 4, **small)], **EVERYTHING))
    assert_same_run(two, one, tmp_path)
    state = content(last_checkpoint(one), tmp_path / "content.pt")
    assert state[".optimizer.exp_avg_codes.net.blocks.0.attention.qkv.weight"].dtype == torch.uint8
    assert state[".fake_optimizer.exp_avg_sq_codes.net.blocks.0.attention.qkv.weight"].any()
    plain = train(config_of(tmp_path / "plain", [stage(RCM, 4)], model=WIDE))
    for a, b in zip(lines(one), lines(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
        assert a["loss"] != b["loss"]
    student = load_run(one).student.state_dict()  # averaged
    kept = content(last_checkpoint(one), tmp_path / "content.pt")
    assert all(torch.equal(student[n], kept[f".ema.0.05.parameters.{n}"]) for n in ("net.patch_in.weight",))


@pytest.mark.long
@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "checkpointed blocks"])
def test_the_price_is_shown_and_planned(tmp_path: Path, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = {"name": "rcm", "dmd": {"fake_updates_per_step": 2, "simulation_steps": 1}}
    away = {"teacher": {"offload": True}, "fake_score": {"offload": True}}
    student = {"backend": "eager", "checkpoint_blocks": blocks}
    model = {**WIDE, "load": "jvpgraph.trainer.dit:dit"}
    config = config_of(tmp_path / "run", [stage(objective, 3, accumulate=2)], **away, student=student, model=model)
    shown = []
    monkeypatch.setattr(RunLog, "add", lambda self, step, values, figures: shown.append(figures["moved_gib_per_step"]))
    train(config)
    [plan] = plan_run(config, processes=1)
    assert shown[1:] == [plan.moved / 2**30] * 2  # the first has the checks too
    told = report(plan, config, "h100", 0.4)
    assert "on the CPU, GiB for each process" in told
    assert "GiB per update between CPU and GPU" in told


@pytest.mark.long
@pytest.mark.parametrize("each", [False, True], ids=["all of it", "each by itself"])
def test_what_the_plan_advises_helps(tmp_path: Path, each: bool) -> None:
    objective = {"name": "rcm", "dmd": {"fake_updates_per_step": 1, "simulation_steps": 1}}
    config = config_of(
        tmp_path, [{**stage(objective, 3), "batch": 1}], model={**WIDE, "load": "jvpgraph.trainer.dit:dit"}
    )
    [plan] = plan_run(config, processes=1)
    said = [line.partition(":")[0] for line in smaller(plan, config)]
    assert said == [
        "ema.device=cpu",
        "stages.0.student.kind=adamw_8bit",
        "stages.0.fake.kind=adamw_8bit",
        "fake_score.offload=true",
        "teacher.offload=true",
        "teacher.quantization=int8",
    ]
    settings.save(config, tmp_path / "run.yaml")
    for override in said if each else ():
        other = settings.load(RunConfig, tmp_path / "run.yaml", [override])
        [less] = plan_run(other, processes=1)
        assert sum(less.resident.values()) < 0.97 * sum(plan.resident.values()), override
    everything = settings.load(RunConfig, tmp_path / "run.yaml", said)
    [least] = plan_run(everything, processes=1)
    assert not list(smaller(least, everything))
    assert least.peak < 0.7 * plan.peak


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [{"lora": ADAPTERS}, {}], ids=["adapters", "everything"])
def test_on_inductor_too(tmp_path: Path, dtype: str, more: dict[str, Any]) -> None:
    common = {**({} if more else EVERYTHING), "model": {**WIDE, "options": {**WIDE["options"], "dtype": dtype}}}
    runs = [
        train(config_of(tmp_path / backend, [stage(RCM, 3)], **common, student={"backend": backend, **more}))
        for backend in ("eager", "inductor")
    ]
    for a, b in zip(*map(lines, runs), strict=True):
        for name in ("loss", "tangent_norm"):
            assert a[name] == pytest.approx(b[name], rel=3e-2 if dtype == "bfloat16" else 1e-5), name


AWAY = {"teacher": {"offload": True}, "fake_score": {"offload": True}, "ema": {"device": "cpu"}}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("more", "student"),
    [
        ({}, {}),
        (AWAY, {}),
        ({**AWAY, "teacher": {"offload": True, "quantization": "int8"}}, {}),
        ({"ema": {"device": "cpu"}}, {"lora": ADAPTERS}),
    ],
    ids=["keep_norm", "away", "bytes", "adapters"],
)
def test_what_bfloat16_on_inductor_goes_on_with(tmp_path: Path, more: dict[str, Any], student: dict[str, Any]) -> None:
    """The same bits after a stop; and where networks only rest, those of a run where they do not."""
    small = {"student": {"lr": 1e-3, "kind": "adamw_8bit"}, "fake": {"lr": 1e-3, "kind": "adamw_8bit"}}
    common = {
        "model": {**WIDE, "options": {**WIDE["options"], "dtype": "bfloat16"}},
        "student": {"backend": "inductor", "checkpoint_blocks": True, **student},
        "guidance": {"scale": 2.0, "negative": {"labels": 10}, "keep_norm": "token"},
    }
    stages = [[stage(RCM, steps, **small)] for steps in (2, 4)]
    one = train(config_of(tmp_path / "one", stages[1], **common, **more))
    for each in stages:
        two = train(config_of(tmp_path / "two", each, **common, **more))
    assert_same_run(two, one, tmp_path)
    if more == AWAY:
        assert_same_run(train(config_of(tmp_path / "here", stages[1], **common)), one, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_share_their_base(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is that of separate networks, to the bit; and checkpoints hold adapters alone."""
    more: dict[str, Any] = {
        "student": {"backend": "eager", "lora": ADAPTERS},
        "model": {**WIDE, "options": {**WIDE["options"], "dtype": dtype}},
    }
    shared = train(config_of(tmp_path / "shared", [stage(RCM, 3)], **more))
    with monkeypatch.context() as patch:
        patch.setattr("jvpgraph.trainer.model.student.shared", lambda module, but=(): {})
        patch.setattr("jvpgraph.trainer.run.build.share_frozen", lambda student, teacher: None)
        separate = train(config_of(tmp_path / "separate", [stage(RCM, 3)], **more))
    assert_same_run(shared, separate, tmp_path)
    state = content(last_checkpoint(shared), tmp_path / "content.pt")
    of_networks = [key for key in state if key.startswith((".student.", ".fake.", ".ema."))]
    assert of_networks
    assert all("lora_" in key for key in of_networks)


# ---------------------------------------------------------------- adapters on weights of a byte

ON_BYTES: dict[str, Any] = {"teacher": {"quantization": "int8"}}


@pytest.mark.parametrize("backend", ["op_by_op", pytest.param("inductor", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_adapters_on_bytes_are_those_on_the_same_whole_weights(dtype: str, backend: str) -> None:
    pytest.importorskip("torchao")
    teacher = awake(width=64, depth=2, heads=2, dtype=dtype).eval().requires_grad_(False)
    students = [build_student(teacher, from_dict(StudentConfig, {"lora": ADAPTERS})) for _ in range(2)]
    put_on_bytes(students[0], teacher, "int8")
    theirs = dict(students[0].named_parameters())
    small = [name for name, p in theirs.items() if in_bytes(p)]
    assert len(small) > 8
    assert not any(in_bytes(p) for p in teacher.parameters())
    assert all(theirs[name].requires_grad == ("lora_" in name) for name in theirs)
    for name, p in students[1].named_parameters():
        if name in small:
            p.data = widened(theirs[name]).clone()  # of the second student and the teacher, whose weights they are
        elif "lora_B" in name:
            for each in (p, theirs[name]):
                torch.nn.init.normal_(each, generator=torch.Generator().manual_seed(0))
    x, t, cond = torch.randn(3, 1, 8, 8).double(), torch.rand(3).double(), {"labels": torch.arange(3)}
    found = []
    for student, way in zip(students, (backend, "op_by_op"), strict=True):
        dual = jvpgraph.transform(student, backend=way, dynamic=False)
        y, y_dot = dual(x, t, cond, tangents={"x": torch.cos(x), "t": torch.ones_like(t)})
        (y * torch.sin(x)).sum().backward()
        found.append({"y": y, "y_dot": y_dot, **{n: p.grad for n, p in trainable(student).items()}})
    assert all(value is not None for value in found[0].values())
    for name, value in found[0].items():
        assert (value - found[1][name]).norm() < (3e-2 if dtype == "bfloat16" else 1e-5) * found[1][name].norm(), name


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "backend", "kind"),
    [
        ("bfloat16", "eager", "int8"),
        *(
            pytest.param(dtype, backend, kind, marks=pytest.mark.matrix)
            for dtype, backend, kind in (
                ("float32", "inductor", "int8"),
                ("bfloat16", "inductor", "int8"),
                ("float32", "op_by_op", "int8"),
                ("bfloat16", "op_by_op", "float8"),
            )
        ),
    ],
)
def test_a_run_of_adapters_on_bytes_goes_on_and_is_exported(
    dtype: str, backend: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    more: dict[str, Any] = {
        "student": {"backend": backend, "lora": ADAPTERS, "checkpoint_blocks": True},
        "model": {**WIDE, "options": {**WIDE["options"], "dtype": dtype, "depth": 2}},
        "teacher": {"quantization": kind},
    }
    one = train(config_of(tmp_path / "one", [stage(RCM, 4)], **more))
    for steps in (2, 4):
        two = train(config_of(tmp_path / "two", [stage(RCM, steps)], **more))
    assert_same_run(two, one, tmp_path)
    plain = train(config_of(tmp_path / "plain", [stage(RCM, 4)], **{**more, "teacher": {}}))
    for a, b in zip(lines(one), lines(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
        assert a["loss"] != b["loss"]
    state = content(last_checkpoint(one), tmp_path / "content.pt")
    assert all("lora_" in key for key in state if key.startswith((".student.", ".fake.", ".ema.")))

    run = load_run(one)
    assert sum(map(in_bytes, run.student.parameters())) > 8
    assert not any(map(in_bytes, run.teacher.parameters()))
    capsys.readouterr()
    out = export_run(one, tmp_path / "net")
    told = f"The adapters were trained on {kind} weights of the teacher"
    assert f"{told} (teacher.quantization); exported are those weights, widened" in capsys.readouterr().out
    assert told in (out / "README.md").read_text()
    net = copy.deepcopy(run.teacher)
    load_model(net.net, out / "model.safetensors")
    x, t, cond = torch.randn(2, 1, 8, 8).double(), torch.rand(2).double(), {"labels": torch.arange(2)}
    with torch.no_grad():
        got, want, before = (model(x, t, cond) for model in (net, run.student, run.teacher))
    assert (got - want).norm() < (2e-2 if dtype == "bfloat16" else 1e-5) * want.norm()
    if dtype == "float32":  # else the sums' own rounding is as large
        assert (got - want).norm() < 1e-3 * (before - want).norm()


def test_one_base_of_bytes_for_teacher_student_and_fake_score(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = config_of(tmp_path, [stage(RCM, 1)], model=WIDE, student={"lora": ADAPTERS}, **ON_BYTES)
    with joined(config) as layout:
        networks = build_networks(config, layout)
        fake = networks.new_student()
    theirs = {name: p for name, p in networks.teacher.named_parameters() if in_bytes(p)}
    assert theirs
    for model in (networks.student, fake):
        own = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
        assert all(own[name] is p for name, p in theirs.items())


# ---------------------------------------------------------------- what does not go together

LORA = {"student": {"lora": ADAPTERS}}
EIGHT = [{**stage(RCM, 1), "student": {"kind": "adamw_8bit"}}]


@pytest.mark.parametrize(
    ("more", "sizes", "words"),
    [
        (
            {"teacher": {"offload": True}, **LORA},
            {},
            "teacher.offload: with student.lora.*to false",
        ),
        ({"fake_score": {"offload": True}, **LORA}, {}, "fake_score.offload: with student.lora"),
        ({"teacher": {"offload": True}, "student": {"compile": True}}, {}, "Set student.compile to false"),
        ({"teacher": {"offload": True}}, {"tp": 2}, "not with parallel.tp.*Use dp_shard"),
        (
            {"teacher": {"quantization": "int8"}},
            {"dp_shard": 2},
            "split, and parallel.dp_shard.*dp_replicate",
        ),
        ({"teacher": {"quantization": "int8"}}, {"cp_ulysses": 2}, "and parallel.cp_ulysses splits them"),
        ({"stages": EIGHT}, {"tp": 2}, "stages.0.student.kind: adamw_8bit has scales for whole rows"),
        ({"stages": EIGHT, "student": {"dtype": "float64"}}, {}, "Set it to adamw, or student.dtype"),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], sizes: dict[str, int], words: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"stages": [stage(RCM, 1)], "parallel": sizes, **more})
    with pytest.raises(ValueError, match=words):
        check(config, sizes_of(config.parallel, 2 if sizes else 1))


def test_all_of_it_at_once_and_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchao.optim", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    more = {"teacher": {"offload": True, "quantization": "int8"}, **LORA}
    config = config_of(tmp_path / "run", EIGHT, **more)
    with pytest.raises(ValueError) as refused:
        train(config)
    told = str(refused.value)
    assert told.startswith("3 settings do not go together:\n")
    assert "pip install 'jvpgraph[memory]', or set stages.0.student.kind to adamw" in told
    assert "or set teacher.quantization to null" in told
    assert not (tmp_path / "run").exists()
    assert len(list(clashes(config, sizes_of(config.parallel, 1)))) == 3
