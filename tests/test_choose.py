"""What is planned is what runs: `plan` over calls of all kinds, on GPUs that are not here and on the processor, against
the launches that the same calls come to."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jvpgraph.kernels import choose
from jvpgraph.kernels.call import Call, Cotangents, Outputs, Place, Wanted, pretended_gpu
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window
from tests.test_architecture import SOURCES, own_imports

BF16, FP16 = torch.bfloat16, torch.float16
ARCHS = (75, 80, 89, 90, 100, 120)
# What a candidate is seen by: kernels of ours that are launched, and ops of torch.
SIGNS = {
    choose.GLUON: {"attention_jvp_kernel"},
    choose.TRITON: {"attention_kernel"},
    choose.ATEN_CPU: {"_scaled_dot_product_flash_attention_for_cpu"},
    choose.BLOCKED: {"blocks"},
    choose.FLASH: {"_scaled_dot_product_flash_attention_backward", "_flash_attention_backward"},
    choose.EFFICIENT: {"_scaled_dot_product_efficient_attention_backward"},
    choose.EFFICIENT_UNLESS_HIDDEN: {"_scaled_dot_product_efficient_attention_backward"},
    choose.TRITON_BACKWARD: {"queries_kernel", "keys_kernel"},
    choose.ATEN_CPU_BACKWARD: {"_scaled_dot_product_flash_attention_for_cpu_backward"},
    choose.BLOCKED_BACKWARD: {"blocks"},
}


class Ops(TorchDispatchMode):
    """The fused ops of attention that run, and whether products in blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "flash_attention" in name or "efficient_attention" in name:
            self.seen.add(name)
        elif "bmm" in name:
            self.seen.add("blocks")
        return func(*args, **(kwargs or {}))


class Kind(NamedTuple):
    """Of what kind a call is. What stands first is what Gluon takes, and every other value is drawn now and then."""

    dtype: torch.dtype
    dims: tuple[int, int]
    tangents: tuple[bool, bool, bool]
    layout: str
    mask: str
    window: Window
    scale: float
    kv_heads: int
    lengths: tuple[int, int]
    wanted: Wanted


CHOICES: dict[str, list[Any]] = {
    "dtype": [BF16, FP16, torch.float32, torch.float64],
    "dims": [
        (64, 64),
        (128, 128),
        (32, 32),
        (60, 60),
        (72, 72),
        (112, 112),
        (192, 192),
        (256, 256),
        (264, 264),
        (64, 128),
    ],
    "tangents": [*itertools.product((True, False), repeat=3)],
    "layout": ["rows", "heads", "misaligned", "misaligned rows", "expanded", "columns"],
    "mask": ["none", "padding", "boolean", "same", "float32"],
    "window": [EVERYTHING, CAUSAL, Window(5, 3), Window(left=7)],
    "scale": [0.1, -0.1, 0.0],
    "kv_heads": [4, 2],
    "lengths": [(160, 160), (64, 300), (70, 0)],
    "wanted": [Wanted(), Wanted(from_tangent=True), Wanted(from_lse=True), Wanted(True, True), Wanted(bias=True)],
}


def kinds(seed: int, count: int) -> list[Kind]:
    """Half of the fields as Gluon or ATen's flash take them, so that those are no exception."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        plain = rng.choice([0.0, 0.85, 0.95])
        free = {"dtype": 0.3, "dims": 1.0, "tangents": 1.0, "wanted": 1.0}
        drawn.append(
            Kind(
                **{
                    name: rng.choice(values) if rng.random() < free.get(name, 1 - plain) else values[0]
                    for name, values in CHOICES.items()
                }
            )
        )
    return drawn


def rows(kind: Kind, heads: int, length: int, dim: int, device: str) -> Tensor:
    made = {"device": device, "dtype": kind.dtype}
    return {
        "rows": lambda: torch.ones(2, length, heads, dim, **made).transpose(1, 2),
        "heads": lambda: torch.ones(2, heads, length, dim, **made),
        "misaligned": lambda: torch.ones(2, heads, length, dim + 8, **made)[..., 1 : dim + 1],
        "misaligned rows": lambda: torch.ones(2, heads, length, dim + 3, **made)[..., :dim],
        "expanded": lambda: torch.ones(1, heads, length, dim, **made).expand(2, -1, -1, -1),
        "columns": lambda: torch.ones(2, heads, dim, length, **made).mT,
    }[kind.layout]()


def made(kind: Kind, device: str, place: Place) -> tuple[Call, Outputs, Cotangents]:
    """The call, and what a backward of it is given; on a device, but as if it were at the place."""
    n_q, n_k = kind.lengths
    q = rows(kind, 4, n_q, kind.dims[0], device)
    k, v = (rows(kind, kind.kv_heads, n_k, dim, device) for dim in kind.dims)
    dots = [x if active else None for x, active in zip((q, k, v), kind.tangents)]
    mask = None
    if kind.mask != "none":
        shape = (2, 1, 1, n_k) if kind.mask == "padding" else (2, 4, n_q, n_k)
        dtype = {"same": kind.dtype, "float32": torch.promote_types(kind.dtype, torch.float32)}.get(
            kind.mask, torch.bool
        )
        mask = torch.ones(shape, dtype=dtype, device=device)
    wanted = kind.wanted if mask is not None and mask.is_floating_point() else kind.wanted._replace(bias=False)
    call = Call(q, k, v, *dots, mask, None, kind.window, kind.scale, wanted=wanted, place=place)
    o = torch.ones(2, n_q, 4, kind.dims[1], device=device, dtype=kind.dtype).transpose(1, 2)
    lse = torch.ones(2, 4, n_q, device=device, dtype=torch.promote_types(kind.dtype, torch.float32))
    grads = Cotangents(o, lse if wanted.from_lse else None, o if wanted.from_tangent else None)
    return call, Outputs(o, lse, o, lse), grads


def check(call: Call, outs: Outputs, grads: Cotangents, launched: list[Any]) -> choose.Plan:
    """That the forward and the backward which are planned are what runs."""
    found = choose.plan(call)
    for candidate, run in (
        (found.forward, lambda: choose.attend(call)),
        (found.backward, lambda: choose.differentiate(call, outs, grads)),
    ):
        launched.clear()
        with Ops() as ops:
            run()
        seen = ops.seen | {launch.name for launch in launched}
        if call.is_empty:
            assert candidate in (choose.BLOCKED, choose.BLOCKED_BACKWARD)
            assert not seen
        else:
            assert seen
            assert seen <= SIGNS[candidate], (str(found), seen)
    return found


@pytest.fixture
def never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a bias hides rows is not seen of tensors without memory."""
    monkeypatch.setattr(choose, "needs_own_sums", lambda bias, lse: False)
    # a torch without CUDA does not know what this calls
    monkeypatch.setattr("jvpgraph.kernels.aten_cuda._additive_aligned", lambda q, k, bias: bias)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has replaced the compiler")
@pytest.mark.usefixtures("never_hidden")
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_planned_is_launched_on_gpus_that_are_not_here(arch):
    pytest.importorskip("triton")
    from jvpgraph.kernels.recorded import recording

    plans = []
    for kind in kinds(arch, 120 if arch == 90 else 50):
        with recording(arch) as launched:
            plans.append(check(*made(kind, "meta", Place("cuda", arch)), launched))
    forwards, backwards = {x.forward for x in plans}, {x.backward for x in plans}
    if arch == 75:
        assert (forwards, backwards) == ({choose.BLOCKED}, {choose.BLOCKED_BACKWARD})
        return
    assert forwards == {choose.TRITON, choose.BLOCKED} | ({choose.GLUON} if arch == 90 else set())
    assert backwards >= {choose.FLASH, choose.EFFICIENT, choose.TRITON_BACKWARD, choose.BLOCKED_BACKWARD}
    if arch == 90:  # the reasons of all
        reasons = " ".join(x.why.get("Gluon", "") for x in plans)
        for part in ("Gluon's takes no", "a multiple of 8", "no mask", "cannot be loaded", "below 104", "scale is"):
            assert part in reasons


def test_what_is_planned_runs_on_the_processor():
    small = {"dims": [(8, 8), (8, 5)], "lengths": [(20, 20), (7, 300), (5, 0)]}
    plans = []
    for seed in range(60):
        rng = random.Random(seed)
        kind = kinds(seed, 1)[0]._replace(**{name: rng.choice(values) for name, values in small.items()})
        plans.append(check(*made(kind, "cpu", Place("cpu")), []))
    assert {x.forward for x in plans} == {choose.ATEN_CPU, choose.BLOCKED}
    assert {x.backward for x in plans} == {choose.ATEN_CPU_BACKWARD, choose.BLOCKED_BACKWARD}


def example(device: str = "meta", place: Place = Place("cuda", 90), d: int = 64, **fields: Any) -> Call:  # noqa: B008
    q = torch.ones(1, 2, 48, d, dtype=BF16, device=device)
    return Call(q, q, q, **{"q_dot": q, "place": place} | fields)


def test_a_plan_is_told_as_it_is():
    """Of a value of 64 columns on Hopper, say, or of misaligned rows."""
    assert str(choose.plan(example())) == "Gluon, backward by ATen's flash"
    value = choose.plan(example(q_dot=None))
    assert str(value) == "Triton, backward by ATen's flash"
    assert value.why == {"Gluon": "Gluon's is slower than Triton's for the value alone below 104 columns"}
    odd = torch.ones(1, 2, 48, 65, dtype=BF16, device="meta")[..., 1:]
    misaligned = choose.plan(example(q_dot=odd))
    assert str(misaligned) == "Triton, backward by ATen's flash"
    assert misaligned.why["Gluon"] == "q_dot cannot be loaded by the TMA: broadcast, misaligned or transposed"
    bias = torch.ones(1, 1, 48, 48, device="meta")
    assert (
        str(choose.plan(example(bias=bias))) == "Triton, backward by Triton: a torch.float32 bias beside torch.bfloat16"
    )
    on_80 = example(place=Place("cuda", 80), d=128)
    assert choose.describe(on_80, differentiable_tangent=True) == (
        "Triton, backward by ATen's flash; through the tangent by blocks of torch ops: "
        "Triton's has no tile that fits sm_80 at 128 columns"
    )
    cu = torch.tensor([0, 48], dtype=torch.int32)
    packed = choose.plan(example(packing=(cu, cu)))
    assert str(packed) == "Triton, backward by ATen's flash, sequence by sequence"
    assert packed.why["Gluon"].endswith("no packed sequences")


def test_a_plan_for_a_gpu_that_is_not_here():
    """Of tensors on meta, and of fakes."""
    call = example(place=Place("meta"))
    assert choose.describe(call) == "a kernel that depends on the device: this one is meta"
    with pretended_gpu(90):
        assert choose.describe(replace(call, place=Place("")))[:5] == "Gluon"
    with FakeTensorMode():
        assert choose.plan(example("cpu")).forward is choose.GLUON
        odd = torch.ones(1, 2, 48, 72, dtype=BF16)[..., 4:68]
        assert choose.plan(example("cpu", q_dot=odd)).forward is choose.TRITON


def test_an_implementation_can_be_asked_for(monkeypatch):
    plain, unproven = example(), example(d=32)
    assert choose.plan(unproven).forward is choose.TRITON
    for asked, forward in (("gluon", choose.GLUON), ("triton", choose.TRITON), ("blocked", choose.BLOCKED)):
        monkeypatch.setenv("JVPGRAPH_ATTENTION", asked)
        found = choose.plan(unproven)
        assert found.forward is choose.plan(plain).forward is forward
        assert (found.backward is choose.BLOCKED_BACKWARD) == (asked == "blocked")
    assert found.why["Gluon"] == "JVPGRAPH_ATTENTION asks for blocked"
    assert choose.plan(example("cpu", Place("cpu"), q_dot=None)).forward is choose.ATEN_CPU
    monkeypatch.setenv("JVPGRAPH_ATTENTION", "block")
    with pytest.raises(ValueError, match="'block', but has to be gluon, triton or blocked"):
        choose.plan(plain)


def test_a_plan_can_be_forced():
    call = example("cpu", Place("cpu"), q_dot=None)
    assert choose.plan(call).forward is choose.ATEN_CPU
    with choose.forced(choose.Plan(choose.BLOCKED, choose.BLOCKED_BACKWARD)), Ops() as ops:
        choose.attend(call)
        assert choose.plan(call).forward is choose.BLOCKED
    assert ops.seen == {"blocks"}
    assert choose.plan(call).forward is choose.ATEN_CPU


@pytest.mark.parametrize("hides", [False, True])
def test_who_takes_p_from_lse_does_not_where_a_bias_hides_rows(hides):
    q = torch.randn(1, 2, 8, 4)
    bias = torch.zeros(1, 1, 8, 8).index_fill_(2, torch.tensor([3]), -1e9 if hides else 0.0)
    call = Call(q, q, q, bias=bias, place=Place("cpu"))
    assert choose.plan(call).backward is choose.ATEN_CPU_BACKWARD
    outs = choose.attend(call)
    with Ops() as ops:
        choose.differentiate(call, outs, Cotangents(q))
    assert (ops.seen == {"blocks"}) == hides


def test_packed_sequences_are_planned_one_by_one():
    """Each by its own lengths: flash takes a window only of as many queries as keys."""
    cu_q, cu_kv = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 9], [0, 5, 12]))
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 12, 4)
    call = Call(q, k, k, window=CAUSAL, packing=(cu_q, cu_kv), place=Place("cpu"))
    found = choose.plan(call)
    assert (found.forward, found.backward) == (choose.EACH, choose.EACH_BACKWARD)
    assert str(found).endswith(", sequence by sequence")
    outs = choose.attend(call)
    grads = choose.differentiate(call, outs, Cotangents(torch.ones_like(q)))
    for at_q, at_kv in ((slice(0, 5), slice(0, 5)), (slice(5, 9), slice(5, 12))):
        own = Call(q[:, :, at_q], k[:, :, at_kv], k[:, :, at_kv], window=CAUSAL)
        mine = choose.attend(own)
        torch.testing.assert_close(outs.o[:, :, at_q], mine.o)
        torch.testing.assert_close(
            grads.k[:, :, at_kv], choose.differentiate(own, mine, Cotangents(torch.ones_like(mine.o))).k
        )


def test_every_candidate_is_known_to_the_test():
    everything = {*choose.FORWARDS, *choose.BACKWARDS, *choose.THROUGH_TANGENT}
    assert set(SIGNS) == everything - {choose.EACH, choose.EACH_BACKWARD}
    assert len({x.name for x in choose.BACKWARDS}) == len(choose.BACKWARDS)


def test_implementations_do_not_know_one_another():
    modules = {x.run.__module__ for x in (choose.ATEN_CPU, choose.BLOCKED, choose.FLASH, choose.BLOCKED_BACKWARD)}
    modules |= {f"jvpgraph.kernels.{name}" for name in ("attention_gluon", "attention_triton", "backward_triton")}
    for module in modules:
        imported = {name for name, _ in own_imports(SOURCES[module])}
        assert not imported & (modules | {choose.__name__}), module
