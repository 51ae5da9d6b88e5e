"""Students: copies that train, adapters that share, and checkpointing that recomputes the primal only."""

from __future__ import annotations

import copy
import functools
import importlib
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import jvpgraph
from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.dit import DiT, DiTConfig
from jvpgraph.trainer.model.student import CheckpointedBlock, LoRA, make_student, merged
from jvpgraph.trainer.trigflow import TrigFlow

diffusers = pytest.importorskip("diffusers")

Case = tuple[TrigFlow, Tensor, Tensor, Condition]
DEPTH = 2


def randomized(net: nn.Module) -> nn.Module:
    """Gates and outputs that start at zero would hide every difference."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


def dit() -> Case:
    net = randomized(DiT(DiTConfig(width=16, depth=DEPTH, heads=2)))
    return TrigFlow(net), torch.randn(2, 1, 8, 8).double(), torch.tensor([0.3, 1.1]), {"labels": torch.tensor([1, 2])}


def call_wan(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    x = x.to(net.patch_embedding.weight.dtype)
    return net(x, time, cond["encoder_hidden_states"].to(x.dtype), return_dict=False)[0]


def wan() -> Case:
    net = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=10,
        freq_dim=8,
        ffn_dim=16,
        num_layers=DEPTH,
    )
    teacher = TrigFlow(randomized(net), call=call_wan, time_scale=1000)
    cond = {"encoder_hidden_states": torch.randn(2, 5, 10)}
    return teacher, torch.randn(2, 4, 2, 4, 4).double(), torch.tensor([0.3, 1.1]), cond


MODELS = {"dit": dit, "wan": wan}
TARGETS = {"dit": ("qkv", "attention.out"), "wan": ("to_q", "to_out.0", "ffn.net.2")}


def adapters(student: TrigFlow) -> dict[str, nn.Parameter]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def stir(student: TrigFlow) -> TrigFlow:
    """Adapters that do something: B starts at zero."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters(student).values():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return student


@pytest.mark.parametrize("model", MODELS)
def test_whole_student_is_a_trainable_copy(model):
    teacher, x, t, cond = MODELS[model]()
    student = make_student(teacher, dtype=None, lora=None, checkpoint_blocks=False)
    assert torch.equal(student(x, t, cond), teacher(x, t, cond))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert list(student.state_dict()) == list(teacher.state_dict())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert student.training == teacher.training


@pytest.mark.parametrize("model", MODELS)
def test_another_dtype_is_that_of_parameters_only(model):
    teacher, x, t, cond = MODELS[model]()
    student = make_student(teacher, dtype="bfloat16", lora=None, checkpoint_blocks=False)
    wide = {name for name, p in student.net.named_parameters() if p.dtype == torch.float32}
    if model == "dit":
        assert not wide
    else:  # what the class keeps in float32
        assert {"scale_shift_table", "condition_embedder.time_embedder.linear_1.weight"} <= wide
        assert not any("attn" in name or "ffn" in name for name in wide)
    for (name, a), (_, b) in zip(student.named_buffers(), teacher.named_buffers()):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype, name
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    F, F_teacher = student(x, t, cond), teacher(x, t, cond)
    assert (F - F_teacher).norm() < 0.1 * F_teacher.norm()
    with pytest.raises(ValueError, match="no floating dtype 'int8'"):
        make_student(teacher, dtype="int8", lora=None, checkpoint_blocks=False)


@pytest.mark.parametrize("model", MODELS)
def test_lora_student_shares_all_but_its_adapters(model):
    teacher, x, t, cond = MODELS[model]()
    before = copy.deepcopy(teacher.state_dict())
    student = make_student(teacher, dtype=None, lora=LoRA(4, 8.0, TARGETS[model]), checkpoint_blocks=False)
    own = adapters(student)
    assert len(own) == 2 * DEPTH * sum(2 if "to_" in target else 1 for target in TARGETS[model])  # Wan: attn1, attn2
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in own.items())
    theirs = {id(p) for p in teacher.parameters()}
    assert all(id(p) in theirs for p in student.parameters() if not p.requires_grad)
    assert len([p for p in student.parameters() if not p.requires_grad]) == len(theirs)
    assert torch.equal(student(x, t, cond), teacher(x, t, cond)), "adapters do not start as the identity"
    F = stir(student)(x, t, cond)
    assert not torch.allclose(F, teacher(x, t, cond))
    F.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in own.values())
    assert all(p.grad is None for p in teacher.parameters())

    plain = merged(student)
    assert list(plain.state_dict()) == list(teacher.net.state_dict())
    assert type(plain) is type(teacher.net)
    assert not hasattr(plain, "peft_config")
    out = TrigFlow(plain, call=teacher.call, time_scale=teacher.time_scale)(x, t, cond)
    torch.testing.assert_close(out, F.detach(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert adapters(student).keys() == own.keys(), "merging changed the student"


def test_merging_scales_by_alpha_over_rank():
    teacher, *_ = dit()
    student = stir(make_student(teacher, dtype=None, lora=LoRA(4, 10.0, ("qkv",)), checkpoint_blocks=False))
    layer = student.net.blocks[1].attention.qkv
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = teacher.net.blocks[1].attention.qkv.weight + 10.0 / 4 * B @ A
    torch.testing.assert_close(merged(student).blocks[1].attention.qkv.weight, expected)
    assert layer.base_layer.weight is teacher.net.blocks[1].attention.qkv.weight


def test_adapters_are_float32_over_bfloat16_weights():
    teacher, x, t, cond = dit()
    teacher.bfloat16()
    for dtype in (None, "bfloat16"):
        student = make_student(teacher, dtype=dtype, lora=LoRA(4, 4.0, ("qkv",)), checkpoint_blocks=False)
        assert {p.dtype for p in adapters(student).values()} == {torch.float32}
    F = stir(student)(x, t, cond)
    assert merged(student).blocks[0].attention.qkv.weight.dtype == torch.bfloat16
    out = TrigFlow(merged(student))(x, t, cond)
    assert (out - F).norm() < 0.05 * F.norm()
    with pytest.raises(ValueError, match="shares its teacher's weights"):
        make_student(teacher, dtype="float32", lora=LoRA(4, 4.0, ("qkv",)), checkpoint_blocks=False)


def test_lora_students_of_two_processes_start_alike():
    teacher, *_ = dit()
    lora = LoRA(4, 8.0, ("qkv",))
    first = adapters(make_student(teacher, dtype=None, lora=lora, checkpoint_blocks=False))
    expected = torch.get_rng_state()
    torch.manual_seed(11)
    second = adapters(make_student(teacher, dtype=None, lora=lora, checkpoint_blocks=False))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(11)
    assert not torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("targets", [("qkv", "to_q", "kv"), (), ("blocks",)])
def test_targets_that_match_nothing_are_listed_with_what_there_is(targets):
    teacher, *_ = dit()
    with pytest.raises(ValueError) as error:
        make_student(teacher, dtype=None, lora=LoRA(4, 4.0, targets), checkpoint_blocks=False)
    lines = str(error.value).split("\n")
    assert lines[0].endswith({0: "(none given)", 1: "blocks", 3: "to_q, kv"}[len(targets)])
    assert "    blocks.*.attention.qkv" in lines
    assert "    patch_in" in lines


def test_targets_name_whole_parts():
    """`out` is no end of `patch_out`, and a name from the top is not searched for further down."""
    teacher, *_ = dit()
    student = make_student(teacher, dtype=None, lora=LoRA(4, 4.0, ("out", "modulation")), checkpoint_blocks=False)
    found = {name.split(".lora_")[0].removeprefix("net.") for name in adapters(student)}
    blocks = {f"blocks.{i}.{part}" for i in range(DEPTH) for part in ("attention.out", "modulation")}
    assert found == {"modulation", *blocks}


def test_peft_is_needed_for_lora_only(monkeypatch):
    plain = importlib.import_module

    def without(name: str, *args: object):
        if name == "peft":
            raise ModuleNotFoundError(name)
        return plain(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    teacher, *_ = dit()
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        make_student(teacher, dtype=None, lora=LoRA(4, 4.0, ("qkv",)), checkpoint_blocks=False)
    make_student(teacher, dtype=None, lora=None, checkpoint_blocks=False)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[str(func)] += 1
        return func(*args, **(kwargs or {}))


def run(student: TrigFlow, case: Case, backend: str) -> tuple[Tensor, Tensor, dict[str, Tensor], int, Counter[str]]:
    """F, F_dot, gradients, bytes kept for the backward beside the parameters, ops of the backward."""
    _, x, t, cond = case
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dual = jvpgraph.transform(student, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F, F_dot = dual(x, t, cond, tangents={"x": torch.ones_like(x), "t": torch.ones_like(t)})
    with CountOps() as backward:
        F.square().sum().backward()
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return F.detach(), F_dot, grads, sum(n for where, n in kept.items() if where not in own), backward.ran


@functools.cache
def measured(model: str, lora: bool, checkpoint_blocks: bool, backend: str = "eager"):
    """The names of the student and what `run` returns; once, because capturing takes seconds."""
    torch.manual_seed(0)
    case = MODELS[model]()
    settings = LoRA(4, 8.0, TARGETS[model]) if lora else None
    student = make_student(case[0], dtype=None, lora=settings, checkpoint_blocks=checkpoint_blocks)
    assert len([m for m in student.modules() if isinstance(m, CheckpointedBlock)]) == DEPTH * checkpoint_blocks
    return list(student.state_dict()), *run(stir(student) if lora else student, case, backend)


@pytest.mark.long
@pytest.mark.parametrize(("model", "lora"), [("dit", False), ("wan", False), ("dit", True)])
def test_checkpointing_keeps_less_and_recomputes_no_tangent(model, lora):
    names, F, _, grads, kept, plain = measured(model, lora, False)
    names_ck, F_ck, _, grads_ck, kept_ck, ran = measured(model, lora, True)
    assert names == names_ck
    torch.testing.assert_close(F, F_ck)
    assert grads.keys() == grads_ck.keys()
    scale = max(g.abs().max() for g in grads.values())
    assert all((grads[name] - grads_ck[name]).abs().max() < 1e-5 * scale for name in grads)
    assert kept_ck < 0.5 * kept, (kept_ck, kept)
    gelu = "aten.gelu.default"
    assert plain[gelu] == 0
    if not lora:  # below frozen layers nobody asks for it
        assert ran[gelu] == DEPTH, "nothing was recomputed: checkpointing had no effect"
    assert sum(ran.values()) > sum(plain.values())
    assert ran["jvpgraph.attention_jvp.default"] == 0
    assert ran["jvpgraph.attention_backward.default"] == plain["jvpgraph.attention_backward.default"] > 0


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", ["dit", "wan"])
def test_checkpointing_leaves_the_tangent_alone(model):
    torch.testing.assert_close(measured(model, False, False)[2], measured(model, False, True)[2])


@pytest.mark.long
def test_checkpointing_with_inductor():
    _, F, F_dot, grads, kept, _ = measured("dit", False, False)
    _, F_ck, F_dot_ck, grads_ck, kept_ck, _ = measured("dit", False, True, "inductor")
    torch.testing.assert_close(F, F_ck, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F_dot, F_dot_ck, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads, grads_ck, rtol=1e-3, atol=1e-3)
    assert kept_ck < 0.6 * kept, (kept_ck, kept)


def gradients(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    call(model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_without_tangents_and_of_copies():
    teacher, x, t, cond = dit()
    student = make_student(teacher, dtype=None, lora=None, checkpoint_blocks=True)
    plain = make_student(teacher, dtype=None, lora=None, checkpoint_blocks=False)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for p in student.parameters():  # a copy that ran the original's blocks would notice
            p.zero_()
    expected = gradients(plain, lambda m: m(x, t, cond))
    found = gradients(twin, lambda m: m(x, t, cond))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(twin(x, t, cond), plain(x, t, cond))
    exported = merged(twin)
    assert not any(isinstance(m, CheckpointedBlock) for m in exported.modules())
    assert isinstance(twin.net.blocks[0], CheckpointedBlock)
    assert type(exported.blocks[0]) is type(plain.net.blocks[0])


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))  # single layers: nothing to gain
        self.stages = nn.ModuleList([nn.ModuleList(Block() for _ in range(2)), nn.ModuleList([Block()])])
        self.mixed = nn.ModuleList([nn.Linear(3, 3), Block()])

    def forward(self, x: Tensor, *_: object) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Sequential(nn.Linear(3, 3))])

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.inner[0](x))


def test_which_blocks_are_checkpointed():
    student = make_student(TrigFlow(Nested()), dtype=None, lora=None, checkpoint_blocks=True)
    found = {name for name, m in student.net.named_modules() if isinstance(m, CheckpointedBlock)}
    assert found >= {"stages.0.0", "stages.0.1", "stages.1.0"}
    assert not any(name.startswith("parts") for name in found)
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of blocks"):
        make_student(TrigFlow(nn.Linear(3, 3)), dtype=None, lora=None, checkpoint_blocks=True)
