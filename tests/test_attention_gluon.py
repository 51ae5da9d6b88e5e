"""The Gluon kernel: its source emulated on a processor, compiled for an absent GPU, and run where there is one.

What runs on a GPU goes past the ops, so that nothing else can step in; tests/test_attention_cuda.py goes through them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from jvpgraph.kernels import attention_gluon, attention_triton, blocks, choose, gate_checks, gate_launches, reference
from jvpgraph.kernels.blocks import GLUON_TABLE, GLUON_VALUE_FROM, SHARED_MEMORY, GluonBlocks, gluon_blocks
from jvpgraph.kernels.call import Call, Place
from jvpgraph.kernels.gate_launches import Flags
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window
from tests import calls
from tests.gluon_emulator import emulated
from tests.joint import ERROR, SHIFTS, joint

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {FP16: 2e-3, BF16: 1e-2}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (sm_90)")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is in the way")


def make(*, b=1, h=2, kv_heads=None, n_q=65, n_k=130, d=64, dtype=BF16, active=7, device="cpu") -> list[Tensor | None]:
    """q, k, v and those of their tangents that `active` has a bit for, in memory as B, N, H, D."""
    heads = (h, kv_heads or h, kv_heads or h)
    tensors = [
        torch.randn(b, n, heads, d, device=device, dtype=dtype).transpose(1, 2)
        for n, heads in zip((n_q, n_k, n_k) * 2, heads * 2)
    ]
    return [*tensors[:3], *(x if active >> i & 1 else None for i, x in enumerate(tensors[3:]))]


def errors(have: tuple[Tensor, ...], tensors: list[Tensor | None], scale: float) -> list[float]:
    """Norm of the difference to float64 over the norm of that."""
    want = reference.attention_jvp(*(None if x is None else x.double() for x in tensors), scale=scale)
    assert [x.shape for x in have] == [x.shape for x in want]
    pairs = zip(have, want)
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs]


def time_like(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """A k_dot with what the embedding of a time step adds: 30 standard deviations, the same for every key."""
    k_dot = tensors[4]
    offset = 30 * torch.randn(*k_dot.shape[:2], 1, k_dot.shape[3], device=k_dot.device)
    return [*tensors[:4], (k_dot.float() + offset).to(k_dot.dtype), tensors[5]]


# ------------------------------------------------------------------------------------- emulated on a processor

# Blocks of keys of 32: none before the last one, exactly one, a partial one before and behind, many rounds of places.
LENGTHS = [(1, 1), (63, 31), (64, 32), (65, 33), (128, 64), (129, 65), (200, 333), (1, 999)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_emulated_lengths(n_q, n_k, stages):
    tensors = make(n_q=n_q, n_k=n_k, d=16)
    with emulated(GluonBlocks(32, stages)) as attention_jvp:
        have = attention_jvp(*tensors, None, None, EVERYTHING, 0.3)
    assert max(errors(have, tensors, 0.3)) < TOLERANCE[BF16]
    for o in (have[0], have[2]):
        assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("active", range(1, 8))
def test_emulated_inputs_that_do_not_move(active):
    tensors = make(b=2, h=4, kv_heads=2, n_k=140, d=24, active=active, dtype=FP16)
    with emulated(GluonBlocks(64, 2)) as attention_jvp:
        have = attention_jvp(*tensors, None, None, EVERYTHING, 0.2)
    assert max(errors(have, tensors, 0.2)) < TOLERANCE[FP16]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_emulated_value_alone(n_q, n_k, stages):
    q, k, v, *_ = make(n_q=n_q, n_k=n_k, d=16)
    with emulated(GluonBlocks(32, stages)):
        have = calls.attention(attention_gluon, q, k, v, None, EVERYTHING, 0.3, blocks=GluonBlocks(32, stages))
    want = reference.attention(q.double(), k.double(), v.double(), scale=0.3)
    assert max((a - b).norm() / b.norm() for a, b in zip(have, want)) < TOLERANCE[BF16]


@pytest.mark.parametrize("n_k", [512, 513])  # 513: the key that whole blocks leave over does not make mu alone
def test_emulated_tangent_common_to_all_keys_costs_no_precision(n_k):
    tensors = time_like(make(n_q=64, n_k=n_k, d=128))
    with emulated(GluonBlocks(64, 2)) as attention_jvp:
        have = attention_jvp(*tensors, None, None, EVERYTHING, 128**-0.5)
    assert errors(have, tensors, 128**-0.5)[2] < ERROR


@pytest.mark.parametrize("attended", [0.0, 4.0])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("text_first", [True, False])
def test_emulated_joint_attention(text_first, shift, attended):
    """Also of queries that attend to the text, with nine tenths of their weight, though it is a tenth of the keys."""
    tensors = joint(text=77, image=700, text_first=text_first, shift=shift, attended=attended, h=1)
    with emulated(GluonBlocks(64, 2)) as attention_jvp:
        have = attention_jvp(*tensors, None, None, EVERYTHING, 128**-0.5)
    assert errors(have, tensors, 128**-0.5)[2] < ERROR
    assert errors(have, tensors, 128**-0.5)[3] < 1e-5


KEYS_FREE, VALUES_FREE = (f"mbarrier.wait({x}_empty.index(place), parity ^ 1)" for x in "kv")
MISTAKES = {  # what to replace in the source, and by what
    "a place is free after one reader": ("(k_empty.index(place), count=2)", "(k_empty.index(place), count=1)"),
    "the loader does not wait for a place": (VALUES_FREE, ""),
    "the loader waits for the wrong phase": (KEYS_FREE, KEYS_FREE.replace(" ^ 1", "")),
    "keys are read before they are there": ("mbarrier.wait(k_full.index(place), parity)", ""),
    "queries are read before they are there": ("mbarrier.wait(q_full, 0)", ""),
    "bytes are missing": ("BLOCK_K * ROW_BYTES * (1 + HAS_V_DOT)", "BLOCK_K * ROW_BYTES"),
    "a place is given back under the products": ("s_dot = warpgroup_mma_wait(0, deps=(s_dot,))", "s_dot = s_dot"),
    "no fence before the outputs leave": ("    fence_async_shared()\n    _store", "    _store"),
    "a key is seen twice": ("hidden = whole - (length_kv - BLOCK_K)", "hidden = whole - (length_kv - BLOCK_K) - 1"),
    "c is not brought along with mu": ("        c = c - gl.expand_dims(", "        c + gl.expand_dims("),
    "r is not brought along with mu": ("r = r - step * l", "r = r"),
}


@pytest.mark.parametrize("mistake", ["none", *MISTAKES])
def test_the_emulator_finds(mistake, tmp_path, monkeypatch):
    """What the emulation is worth: a wrong kernel does not pass it."""
    right, wrong = MISTAKES.get(mistake, ("", ""))
    source = Path(attention_gluon.__file__).read_text()
    assert right in source
    path = tmp_path / "mistaken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mistaken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("tests.gluon_emulator.PATIENCE", 5.0 if mistake == "none" else 0.5)
    tensors = time_like(make(n_q=128, n_k=300, d=16))

    def passes() -> bool:
        with emulated(GluonBlocks(64, 2), module) as attention_jvp:
            try:
                have = attention_jvp(*tensors, None, None, EVERYTHING, 0.25)
            except AssertionError:
                return False
        return max(errors(have, tensors, 0.25)) < 4e-3

    assert all(passes() for _ in range(3)) == (mistake == "none")  # who comes first is left to chance


# ------------------------------------------------------------------------------------------ what it is chosen for


def on_meta(*dims: int, dtype=BF16, arch: int = 90, active: bool = True, **fields: object) -> Call:
    """A call of a GPU that is not here; dims are those of q and k, and of v."""
    q, v = (torch.empty(1, 2, 64, d, dtype=dtype, device="meta") for d in (dims[0], dims[-1]))
    return Call(q, q, v, q if active else None, **{"scale": 0.1, "place": Place("cuda", arch)} | fields)


def test_what_is_refused():
    for d in (8, 64, 72, 96, 128):
        for dtype in (BF16, FP16):
            assert attention_gluon.refuses(on_meta(d, dtype=dtype)) is None
    assert attention_gluon.refuses(on_meta(128, active=False)) is None
    q, cu = torch.empty(1, 2, 64, 64, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    for reason, call in (
        ("Hopper", on_meta(64, place=Place("cpu"))),
        ("Hopper", on_meta(64, arch=100)),
        ("float32", on_meta(64, dtype=torch.float32)),
        ("up to 128", on_meta(136)),
        ("multiple of 8", on_meta(60)),
        ("as many columns", on_meta(64, 128)),
        ("no mask", on_meta(64, bias=q)),
        ("no window", on_meta(64, window=CAUSAL)),
        ("no window", on_meta(64, window=Window(left=7))),
        ("scale", on_meta(64, scale=-1.0)),
        ("packed", on_meta(64, packing=(cu, cu))),
        (f"below {GLUON_VALUE_FROM}", on_meta(64, active=False)),
    ):
        assert reason in attention_gluon.refuses(call)


def test_a_gpu_must_have_shown_it_to_be_faster(monkeypatch):
    for call, is_first in ((on_meta(128), True), (on_meta(32), False)):
        assert (attention_gluon.unproven(call) is None) == is_first
        assert (choose.plan(call).forward is choose.GLUON) == is_first
        monkeypatch.setenv("JVPGRAPH_ATTENTION", "gluon")
        assert choose.plan(call).forward is choose.GLUON
        monkeypatch.delenv("JVPGRAPH_ATTENTION")
    monkeypatch.setattr(attention_gluon, "GLUON_IS_FASTER", frozenset({(90, 64, BF16)}))
    assert attention_gluon.unproven(on_meta(64)) is None
    assert "128 columns" in attention_gluon.unproven(on_meta(128))
    assert "float16" in attention_gluon.unproven(on_meta(64, dtype=FP16))
    assert all(kind in (BF16, FP16) for *_, kind in blocks.GLUON_IS_FASTER)


def test_what_lies_in_memory_as_no_tma_takes_it_is_refused():
    """Broadcast, misaligned and transposed inputs, of which the plan says the names."""
    tensors = make(b=2, n_q=130)
    for other in (
        [x[:1].expand_as(x) for x in tensors],
        [x[:, :1].expand_as(x) for x in tensors],
        [torch.cat((x, x), -1)[..., 1:65] for x in tensors],
        [torch.cat((x, x[..., :4]), -1)[..., :64] for x in tensors],
        [x.mT.contiguous().mT for x in tensors],
    ):
        found = choose.plan(Call(*other, place=Place("cuda", 90)))
        assert found.forward is choose.TRITON
        assert "q, k, v, q_dot, k_dot, v_dot cannot be loaded" in found.why["Gluon"]
    one = [*tensors[:4], torch.cat((tensors[4], tensors[4]), -1)[..., 1:65], tensors[5]]
    assert choose.plan(Call(*one, place=Place("cuda", 90))).why["Gluon"].startswith("k_dot cannot")
    assert choose.plan(Call(*tensors, place=Place("cuda", 90))).forward is choose.GLUON


# ------------------------------------------------------------------------------------------------------ compiled


def test_blocks_of_every_head_dim_and_number_of_tangents():
    assert {entry.streamed for entry in GLUON_TABLE} == {2, 3, 4}
    assert [gluon_blocks(d, 2, active=False)[0] for d in (64, GLUON_VALUE_FROM)] == [64, 128]
    for streamed in (2, 3, 4):
        assert gluon_blocks(8, streamed)[0] == gluon_blocks(64, streamed)[0] == 64
        assert gluon_blocks(72, streamed)[0] == gluon_blocks(128, streamed)[0] == 128


@pytest.mark.long
@compiles
@pytest.mark.parametrize(
    "active", [pytest.param(x, marks=[pytest.mark.matrix] * (x not in (0, 3, 4, 6))) for x in range(8)]
)
def test_variants_compile_and_fit(active, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = Flags(*(bool(active >> i & 1) for i in range(3)))
    d, dtype = (64, FP16) if active % 2 else (128, BF16)
    _, tile = gluon_blocks(d, 2 + flags.has_k_dot + flags.has_v_dot, active > 0)
    compiled, log = gate_checks.compile_launch(gate_launches.gluon_launch(d, dtype, tile, flags))
    assert compiled.metadata.shared <= SHARED_MEMORY[90]
    assert "serialized" not in log


# ------------------------------------------------------------------------------------------------ run on a device


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """What is allocated and not written is NaN; other data in every run; no other kernel steps in."""
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)

    def poison(owner: object, name: str) -> None:
        empty = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))

    poison(Tensor, "new_empty")
    poison(torch, "empty_like")

    def another(*_, **__):
        raise AssertionError("attention_triton ran instead")

    monkeypatch.setattr(attention_triton, "attend", another)


def run(tensors: list[Tensor | None], limit: float | None = None) -> tuple[Tensor, ...]:
    d = tensors[0].shape[-1]
    have = calls.attention_jvp(attention_gluon, *tensors, None, None, EVERYTHING, d**-0.5)
    assert max(errors(have, tensors, d**-0.5)) < (limit or TOLERANCE[tensors[0].dtype])
    assert all(x.transpose(1, 2).is_contiguous() for x in (have[0], have[2]))
    value = calls.attention(attention_gluon, *tensors[:3], None, EVERYTHING, d**-0.5, blocks=GluonBlocks(128, 2))
    assert all((a - b).norm() < 1e-2 * b.norm() for a, b in zip(value, have))
    return have


@on_hopper
@pytest.mark.usefixtures("poisoned")
class TestOnHopper:
    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
    @pytest.mark.parametrize("d", [40, 64, 72, 96, 128])
    def test_head_dims(self, d, dtype):
        run(make(b=2, h=4, n_q=200, n_k=333, d=d, dtype=dtype, device="cuda"))

    @pytest.mark.parametrize("d", [64, 128])
    @pytest.mark.parametrize("n_q", [1, 63, 65, 128, 999])
    @pytest.mark.parametrize("n_k", [1, 63, 64, 65, 127, 128, 129, 256, 999, 4096])
    def test_lengths(self, n_q, n_k, d):
        run(make(n_q=n_q, n_k=n_k, d=d, device="cuda"))

    @pytest.mark.parametrize("d", [64, 128])
    def test_other_blocks(self, d):
        tensors = make(h=4, n_q=999, n_k=2000, d=d, device="cuda")
        tile = GluonBlocks(64, 2)
        have = calls.attention_jvp(attention_gluon, *tensors, None, None, EVERYTHING, d**-0.5, blocks=tile)
        assert max(errors(have, tensors, d**-0.5)) < TOLERANCE[BF16]

    @pytest.mark.parametrize("d", [64, 128])
    @pytest.mark.parametrize("active", range(1, 8))
    def test_inputs_that_do_not_move(self, active, d):
        run(make(n_q=300, n_k=999, d=d, active=active, device="cuda"))

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_grouped_heads(self, kv_heads):
        run(make(b=3, h=4, kv_heads=kv_heads, n_q=200, d=128, device="cuda"))

    def test_strides(self):
        tensors = make(b=2, h=4, n_q=130, device="cuda")
        run([x.contiguous() for x in tensors])
        run([torch.cat((x, x), -1)[..., 64:] for x in tensors])
        run([torch.cat((x, x), 2)[:, :, 130:] for x in tensors])
        run([torch.cat((x, x), 2)[:, :, ::2] for x in tensors])
        packed = torch.randn(2, 130, 6, 4, 64, device="cuda", dtype=BF16)  # as one projection gives all
        run([x.transpose(1, 2) for x in packed.unbind(2)])

    def test_what_lies_around_the_tensors_is_not_read_nor_written(self):
        surrounded = []
        for x in make(b=2, h=2, n_q=65, n_k=67, d=72, device="cuda"):
            everything = torch.full((4, 4, 200, 88), math.nan, device="cuda", dtype=BF16)
            surrounded.append(everything[1:3, 1:3, 64 : 64 + x.shape[2], 8:80].copy_(x))
        run(surrounded)

    def test_tangent_common_to_all_keys_costs_no_precision(self):
        tensors = time_like(make(n_q=999, n_k=999, d=128, device="cuda"))
        have = run(tensors)
        assert errors(have, tensors, 128**-0.5)[2] < 4e-3

    def test_twice_the_same_is_the_same(self):
        tensors = make(b=2, h=8, n_q=2000, n_k=1999, d=128, device="cuda")
        first = run(tensors)
        for _ in range(20):
            again = calls.attention_jvp(attention_gluon, *tensors, None, None, EVERYTHING, 128**-0.5)
            assert all(torch.equal(a, b) for a, b in zip(again, first))
