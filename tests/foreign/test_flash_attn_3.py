"""The functions, autograd.Functions and op of flash_attn 3, which stands in a module of its own."""

from __future__ import annotations

import pytest
import torch

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from tests.foreign.stand_ins import older
from tests.foreign.test_swaps import (
    C,
    D,
    H,
    Net,
    band,
    blocks,
    both_ways,
    check,
    cu,
    importing,
    lengths,
    packed,
    plain,
    qkv,
)

pytestmark = pytest.mark.slow
of_flash_attn_interface = importing("flash_attn_interface")


def heads(q, k, v):
    """q, k and v as one tensor, by heads."""
    return torch.cat([q, k, v], 2)


def with_lse(result):
    o, lse = result
    return o * lse.mT[..., None]


def times_lse(q, k, v):
    k_all = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = q.transpose(1, 2) @ k_all.transpose(1, 2).mT * q.shape[-1] ** -0.5
    return plain(q, k, v) * s.logsumexp(-1).mT[..., None]


def causal(q, k, v):
    return plain(q, k, v, band(q.shape[1], k.shape[1], right=0))


FORMS = {
    "plain": (lambda f, q, k, v: f.flash_attn_func(q, k, v), plain, {}),
    "causal, fewer queries": (lambda f, q, k, v: f.flash_attn_func(q, k, v, None, True), causal, {"last": 5}),
    "window, groups, scale": (
        lambda f, q, k, v: f.flash_attn_func(q, k, v, softmax_scale=0.3, window_size=(3, 2), num_splits=2),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 3, 2), scale=0.3),
        {"kv_heads": 2},
    ),
    "window, fewer queries": (
        lambda f, q, k, v: f.flash_attn_func(q, k, v, window_size=[4, 0], pack_gqa=True, deterministic=True),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 4, 0)),
        {"last": 7, "kv_heads": 1},
    ),
    "narrow values": (
        lambda f, q, k, v: torch.cat([f.flash_attn_func(q, k, half) for half in v.chunk(2, -1)], -1),
        plain,
        {},
    ),
    "logsumexp": (lambda f, q, k, v: with_lse(f.flash_attn_func(q, k, v, return_attn_probs=True)), times_lse, {}),
    "qkv": (lambda f, q, k, v: f.flash_attn_qkvpacked_func(qkv(q, k, v), None, True), causal, {}),
    "qkv by heads": (
        lambda f, q, k, v: f.flash_attn_qkvpacked_func(heads(q, k, v), num_heads_q=H, softmax_scale=0.3),
        lambda q, k, v: plain(q, k, v, scale=0.3),
        {"kv_heads": 2},
    ),
    "sequences": (packed, plain, {}),
    "causal sequences": (lambda f, q, k, v: packed(f, q, k, v, causal=True), causal, {"kv_heads": 2}),
    "window in sequences": (
        lambda f, q, k, v: packed(f, q, k, v, window_size=(2, 1), softmax_scale=0.3, seqused_q=None),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 2, 1), scale=0.3),
        {},
    ),
    "Function": (lambda f, q, k, v: f.FlashAttnFunc.apply(q, k, v, None, True), causal, {}),
    "Function with all arguments": (
        lambda f, q, k, v: f.FlashAttnFunc.apply(
            *(q, k, v, 0.3, False, None, None, None, None, (3, 2), 0, 0.0, 1, None, False, 0, False)
        ),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 3, 2), scale=0.3),
        {},
    ),
    "Function's logsumexp": (
        lambda f, q, k, v: with_lse(
            f.FlashAttnFunc.apply(
                *(q, k, v, None, False, None, None, None, None, (-1, -1), 0, 0.0, 1, None, False, 0, True)
            )
        ),
        times_lse,
        {},
    ),
    "Function of qkv": (lambda f, q, k, v: f.FlashAttnQKVPackedFunc.apply(qkv(q, k, v), None, True), causal, {}),
    "Function of sequences": (
        lambda f, q, k, v: f.FlashAttnVarlenFunc.apply(
            *(q[0], k[0], v[0], ends := cu([q.shape[1]]), ends, None, None, q.shape[1], q.shape[1], None, True)
        )[None],
        causal,
        {},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_functions(of_flash_attn_interface, form):
    flash = of_flash_attn_interface("flash_attn_interface")
    call, reference, how = FORMS[form]
    sizes = ((1, 12), (1, 17)) if form == "Function of sequences" else ((2, 12), (3, 17))
    calls = 2 if form == "narrow values" else 1
    dual = check(lambda q, k, v: call(flash, q, k, v), reference, sizes=sizes, **how)
    assert all(report.fused == calls and len(report.swapped) == calls for report in dual.reports)
    assert "flash_attn_3" in dual.reports[0].swapped[0][2]


@pytest.mark.parametrize("name", ["flash_attn_func", "FlashAttnFunc", "flash_attn_varlen_func", "FlashAttnVarlenFunc"])
def test_older_versions_always_return_the_logsumexp(of_flash_attn_interface, monkeypatch, name):
    """For which models write [0]."""
    flash = of_flash_attn_interface("flash_attn_interface")
    argument = "return_softmax" if name.startswith("Flash") else "return_attn_probs"
    monkeypatch.setattr(flash, name, older(getattr(flash, name), argument))

    def call(q, k, v):
        function = getattr(flash, name)
        function = function.apply if name.startswith("Flash") else function
        if "arlen" not in name:
            return function(q, k, v, None, True)[0]
        ends, n, used = cu([q.shape[1]] * q.shape[0]), q.shape[1], (None, None)
        lengths = (*used, n, n) if name.startswith("Flash") else (n, n, *used)
        return function(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, *lengths, None, True)[0].view_as(q)

    check(call, causal)


def test_causal_sequences_of_several_lengths_are_counted_from_their_ends(of_flash_attn_interface):
    """Called by names, as models do that run with either version."""
    flash = of_flash_attn_interface("flash_attn_interface")

    def call(q, k, v, cu_q, cu_k):
        o = flash.flash_attn_varlen_func(
            q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_q=None, seqused_k=None,
            max_seqlen_q=9, max_seqlen_k=9, softmax_scale=0.3, causal=True, deterministic=False,
        )  # fmt: skip
        return o[None]

    def reference(q, k, v, cu_q, cu_k):
        seen = blocks(cu_q.diff().tolist(), cu_k.diff().tolist(), lambda n, m: band(n, m, right=0))
        return plain(q, k, v, seen, scale=0.3)

    others = lambda n: {"cu_q": cu([2, 1, 4]), "cu_k": cu(lengths(n))}  # noqa: E731
    check(call, reference, sizes=((1, 12), (1, 20)), others=others, last=7, kv_heads=2)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_in_bfloat16(of_flash_attn_interface, backend):
    flash = of_flash_attn_interface("flash_attn_interface")
    call = lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True)  # noqa: E731
    check(call, causal, dtype=torch.bfloat16, backend=backend, kv_heads=2)


OP = {"softmax_scale": D**-0.5, "causal": True}


def dense(q, k, v):
    return torch.ops.flash_attn_3._flash_attn_forward(q, k, v, **OP)


def in_sequences(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    ends = cu([12, 12])
    lengths = {"max_seqlen_q": 12, "max_seqlen_k": 12}
    o, lse, *_ = torch.ops.flash_attn_3._flash_attn_forward(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, **lengths, **OP
    )
    return o.unflatten(0, (2, 12)), lse.unflatten(1, (2, 12)).transpose(0, 1)


@both_ways
@pytest.mark.parametrize("call", [dense, in_sequences])
def test_the_op_called_directly(backend, call):
    """With the logsumexp, whose tangent counts."""
    net, exact = Net(lambda *qkv: with_lse(call(*qkv)[:2])), Net(causal_times_lse).double()
    x, t = torch.randn(2, 12, C), torch.rand(2)
    wanted = torch.func.jvp(exact, (x.double(), t.double()), (x.double(), torch.zeros(2).double()))
    with torch.no_grad():
        got = jvpgraph.transform(net, backend=backend)(x, t, tangents={"x": x})
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def causal_times_lse(q, k, v):
    seen = band(q.shape[1], k.shape[1], right=0)
    s = (q.transpose(1, 2) @ k.transpose(1, 2).mT * D**-0.5).masked_fill(~seen, -1e300)
    return plain(q, k, v, seen) * s.logsumexp(-1).mT[..., None]


REFUSED = {
    "qv": (torch.ones(1, 6, H, D), "scores have a second product"),
    "q_descale": (torch.ones(1, H), "scales of quantized operands"),
    "attention_chunk": (4, "keys are limited to chunks"),
    "softcap": (3.0, "capped by a tanh"),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["flash_attn_func", "FlashAttnFunc"])
@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_refused(of_flash_attn_interface, argument, name):
    function = getattr(of_flash_attn_interface("flash_attn_interface"), name)
    value, reason = REFUSED[argument]

    def call(q, k, v):
        given = {"qv": None, "q_descale": None, "attention_chunk": 0, "softcap": 0.0} | {argument: value}
        if name == "flash_attn_func":
            return function(q, k, v, **given)
        qv, scale, chunk, softcap = given.values()
        return function.apply(q, k, v, None, False, qv, scale, None, None, (-1, -1), chunk, softcap)

    dual, x = jvpgraph.transform(Net(call), backend="eager"), torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match=reason) as told:
        dual(x, torch.rand(1), tangents={"x": x})
    assert f"flash_attn_func ({argument})  test_flash_attn_3.py:" in str(told.value)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("argument", ["seqused_q", "seqused_k"])
def test_sequences_of_a_cache_are_refused(of_flash_attn_interface, argument):
    flash = of_flash_attn_interface("flash_attn_interface")
    dual = jvpgraph.transform(Net(lambda q, k, v: packed(flash, q, k, v, **{argument: cu([6])[1:]})), backend="eager")
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match=rf"flash_attn_varlen_func \({argument}\).*slots of a cache"):
        dual(x, torch.rand(1), tangents={"x": x})


@pytest.mark.sampled(1)
@both_ways
@pytest.mark.parametrize("argument", ["qv", "attention_chunk", "softcap", "k_new", "seqused_k", "cu_seqlens_q"])
def test_what_is_refused_of_the_op(backend, argument):
    values = {"attention_chunk": 4, "softcap": 3.0, "cu_seqlens_q": cu([6])}

    def call(q, k, v):
        given = {argument: values.get(argument, k)}
        if argument == "cu_seqlens_q":
            q = q.flatten(0, 1)
        return torch.ops.flash_attn_3._flash_attn_forward(q, k, v, **given)[0].view_as(v)

    reason = "queries alone are packed" if argument == "cu_seqlens_q" else f"{argument}: "
    dual, x = jvpgraph.transform(Net(call), backend=backend), torch.randn(1, 6, C)
    with torch.no_grad(), pytest.raises(UnsupportedOp, match=reason):
        dual(x, torch.rand(1), tangents={"x": x})


def test_qkv_by_heads_needs_to_know_how_many_are_q(of_flash_attn_interface):
    flash = of_flash_attn_interface("flash_attn_interface")
    dual = jvpgraph.transform(Net(lambda q, k, v: flash.flash_attn_qkvpacked_func(heads(q, k, v))), backend="eager")
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match="it is not said how many are q"):
        dual(x, torch.rand(1), tangents={"x": x})
