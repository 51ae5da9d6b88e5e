"""The backward kernels against torch's own derivatives of the float64 specification: on a GPU where there is one, else
under Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from jvpgraph.kernels import attention_blocked, backward_triton, gate_launches
from jvpgraph.kernels.blocks import (
    BACKWARD_TABLE,
    LIKE_AMPERE,
    BackwardBlocks,
    BackwardEntry,
    Sweeps,
    backward_sweeps,
)
from jvpgraph.kernels.call import Call, Cotangents, Outputs, Place, Wanted
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window
from tests import calls
from tests.interpreter import (  # noqa: F401 - fixtures
    DEVICE,
    INTERPRETED,
    compile_only,
    poisoned_memory,
    repaired_bfloat16,
    runs_kernels,
    share,
)
from tests.joint import ERROR
from tests.test_tangent_backward import NAMES, OUTPUTS, TOLERANCE, Case, error, expected, joint_case, make

pytestmark = pytest.mark.usefixtures("repaired_bfloat16", "poisoned_memory")
BF16, FP16 = torch.bfloat16, torch.float16
SMALL = BackwardBlocks(32, 32, 4, 1)
ONLY_FOR_ROWS = [
    entry
    for entry, sweeps in BACKWARD_TABLE.items()
    if entry.arch not in LIKE_AMPERE and backward_sweeps(*entry[:3]) != sweeps
]


def computed(case: Case, blocks: BackwardBlocks | Sweeps | None = SMALL) -> dict[str, Tensor | None]:
    """The gradients by name, from the forward in blocks of torch."""
    inputs = {name: None if x is None else x.to(DEVICE) for name, x in case.inputs.items()}
    tensors: tuple[Any, ...] = tuple(inputs[name] for name in NAMES)
    outs = calls.attention_jvp(attention_blocked, *tensors, case.window, case.scale)
    cotangents = tuple(None if x is None else x.to(DEVICE) for x in (case.cotangents[name] for name in OUTPUTS))
    if isinstance(blocks, BackwardBlocks):
        blocks = Sweeps(*(blocks,) * (4 if case.window == CAUSAL else 3))
    how = (case.window, case.scale)
    got = calls.attention_jvp_backward(backward_triton, cotangents, tensors[:7], outs, how, sweeps=blocks)
    return {name: None if x is None else x.cpu() for name, x in zip(NAMES, got)}


def check(case: Case, blocks: BackwardBlocks | Sweeps | None = SMALL) -> None:
    q = case.inputs["q"]
    assert q is not None
    got, want = computed(case, blocks), expected(case)
    for name in NAMES[:6]:
        have, should = got[name], want[name]
        assert (have is None) == (should is None), name
        if have is None or should is None:
            continue
        assert have.shape == should.shape, name
        assert have.dtype == q.dtype, name
        assert have.transpose(1, 2).is_contiguous(), name
        assert error(have, should) <= TOLERANCE[q.dtype], f"{name}: {error(have, should):.1e}"


MISSING = [(), ("o",), ("o_dot",), ("lse", "lse_dot"), ("o_dot", "lse_dot"), ("o", "o_dot", "lse"), OUTPUTS]


@runs_kernels
@pytest.mark.parametrize(
    ("tangents", "missing"), share(2, list(itertools.product((False, True), repeat=3)), MISSING), ids=str
)
def test_every_subset_of_tangents_and_of_cotangents(tangents, missing):
    case = make(b=1, h=2, kv_heads=1, n_q=20, n_k=35, d=16).to(FP16)
    case = case.without(*(name for name, given in zip(("q_dot", "k_dot", "v_dot"), tangents) if not given))
    check(case.without(*missing))


@runs_kernels
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    share(2, [(1, 1), (1, 65), (63, 65), (65, 63), (64, 128), (130, 1), (999, 65), (65, 999)], [FP16, BF16]),
    ids=str,
)
def test_lengths(lengths, dtype):
    n_q, n_k = lengths
    check(make(b=1, h=1, n_q=n_q, n_k=n_k, d=16).to(dtype), BackwardBlocks(64, 64, 4, 1))


@runs_kernels
@pytest.mark.parametrize(("d", "d_v"), [(8, 24), (40, 40), (72, 72), (80, 48), (96, 96), (112, 64), (128, 128)])
def test_head_dims(d, d_v):
    case = make(b=1, h=1, n_q=33, n_k=40, d=d, d_v=d_v).to(FP16)
    check(case)
    check(case, None)


@runs_kernels
@pytest.mark.parametrize(
    ("window", "lengths"),
    share(
        2,
        [EVERYTHING, CAUSAL, Window(20, 5), Window(left=20), Window(0, 0), Window(1 << 40, 3)],
        [(70, 70), (40, 100), (100, 40)],
    ),
    ids=str,
)
def test_windows(window, lengths):
    """With queries that see no key, and keys that no query sees."""
    n_q, n_k = lengths
    check(make(b=1, h=2, kv_heads=1, n_q=n_q, n_k=n_k, d=16, window=window).to(FP16))


def biases(kind: str, b: int, h: int, n_q: int, n_k: int) -> Tensor:
    seen = torch.rand(b, h, n_q, n_k) > 0.3
    return {
        "padding": seen[:, :1, :1],
        "boolean": seen,
        "additive": torch.randn(b, h, n_q, n_k, dtype=torch.float64),
        "hidden": torch.zeros(b, 1, n_q, n_k, dtype=torch.float64).masked_fill_(~seen[:, :1], -math.inf),
        "per query": torch.randn(1, h, n_q, 1, dtype=torch.float64),
    }[kind]


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "window", "dtype"),
    share(2, ["padding", "boolean", "additive", "hidden", "per query"], [EVERYTHING, CAUSAL], [FP16, BF16]),
    ids=str,
)
def test_biases(kind, window, dtype):
    bias = biases(kind, 2, 2, 40, 50)
    if bias.shape[2] == 40 and kind != "per query":
        bias[:, :, 3] = False if bias.dtype == torch.bool else -math.inf
    case = make(b=2, h=2, kv_heads=1, n_q=40, n_k=50, d=16, bias=bias, window=window).without("bias_dot").to(dtype)
    check(case)


@runs_kernels
@pytest.mark.parametrize(("entry", "mask"), share(3, ONLY_FOR_ROWS, [torch.bool, BF16, torch.float32]), ids=str)
def test_tiles_for_masks_with_rows(entry, mask):
    """What has an entry because its tiles without a mask would not fit, with these tiles."""
    window = CAUSAL if entry.active else EVERYTHING
    d = entry.head_dim - 24
    bias = biases("boolean" if mask == torch.bool else "hidden", 1, 2, 66, 100)
    bias[:, :, 3] = False if mask == torch.bool else -math.inf
    case = make(b=1, h=2, kv_heads=1, n_q=66, n_k=100, d=d, bias=bias, window=window).without("bias_dot").to(BF16)
    if not entry.active:
        case = case.without("q_dot", "k_dot", "v_dot", "o_dot", "lse_dot")
    check(replace(case, inputs=case.inputs | {"bias": bias.to(mask)}), BACKWARD_TABLE[entry])


@runs_kernels
def test_rows_that_see_no_key_get_exact_zeros():
    bias = torch.rand(1, 2, 40, 50) > 0.3
    bias[:, :, 3] = False
    bias[..., 7] = False
    case = make(b=1, h=2, n_q=40, n_k=50, d=16, bias=bias).to(FP16)
    for name in ("lse", "lse_dot"):
        case.cotangents[name][:, :, 3] = math.nan  # what a merge of parts hands back
    got = computed(case)
    assert all((got[name][:, :, 3] == 0).all() for name in ("q", "q_dot"))
    assert all((got[name][:, :, 7] == 0).all() for name in ("k", "v", "k_dot", "v_dot"))


@runs_kernels
def test_any_strides():
    case = make(b=2, h=2, n_q=40, n_k=35, d=16).to(FP16)
    q, k, v = (case.inputs[name] for name in NAMES[:3])
    inputs = case.inputs | {
        "q": q.contiguous(),
        "k": torch.cat((k, k), -1)[..., 16:],
        "v": v.mT.contiguous().mT,
        "q_dot": torch.cat((q, q), -1)[..., 1:17],
    }
    check(replace(case, inputs=inputs))
    shared = case.cotangents | {"o": torch.ones(1, dtype=FP16).expand_as(q), "o_dot": q[:1, :1].expand_as(q)}
    check(replace(case, inputs=inputs, cotangents=shared))


@runs_kernels
@pytest.mark.parametrize(("dtype", "name"), share(2, [FP16, BF16], ["k", "v", "k_dot", "v_dot"]), ids=str)
def test_what_all_keys_share_costs_no_precision(dtype, name):
    """30 standard deviations, as the derivative with respect to time: the gradients see what keys do not share."""
    case = make(b=1, h=1, n_q=70, n_k=300, d=32)
    case.inputs[name] += 30 * torch.randn_like(case.inputs[name][:, :, :1])
    if name == "k":
        case = replace(case, scale=0.02)  # else one key takes all the weight
    check(case.to(dtype), BackwardBlocks(64, 64, 4, 1))


@runs_kernels
@pytest.mark.parametrize("shift", [3.0, 30.0])
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_attention_costs_no_precision(text_first, shift):
    """Of queries whose weights are spread. Where they lie on a text without the shift, dq errs by 1e-2 at 30 standard
    deviations, since what rounding added is taken back at the mean of all keys."""
    case = joint_case(text_first, shift)
    got, want = computed(case, BackwardBlocks(64, 64, 4, 1)), expected(case)
    assert max(error(got[name], want[name]) for name in NAMES[:6]) < ERROR


@pytest.mark.long
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="pretends a GPU to Triton's compiler")
def test_a_new_length_compiles_nothing(monkeypatch, tmp_path):
    """What the host function launches is what the gate compiles, once for all lengths: on a GPU that is pretended."""
    entry, names = BackwardEntry(90, 64, True), ("sums", "queries", "keys", "values")
    gated = {x: gate_launches.backward_launch(entry, x, getattr(BACKWARD_TABLE[entry], x)).source for x in names}
    of_queries = compile_only(monkeypatch, backward_triton, "queries_kernel", tmp_path)
    of_keys = compile_only(monkeypatch, backward_triton, "keys_kernel", tmp_path)
    for n_q, n_k, b in ((100, 65, 1), (999, 1999, 2), (128, 160, 3), (65, 165, 1)):
        case = make(b=b, h=2, n_q=n_q, n_k=n_k, d=64).to(BF16)
        tensors = [case.inputs[name] for name in NAMES[:7]]
        grads = Cotangents(*(case.cotangents[name] for name in OUTPUTS))
        lse = torch.zeros(b, 2, n_q)
        call = Call(*tensors, scale=0.1, wanted=Wanted(True, True), place=Place("cuda", 90))
        backward_triton.differentiate(call, Outputs(grads.o, lse, grads.o_dot, lse), grads)
    for compiled, names in ((of_queries, ("sums", "queries")), (of_keys, ("keys", "values"))):
        assert len({id(x) for x in compiled}) == len(names)
        for launched, name in zip(compiled, names):
            assert launched.src.signature == gated[name].signature
            assert launched.src.constants == gated[name].constants
            assert launched.src.attrs == gated[name].attrs


def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, arch: int = 90, **wanted: bool) -> str:
    dots = (q, k, v) if wanted.get("from_tangent") else (None, None, None)
    call = Call(q, k, v, *dots, mask, wanted=Wanted(**wanted), place=Place("cuda", arch))
    return backward_triton.refuses(call) or ""


def test_what_is_refused():
    q = torch.empty(1, 2, 5, 64, dtype=BF16)
    assert not refusal(q, q, q)
    assert "float32" in refusal(q.float(), q.float(), q.float())
    assert "nothing" in refusal(q, q[:, :, :0], q[:, :, :0])
    assert "gradient" in refusal(q, q, q, bias=True)
    wide = torch.empty(1, 2, 5, 256, dtype=BF16)
    assert "no tile" in refusal(q, q, wide)
    with_dot = Call(q, q, q, bias=q, bias_dot=q, wanted=Wanted(from_tangent=True), place=Place("cuda", 90))
    assert "no tangent" in backward_triton.refuses(with_dot)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    assert "packed" in backward_triton.refuses(Call(q, q, q, packing=(cu, cu), place=Place("cuda", 90)))


def test_a_mask_with_rows_has_tiles_of_its_own():
    """It is staged through shared memory, where a mask of padded keys is not."""
    q, rows, keys = (torch.empty(1, 2, n, 64, dtype=BF16) for n in (64, 64, 1))
    assert [backward_triton.row_bytes(x) for x in (None, keys, rows, rows.bool(), rows.float())] == [0, 0, 2, 1, 4]
    wide = torch.empty(1, 2, 64, 128, dtype=BF16)
    for arch, supported in ((80, False), (86, False), (89, False), (90, True), (100, True), (120, False)):
        for mask in (None, keys, rows, rows.bool(), rows.float()):
            assert not refusal(q, q, q, mask, arch, from_tangent=True)
            assert not refusal(wide, wide, wide, mask, arch)
            why_not = refusal(wide, wide, wide, mask, arch, from_tangent=True)
            assert bool(why_not) != supported
            assert supported or f"sm_{arch} at 128 columns" in why_not
