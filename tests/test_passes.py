"""The passes on AOTAutograd's graphs: a graph of a few nodes before, and after; twice is once."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.distributed.tensor  # its collectives
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.testing._internal.distributed.fake_pg import FakeStore

from jvpgraph.errors import UnsupportedOp
from jvpgraph.graph.meta import INSERTED_META, TANGENT_META
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.check_gradients import check_gradients
from jvpgraph.passes.count import count
from jvpgraph.passes.decompose import decompose
from jvpgraph.passes.differentiate_attention import differentiate_attention
from jvpgraph.passes.drop_dead_tangents import drop_dead_tangents
from jvpgraph.passes.fuse_aten_attention import fuse_aten_attention
from jvpgraph.passes.fuse_attention import fuse_attention
from jvpgraph.passes.keep_attention_values import keep_attention_values
from jvpgraph.passes.keep_outputs_apart import keep_outputs_apart
from jvpgraph.passes.note_outputs import note_outputs
from jvpgraph.passes.pair_collectives import pair_collectives
from jvpgraph.passes.round_products import round_products
from jvpgraph.passes.write_out_copies import write_out_copies
from tests.graphs import Dynamic, R, check_step, evaluate, graph, linearized, node, run, written

aten = torch.ops.aten
SHAPE = (2, 3, 5, 8)
HEADS = {name: R(*SHAPE) for name in ("q", "k", "v", "q_dot", "k_dot", "v_dot")}


# ---------------------------------------------------------------------------------------- drop_dead_tangents


def test_tangents_without_readers_go():
    gm = linearized(
        """
        sin = aten.sin(x)
        cos_dot_ = aten.cos(x)
        sin_dot = aten.mul.Tensor(x_dot, cos_dot_)
        exp = aten.exp(sin)
        exp_dot = aten.mul.Tensor(exp, sin_dot)
        neg = aten.neg(x)
        neg_dot = aten.neg(x_dot)
        unread = aten.cos(neg)
        return exp, neg_dot
        """,
        x=R(3),
        x_dot=R(3),
    )
    check_step(
        drop_dead_tangents,
        gm,
        """
        sin = aten.sin(x)
        exp = aten.exp(sin)
        neg = aten.neg(x)
        neg_dot = aten.neg(x_dot)
        unread = aten.cos(neg)
        return exp, neg_dot
        """,
    )


# -------------------------------------------------------------------------------------------- round_products

H = torch.bfloat16
OPERANDS = {"a_dot": R(6, 4, dtype=H), "w": R(4, 8, dtype=H), "x": R(6, 8, dtype=H), "other_dot": R(6, 8, dtype=H)}


def test_a_product_that_is_rounded_soon_rounds():
    """Here a view of it, and what is made of it alone by some op; a cast of another kind is such an op."""
    gm = linearized(
        """
        a = aten.neg(x)
        y = aten.exp(x)
        y_dot = jvpgraph.mm_float32(a_dot, w)
        left_dot = aten.slice.Tensor(y_dot, 1, 0, 4)
        half_dot = aten._to_copy(left_dot, dtype=torch.bfloat16)
        right_dot = aten.slice.Tensor(y_dot, 1, 4, 8)
        sin_dot = aten.sin(right_dot)
        narrow_dot = aten._to_copy(sin_dot, dtype=torch.bfloat16)
        return half_dot, narrow_dot
        """,
        **OPERANDS,
    )
    check_step(
        round_products,
        gm,
        """
        a = aten.neg(x)
        y = aten.exp(x)
        y_dot = aten.mm(a_dot, w)
        left_dot = aten.slice.Tensor(y_dot, 1, 0, 4)
        right_dot = aten.slice.Tensor(y_dot, 1, 4, 8)
        _to_copy_default = aten._to_copy(right_dot, dtype=torch.float32)
        sin_dot = aten.sin(_to_copy_default)
        narrow_dot = aten._to_copy(sin_dot, dtype=torch.bfloat16)
        return left_dot, narrow_dot
        """,
    )


@pytest.mark.parametrize(
    "rest",
    [
        "return y_dot",
        "out_dot = aten._to_copy(y_dot, dtype=torch.bfloat16); return out_dot, y_dot",
        "z_dot = aten.add.Tensor(y_dot, u_dot); out_dot = aten._to_copy(z_dot, dtype=torch.bfloat16); return out_dot",
        "z_dot = aten.sin(y_dot); out_dot = aten._to_copy(y_dot, dtype=torch.bfloat16); return out_dot, z_dot",
        "out_dot = aten._to_copy(y_dot, dtype=torch.float64); return out_dot",
        "out_dot = aten._to_copy(y_dot, dtype=torch.float16); return out_dot",
        "z_dot = aten.sin(y_dot); out_dot = aten._to_copy(z_dot, dtype=torch.float16); return out_dot",
    ],
    ids=["leaves", "leaves, too", "is added to", "is computed with", "is widened", "of another kind", "of it later"],
)
def test_products_that_are_kept_keep_float32(rest):
    text = "y = aten.exp(x); u = aten.neg(x); u_dot = aten.neg(other_dot); y_dot = jvpgraph.mm_float32(a_dot, w)"
    whole = f"{text}; {rest}".replace("; ", "\n")
    check_step(round_products, linearized(whole, **OPERANDS), whole)


def test_products_that_are_joined_round():
    """As queries of text and pictures are; each of its own."""
    text = "y = aten.exp(x); z = aten.neg(x); {} y_dot = {}(a_dot, w); z_dot = {}(a_dot, w)"
    gm = linearized(
        text.format("", "jvpgraph.mm_float32", "jvpgraph.mm_float32")
        + "; both = aten.cat([y, z]); both_dot = aten.cat([y_dot, z_dot])"
        "; out = aten._to_copy(both_dot, dtype=torch.bfloat16); return out",
        **OPERANDS,
    )
    run(round_products, gm)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.jvpgraph.mm_float32.default)
    assert [node(gm, name).meta["val"].dtype for name in ("y_dot", "z_dot", "both_dot")] == [H, H, torch.float32]


# ------------------------------------------------------------------------------------- keep_attention_values


def test_values_of_attention_come_from_a_kernel_for_half_precision():
    text = """
    both = jvpgraph.attention(q, k, v)
    o = both[0]
    q_wide = aten._to_copy(q, dtype=torch.float32)
    k_wide = aten._to_copy(k, dtype=torch.float32)
    v_wide = aten._to_copy(v, dtype=torch.float32)
    q_dot_wide = aten._to_copy(q_dot, dtype=torch.float32)
    both_dot = jvpgraph.attention_jvp(q_wide, k_wide, v_wide, q_dot_wide, None, None)
    o_dot = both_dot[2]
    return o, o_dot
    """
    gm = linearized(text, **{name: x.to(H) for name, x in HEADS.items()})
    for name in ("q_wide", "k_wide", "v_wide"):
        node(gm, name).meta[INSERTED_META] = True
    run(keep_attention_values, gm)
    run(fuse_attention, gm)
    o, o_dot = gm.graph.output_node().args[0]
    kernels = gm.graph.find_nodes(op="call_function", target=torch.ops.jvpgraph.attention_jvp.default)
    assert [n.args[0].name for n in kernels] == ["q_wide", "q"]
    assert o.args[0] is kernels[1]
    assert o_dot.args[0] is kernels[0]
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.jvpgraph.attention.default)


def test_attention_that_a_model_computes_in_float32_is_computed_once():
    text = """
    q_wide = aten._to_copy(q, dtype=torch.float32)
    k_wide = aten._to_copy(k, dtype=torch.float32)
    v_wide = aten._to_copy(v, dtype=torch.float32)
    both = jvpgraph.attention(q_wide, k_wide, v_wide)
    o = both[0]
    both_dot = jvpgraph.attention_jvp(q_wide, k_wide, v_wide, q_dot, None, None)
    o_dot = both_dot[2]
    return o, o_dot
    """
    half = {name: HEADS[name].to(H) for name in ("q", "k", "v")}
    gm = linearized(text, **half, q_dot=HEADS["q_dot"].float())
    check_step(keep_attention_values, gm, textwrap.dedent(text))


# -------------------------------------------------------------------------------------------- fuse_attention

FUSE = """
both = jvpgraph.attention(q, k, v)
o = both[0]
lse = both[1]
both_dot = jvpgraph.attention_jvp(q, k, v, q_dot, None, v_dot)
o_dot = both_dot[2]
grads = jvpgraph.attention_backward(o, None, q, k, v, None, o, lse)
dq = grads[0]
return o, o_dot, dq
"""


def test_the_kernel_of_the_tangent_gives_the_primal_too():
    gm = linearized(FUSE, **HEADS)
    for name in ("o", "lse"):
        node(gm, name).meta["recompute"] = 1
    report = check_step(
        fuse_attention,
        gm,
        """
        both_dot = jvpgraph.attention_jvp(q, k, v, q_dot, None, v_dot)
        lse = both_dot[1]
        o = both_dot[0]
        o_dot = both_dot[2]
        grads = jvpgraph.attention_backward(o, None, q, k, v, None, o, lse)
        dq = grads[0]
        return o, o_dot, dq
        """,
    )
    assert report.fused == 1
    assert not any("recompute" in n.meta for n in gm.graph.nodes)


OTHERS = ["q, k, v, None, True", "q, k, v, None, False, 0.5", "q, v, k", "q, k, v, v"]


@pytest.mark.parametrize("call", OTHERS)
def test_attention_that_differs_stays(call: str):
    inputs = {**HEADS, "q": R(2, 3, 5, 5), "k": R(2, 3, 5, 5), "v": R(2, 3, 5, 5), "q_dot": R(2, 3, 5, 5)}
    inputs["v_dot"] = inputs["v"]
    gm = linearized(FUSE.replace("attention(q, k, v)", f"attention({call})"), **inputs)
    before = written(gm)
    assert run(fuse_attention, gm).fused == 0
    assert written(gm) == before


def test_the_same_attention_behind_others_is_found():
    """Among several readers of q, the one with the same arguments, written otherwise."""
    text = "other = jvpgraph.attention(q, v, k)\nneg = aten.neg(q)\n" + FUSE.replace(
        "attention(q, k, v)", "attention(q, k, v, None, is_causal=False)"
    )
    gm = linearized(text, **HEADS)
    assert run(fuse_attention, gm).fused == 1
    assert written(gm)[:2] == ["other = jvpgraph.attention(q, v, k)", "neg = aten.neg(q)"]


def test_attention_keeps_what_gradients_of_tangents_need():
    gm = linearized(FUSE, **HEADS)
    after = FUSE.replace(
        "q_dot, None, v_dot)", "q_dot, None, v_dot, None, None, False, None, None, None, None, None, None, True)"
    )
    check_step(differentiate_attention, gm, after)


# --------------------------------------------------------------------------------------- fuse_aten_attention

FLASH = """
both = aten._scaled_dot_product_flash_attention(q, k, v)
o = both[0]
lse = both[1]
seed = both[6]
offset = both[7]
both_dot = jvpgraph.attention_jvp(q, k, v, q_dot, None, None)
o_dot = both_dot[2]
out = aten.mul.Tensor(o, 2)
grads = aten._scaled_dot_product_flash_attention_backward(
    out, q, k, v, o, lse, none, none, 5, 5, 0.0, False, seed, offset)
dq = grads[0]
dv = grads[2]
return o, o_dot, dq, dv
"""
FOR_CPU = """
both = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
o = both[0]
lse = both[1]
both_dot = jvpgraph.attention_jvp(q, k, v, q_dot, None, None)
o_dot = both_dot[2]
grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(o, q, k, v, o, lse, 0.0, False)
dq = grads[0]
return o, o_dot, dq
"""


def half(*shape: int) -> Tensor:
    return torch.randn(shape, device="meta", dtype=torch.float16)


def flash(text: str = FLASH, **more: Tensor) -> fx.GraphModule:
    inputs: dict[str, Any] = {name: half(*SHAPE) for name in ("q", "k", "v", "q_dot")} | more
    return linearized(text, **inputs, none=torch.empty(0, device="meta"))


def test_a_forward_and_its_backward_by_our_kernels():
    gm = flash()
    report = run(fuse_aten_attention, gm)
    assert report.fused == 1
    forward, backward = [n for n in gm.graph.nodes if "attention" in str(n.target)]
    assert forward is node(gm, "both_dot")
    assert backward.target is OPS.attention_backward.default
    assert backward.args[:6] == (node(gm, "out"), None, *(node(gm, name) for name in "qkv"), None)
    assert backward.args[6].users.keys() >= {node(gm, "out")}, "o"
    assert [n.meta["val"].shape for n in gm.graph.output_node().all_input_nodes] == [SHAPE] * 4
    before = written(gm)
    assert run(fuse_aten_attention, gm).fused == 0
    assert written(gm) == before


def test_values_keep_their_strides_and_dtypes():
    gm = linearized(FOR_CPU, **{name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in HEADS.items()})
    promised = [(n.meta["val"].shape, n.meta["val"].stride(), n.meta["val"].dtype) for n in outputs(gm)]
    for name in ("o", "lse"):
        node(gm, name).meta["recompute"] = 1
    assert run(fuse_aten_attention, gm).fused == 1
    assert [(n.meta["val"].shape, n.meta["val"].stride(), n.meta["val"].dtype) for n in outputs(gm)] == promised
    assert not any("recompute" in n.meta for n in gm.graph.nodes)
    inputs = list(HEADS.values())
    wanted = evaluate(linearized(FOR_CPU, **HEADS), *inputs)
    torch.testing.assert_close(evaluate(gm, *inputs), wanted, rtol=1e-10, atol=1e-10)


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.output_node().all_input_nodes


@pytest.mark.parametrize(
    "change",
    [
        ("(q, k, v)\no =", "(q, k, v, 0.5)\no ="),  # dropout in the forward
        ("5, 0.0, False", "5, 0.5, False"),  # and in the backward alone
        ("(q, k, v)\no =", "(q, v, k)\no ="),
        ("(q, k, v)\no =", "(q, k, v, 0.0, True)\no ="),
        ("(q, k, v)\no =", "(q, k, v, scale=0.5)\no ="),
        ("return o,", "sum = aten.add.Tensor(seed, 1)\nreturn sum,"),  # somebody else reads the seed
    ],
)
def test_other_flash_attention_stays(change: tuple[str, str]):
    assert change[0] in FLASH
    gm = flash(FLASH.replace(*change))
    before = written(gm)
    assert run(fuse_aten_attention, gm).fused == 0
    assert written(gm) == before


@pytest.mark.parametrize("is_same", [True, False])
def test_a_mask_is_a_bias(is_same: bool):
    text = FOR_CPU.replace("cpu(q, k, v)", "cpu(q, k, v, attn_mask=mask)").replace(
        "0.0, False", "0.0, False, attn_mask=mask"
    )
    text = text.replace("q_dot, None, None)", f"q_dot, None, None, {'mask' if is_same else 'None'})")
    gm = linearized(text, **HEADS, mask=R(2, 3, 5, 5))
    before = written(gm)
    assert run(fuse_aten_attention, gm).fused == is_same
    assert (written(gm) == before) != is_same


CUDNN = """
both = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, True, scale=0.5)
o = both[0]
lse = both[1]
seed = both[6]
offset = both[7]
both_dot = jvpgraph.attention_jvp(q, k, v, q_dot, None, None, bias, None, True, 0.5)
lse_dot = both_dot[3]
grads = aten._scaled_dot_product_cudnn_attention_backward(
    o, q, k, v, o, lse, seed, offset, bias, none, none, 5, 5, 0.0, True, scale=0.5)
dk = grads[1]
return lse, lse_dot, dk
"""


def test_the_bias_of_cudnn_and_its_logsumexp():
    gm = flash(CUDNN, bias=half(2, 3, 5, 5))
    promised = [n.meta["val"].shape for n in outputs(gm)]
    assert run(fuse_aten_attention, gm).fused == 1
    assert not [n for n in gm.graph.nodes if "cudnn" in str(n.target)]
    (backward,) = gm.graph.find_nodes(op="call_function", target=OPS.attention_backward.default)
    assert backward.args[5] is node(gm, "bias")
    assert backward.args[8:10] == (True, 0.5)
    assert backward.args[7].meta["val"].shape == (2, 3, 5)
    assert [n.meta["val"].shape for n in outputs(gm)] == promised


# ------------------------------------------------------------------------------------------ pair_collectives


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[None]:
    """Two ranks, of which one is here and the other is not."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


X = {"x": R(4, 4), "x_dot": R(4, 4)}
HALVES = """
        {0} = aten.unbind.int({1}, {2})
        getitem = {0}[0]
        getitem_1 = {0}[1]
        clone_default = aten.clone(getitem, memory_format=torch.contiguous_format)
        clone_default_1 = aten.clone(getitem_1, memory_format=torch.contiguous_format)
"""
PAIRS = {
    "coalesced": (
        """
        y = _c10d_functional.all_reduce(x, "sum", "0")
        w = _c10d_functional.wait_tensor(y)
        sin_dot_ = aten.sin(x_dot)
        y_dot = _c10d_functional.all_reduce(sin_dot_, "sum", "0")
        w_dot = _c10d_functional.wait_tensor(y_dot)
        return w, w_dot
        """,
        """
        sin_dot_ = aten.sin(x_dot)
        all_reduce_coalesced_default = _c10d_functional.all_reduce_coalesced([x, sin_dot_], 'sum', '0')
        getitem = all_reduce_coalesced_default[0]
        getitem_1 = all_reduce_coalesced_default[1]
        w = _c10d_functional.wait_tensor(getitem)
        w_dot = _c10d_functional.wait_tensor(getitem_1)
        return w, w_dot
        """,
    ),
    "coalesced already": (
        """
        y = _c10d_functional.all_gather_into_tensor_coalesced([x, z], 2, "0")
        y0 = y[0]
        y1 = y[1]
        y_dot = _c10d_functional.all_gather_into_tensor_coalesced([x_dot, z], 2, "0")
        y0_dot = y_dot[0]
        w = _c10d_functional.wait_tensor(y0)
        w_dot = _c10d_functional.wait_tensor(y0_dot)
        return w, w_dot, y1
        """,
        """
        all_gather_into_tensor_coalesced_default = """
        """_c10d_functional.all_gather_into_tensor_coalesced([x, z, x_dot, z], 2, '0')
        getitem = all_gather_into_tensor_coalesced_default[0]
        getitem_1 = all_gather_into_tensor_coalesced_default[1]
        getitem_2 = all_gather_into_tensor_coalesced_default[2]
        getitem_3 = all_gather_into_tensor_coalesced_default[3]
        w = _c10d_functional.wait_tensor(getitem)
        w_dot = _c10d_functional.wait_tensor(getitem_2)
        return w, w_dot, getitem_1
        """,
    ),
    "stacked": (
        """
        y = _c10d_functional.reduce_scatter_tensor(x, "sum", 2, "0")
        w = _c10d_functional.wait_tensor(y)
        y_dot = _c10d_functional.reduce_scatter_tensor(x_dot, "sum", 2, "0")
        w_dot = _c10d_functional.wait_tensor(y_dot)
        return w, w_dot
        """,
        """
        stack_default = aten.stack([x, x_dot], 1)
        reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(stack_default, 'sum', 2, '0')
        wait_tensor_default = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)"""
        + HALVES.format("unbind_int", "wait_tensor_default", 1)
        + "        return clone_default, clone_default_1",
    ),
    "stacked, and waited for later": (
        """
        y = _c10d_functional.broadcast(x, 0, "0")
        y_dot = _c10d_functional.broadcast(x_dot, 0, "0")
        other = aten.neg(x)
        w_dot = _c10d_functional.wait_tensor(y_dot)
        w = _c10d_functional.wait_tensor(y)
        return w, w_dot, other
        """,
        """
        stack_default = aten.stack([x, x_dot])
        broadcast_default = _c10d_functional.broadcast(stack_default, 0, '0')
        other = aten.neg(x)
        wait_tensor_default = _c10d_functional.wait_tensor(broadcast_default)"""
        + HALVES.format("unbind_int", "wait_tensor_default", 0).replace(", 0)\n", ")\n", 1)
        + "        return clone_default, clone_default_1, other",
    ),
    "stacked, without waiting": (
        """
        y = _dtensor.shard_dim_alltoall(x, 0, 1, "0")
        n = aten.neg(y)
        y_dot = _dtensor.shard_dim_alltoall(x_dot, 0, 1, "0")
        return n, y_dot
        """,
        """
        stack_default = aten.stack([x, x_dot], -1)
        shard_dim_alltoall_default = _dtensor.shard_dim_alltoall(stack_default, 0, 1, '0')"""
        + HALVES.format("unbind_int", "shard_dim_alltoall_default", -1)
        + "        n = aten.neg(clone_default)\n        return n, clone_default_1",
    ),
    "a backward that repeats it": (
        """
        y = _c10d_functional.all_gather_into_tensor(x, 2, "0")
        w = _c10d_functional.wait_tensor(y)
        y_dot = _c10d_functional.all_gather_into_tensor(x_dot, 2, "0")
        w_dot = _c10d_functional.wait_tensor(y_dot)
        again = _c10d_functional.all_gather_into_tensor(x, 2, "0")
        w2 = _c10d_functional.wait_tensor(again)
        other = _c10d_functional.all_gather_into_tensor(z, 2, "0")
        return w, w_dot, w2, other
        """,
        """
        all_gather_into_tensor_coalesced_default = """
        """_c10d_functional.all_gather_into_tensor_coalesced([x, x_dot], 2, '0')
        getitem = all_gather_into_tensor_coalesced_default[0]
        getitem_1 = all_gather_into_tensor_coalesced_default[1]
        w = _c10d_functional.wait_tensor(getitem)
        w_dot = _c10d_functional.wait_tensor(getitem_1)
        w2 = _c10d_functional.wait_tensor(getitem)
        other = _c10d_functional.all_gather_into_tensor(z, 2, '0')
        return w, w_dot, w2, other
        """,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_collective_carries_both(name: str, two_ranks: None):
    before, after = PAIRS[name]
    gm = linearized(before, **X, z=R(4, 4))
    for n in gm.graph.nodes:
        n.meta["recompute"] = 1
    report = check_step(pair_collectives, gm, after)
    assert report.paired == 1
    tangents = [n for n in gm.graph.nodes if TANGENT_META in n.meta]
    assert {n.meta[TANGENT_META] for n in tangents} <= {n.name for n in gm.graph.nodes}
    assert all(INSERTED_META in n.meta for n in tangents)
    kept = [n for n in gm.graph.nodes if "wait" in str(n.target) and n.name not in ("w2", "other")]
    assert not any("recompute" in n.meta for n in kept), "communicated once"


ALONE = {
    "the tangent needs the primal": (
        """
        y = _c10d_functional.all_reduce(x, "sum", "0")
        w = _c10d_functional.wait_tensor(y)
        sin_dot_ = aten.mul.Tensor(w, x_dot)
        y_dot = _c10d_functional.all_reduce(sin_dot_, "sum", "0")
        return w, y_dot
        """
    ),
    "another group": (
        """
        y = _c10d_functional.all_reduce(x, "sum", "0")
        y_dot = _c10d_functional.all_reduce(x_dot, "sum", "1")
        return y, y_dot
        """
    ),
    "another op": (
        """
        y = _c10d_functional.all_reduce(x, "sum", "0")
        y_dot = _c10d_functional.broadcast(x_dot, 0, "0")
        return y, y_dot
        """
    ),
    "not a collective": (
        """
        y = aten.neg(x)
        y_dot = aten.neg(x_dot)
        again = aten.neg(x)
        return y, y_dot, again
        """
    ),
    "a result that is not waited for": (
        """
        y = _c10d_functional.broadcast(x, 0, "0")
        z = aten.neg(y)
        y_dot = _c10d_functional.broadcast(x_dot, 0, "0")
        w_dot = _c10d_functional.wait_tensor(y_dot)
        return z, w_dot
        """
    ),
    "dims counted from the end": (
        """
        y = _dtensor.shard_dim_alltoall(x, 0, -1, "0")
        y_dot = _dtensor.shard_dim_alltoall(x_dot, 0, -1, "0")
        return y, y_dot
        """
    ),
    "nobody's tangent": (
        """
        y = _c10d_functional.all_reduce(x, "sum", "0")
        z_dot = _c10d_functional.all_reduce(x_dot, "sum", "0")
        again = _c10d_functional.all_reduce(x, "sum", "0")
        return y, z_dot, again
        """
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_collectives_that_stay_apart(name: str, two_ranks: None):
    gm = linearized(ALONE[name], **X)
    before = written(gm)
    assert run(pair_collectives, gm).paired == 0
    assert written(gm) == before


def test_a_result_that_is_not_contiguous_is_not_stacked(two_ranks: None):
    gm = linearized(PAIRS["stacked"][0], **X)
    node(gm, "y").meta["val"] = node(gm, "y").meta["val"].t()
    assert run(pair_collectives, gm).paired == 0


def test_what_a_backward_computes_anew_and_sends_again_is_sent_once(two_ranks: None):
    gm = linearized(
        """
        sent = aten.neg(x)
        y = _c10d_functional.all_reduce(sent, "sum", "0")
        y_dot = _c10d_functional.all_reduce(x_dot, "sum", "0")
        anew = aten.neg(x)
        again = _c10d_functional.all_reduce(anew, "sum", "0")
        return y, y_dot, again
        """,
        **X,
    )
    run(pair_collectives, gm)
    assert written(gm)[-1] == "return getitem, getitem_1, getitem"


def test_random_numbers_are_not_one(two_ranks: None):
    gm = linearized(
        """
        noise = aten.rand_like(x)
        more = aten.rand_like(x)
        y = _c10d_functional.all_reduce(noise, "sum", "0")
        y_dot = _c10d_functional.all_reduce(x_dot, "sum", "0")
        again = _c10d_functional.all_reduce(more, "sum", "0")
        return y, y_dot, again
        """,
        **X,
    )
    run(pair_collectives, gm)
    assert written(gm)[-2:] == [
        "again = _c10d_functional.all_reduce(more, 'sum', '0')",
        "return getitem, getitem_1, again",
    ]


# ----------------------------------------------------------------------------------------------------- count


def test_what_products_cost():
    gm = linearized(
        """
        y = aten.mm(x, w)
        y_dot = aten.mm(x_dot, w)
        z = aten.bmm(b, b)
        c = aten.convolution(image, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        p = aten.sin(y)
        return y, y_dot, z, c, p
        """,
        x=R(3, 4),
        x_dot=R(3, 4),
        w=R(4, 5),
        b=R(2, 3, 3),
        image=R(1, 2, 5, 5),
        kernel=R(3, 2, 3, 3),
    )
    before = written(gm)
    report = run(count, gm)
    assert written(gm) == before
    assert report.primal_flops == 2 * 3 * 4 * 5 + 2 * 2 * 3 * 3 * 3 + 2 * (3 * 3 * 3) * (2 * 3 * 3)
    assert report.tangent_flops == 2 * 3 * 4 * 5
    assert (report.sizes, report.collectives, report.kernels) == ({}, Counter(), Counter())


def test_polynomials_in_the_sizes_that_change():
    gm = linearized("y = aten.mm(x, w)\nreturn y", x=Dynamic(R(3, 4), (0, 1)), w=Dynamic(R(4, 5), (0,)), n=7)
    report = run(count, gm)
    symbols = report.primal_flops.free_symbols
    assert len(symbols) in (2, 3)
    assert report.primal_flops.subs({s: report.sizes[s][1] for s in symbols}) == 2 * 3 * 4 * 5
    assert {value for _, value in report.sizes.values()} == {3, 4}
    assert set(report.sizes) == symbols


QK = 2 * 2 * 3 * 5 * 6 * 8  # q k' of 2 x 3 heads, 5 queries, 6 keys, 8 columns
PV = 2 * 2 * 3 * 5 * 6 * 4  # p v of 4 columns
LONG = {
    **{name: R(2, 3, 5, 8) for name in ("q", "q_dot")},
    **{name: R(2, 3, 6, 8) for name in ("k", "k_dot")},
    **{name: R(2, 3, 6, 4) for name in ("v", "v_dot")},
}


@pytest.mark.parametrize(
    ("call", "primal", "tangent"),
    [
        ("y = jvpgraph.attention(q, k, v)", QK + PV, 0),
        ("y_dot = jvpgraph.attention(q, k, v)", 0, 0),  # part of a derived rule, and fused away
        ("y = jvpgraph.attention_jvp(q, k, v, q_dot, None, None)", QK + PV, QK + PV),
        ("y = jvpgraph.attention_jvp(q, k, v, None, k_dot, None)", QK + PV, QK + PV),
        ("y = jvpgraph.attention_jvp(q, k, v, None, None, v_dot)", QK + PV, PV),
        ("y = jvpgraph.attention_jvp(q, k, v, q_dot, k_dot, v_dot)", QK + PV, 2 * QK + 2 * PV),
        ("y = jvpgraph.attention_backward(go, None, q, k, v, None, go, lse)", 3 * QK + 2 * PV, 0),
    ],
)
def test_what_attention_costs(call: str, primal: int, tangent: int):
    text = f"{call}\nz = {call.split(' = ')[0]}[0]\nreturn z"
    gm = linearized(text, **LONG, go=R(2, 3, 5, 4), lse=R(2, 3, 5))
    report = run(count, gm)
    assert (report.primal_flops, report.tangent_flops) == (primal, tangent)
    assert sum(report.kernels.values()) == (0 if "backward" in call else 1)


SPLIT = "map = mask[0]\nbytes = mask[1]\n"
ENDS = f"""\
at = aten.arange(200, dtype=torch.int64)
early = aten.sub.Tensor(at, 50)
first = aten.clamp(early, 0)
mask = jvpgraph.interval_mask(first, at, 300)
{SPLIT}"""
GRID = f"mask = jvpgraph.grid_mask([10, 20], [3, 3], [1, 1], [1, 1], [False, False], 100, CPU)\n{SPLIT}"
NO_BYTES = "bytes = aten.full([0, 128, 128], False)\n"
OF_HEADS = "map = aten.full([1, 3, 2, 3], {}, dtype=torch.int32)\n" + NO_BYTES


@pytest.mark.parametrize(
    ("made", "pairs", "times"),
    [
        (ENDS, 128 * 128 + 72 * 256, 6),  # windows of 51 keys up to the query's own
        (GRID, 200 * 300, 6),  # all tiles: tokens of the first see those of the second, which have all the others
        (OF_HEADS.format(-1), 3 * 200 * 300, 2),
        (OF_HEADS.format(0), 0, 2),
        ("map = aten.neg(kinds)\n" + NO_BYTES, None, 6),
    ],
)
def test_what_attention_costs_with_a_block_mask(made: str, pairs: int | None, times: int):
    how = "block_map=map, partial_blocks=bytes"
    calls = (
        f"y = jvpgraph.attention_jvp(q, k, v, q_dot, None, None, {how})",
        f"dq = jvpgraph.attention_backward(go, None, q, k, v, None, go, lse, {how})",
        "o = y[0]",
        "g = dq[0]",
        "return o, g",
    )
    gm = linearized(
        made + "\n".join(calls),
        **{name: R(2, 3, 200, 8) for name in ("q", "q_dot")},
        k=R(2, 3, 300, 8),
        v=R(2, 3, 300, 4),
        go=R(2, 3, 200, 4),
        lse=R(2, 3, 200),
        kinds=torch.zeros(1, 1, 2, 3, dtype=torch.int32),
    )
    report = run(count, gm)
    scores = 2 * times * (200 * 300 if pairs is None else pairs)
    assert report.upper_bounds == (1 if pairs is None else 0)
    assert report.primal_flops + report.tangent_flops + report.backward_flops == scores * (5 * 8 + 4 * 4)


def test_the_kernel_at_the_sizes_of_this_call():
    inputs = {name: Dynamic(x, (2,)) for name, x in HEADS.items()}
    gm = linearized("y = jvpgraph.attention(q, q, q)\no = y[0]\nreturn o", **inputs)
    env = node(gm, "q").meta["val"].fake_mode.shape_env
    before = len(env.guards)
    report = run(count, gm)
    assert list(report.kernels.values()) == [1]
    assert len(env.guards) == before
    (symbol,) = report.sizes
    assert report.primal_flops == 2 * 2 * 3 * 2 * symbol**2 * 8
    assert isinstance(report.primal_flops, sympy.Expr)


def test_collectives_are_counted_and_waiting_is_not(two_ranks: None):
    gm = graph(PAIRS["coalesced"][0].replace("_dot", ""), x=R(4, 4))
    assert run(count, gm).collectives == Counter({"_c10d_functional.all_reduce.default": 2})


# ------------------------------------------------------------------------------------------------- decompose


def test_ops_that_the_compiler_would_expand_are():
    gm = linearized(
        """
        y = aten.silu(x)
        y_dot = aten.silu(x_dot)
        z = aten.neg(y)
        return z, y_dot
        """,
        **X,
    )
    node(gm, "y_dot").meta.update(stack_trace="here", seq_nr=1, mine=2, original_aten=3, from_node=4)
    check_step(
        decompose,
        gm,
        """
        sigmoid_default = aten.sigmoid(x)
        mul_tensor = aten.mul.Tensor(x, sigmoid_default)
        sigmoid_default_1 = aten.sigmoid(x_dot)
        mul_tensor_1 = aten.mul.Tensor(x_dot, sigmoid_default_1)
        z = aten.neg(mul_tensor)
        return z, mul_tensor_1
        """,
        decompositions={aten.silu.default: lambda x: x * torch.sigmoid(x)},
    )
    new = node(gm, "mul_tensor_1").meta
    assert (new["stack_trace"], new["seq_nr"], new["mine"], new[INSERTED_META]) == ("here", 1, 2, True)
    assert not {"original_aten", "from_node", TANGENT_META} & set(new)
    assert new["val"].shape == (4, 4)


def test_several_outputs_are_expanded():
    gm = graph(
        """
        both = aten.native_layer_norm(x, [4], None, None, 0.1)
        y = both[0]
        rstd = both[2]
        return y, rstd
        """,
        **X,
    )
    table = get_decompositions([aten.native_layer_norm])
    x, x_dot = X.values()
    wanted = evaluate(gm, x, x_dot)
    run(decompose, gm, decompositions=table)
    assert not [line for line in written(gm) if "native_layer_norm" in line]
    torch.testing.assert_close(evaluate(gm, x, x_dot), wanted)
    again = written(gm)
    run(decompose, gm, decompositions=table)
    assert written(gm) == again


@pytest.mark.parametrize("table", [None, {}])
def test_without_a_table_the_graph_stays_as_it_is(table: Any):
    gm = graph("y = aten.silu(x)\nv = aten.view(y, [16])\nreturn v", x=R(4, 4))
    value = node(gm, "v").meta["val"] = node(gm, "v").meta["val"].clone()
    check_step(decompose, gm, "y = aten.silu(x)\nv = aten.view(y, [16])\nreturn v", decompositions=table)
    assert node(gm, "v").meta["val"] is value


def test_sizes_and_checks_are_the_compilers():
    """There is nothing to expand in a number, nor in nothing."""
    text = "n = aten.sym_size.int(x, 0)\ny = aten.neg(x)\nreturn y, n"
    gm = graph(text, x=Dynamic(R(3), (0,)))

    def never(*_: Any) -> Any:
        raise AssertionError

    table = {aten.sym_size.int: never, aten._assert_async.default: never}
    with gm.graph.inserting_after(node(gm, "y")):
        check = gm.graph.call_function(aten._assert_async.default, (node(gm, "y"),))
    check.meta["val"] = None
    before = "\n".join(written(gm))
    check_step(decompose, gm, before, decompositions=table)


def test_views_have_values_in_the_memory_of_what_they_view():
    gm = graph(
        """
        y = aten.silu(x)
        v = aten.view(y, [16])
        parts = aten.split.Tensor(v, 8)
        left = parts[0]
        u = aten._unsafe_view(v, [4, 4])
        n = aten.neg(v)
        same = aten.t(x)
        return left, u, n, same
        """,
        x=R(4, 4),
    )
    same, shared = node(gm, "same").meta["val"], node(gm, "n").meta["val"]
    run(decompose, gm, decompositions={aten.silu.default: lambda x: x * torch.sigmoid(x)})
    memory = {n.name: _memory(n.meta["val"]) for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    assert memory["v"] == memory["mul_tensor"] == memory["left"] == memory["u"]
    assert {_memory(part) for part in node(gm, "parts").meta["val"]} == {memory["v"]}
    assert memory["n"] != memory["v"]
    assert node(gm, "same").meta["val"] is same, "it has been where it belongs"
    assert node(gm, "n").meta["val"] is shared


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def test_outputs_that_became_one_are_copied():
    gm = graph("y = aten.sin(x)\nz = aten.add.Tensor(y, 0)\nw = aten.add.Tensor(x, 0)\nreturn y, z, y, w, w", x=R(3))
    run(note_outputs, gm)
    run(keep_outputs_apart, gm)
    assert not gm.graph.find_nodes(op="call_function", target=aten.clone.default), "what was one stays one"
    for name, instead in (("z", "y"), ("w", "x")):  # as the compiler does
        node(gm, name).replace_all_uses_with(node(gm, instead))
    for _ in range(2):
        run(keep_outputs_apart, gm)
        outs = gm.graph.output_node().args[0]
        assert [x.name for x in outs] == ["y", "clone_default", "y", "clone_default_1", "clone_default_1"]
        assert len({_memory(x.meta["val"]) for x in outs}) == 3


def test_the_body_of_a_loop_has_one_output():
    gm = graph("y = aten.sin(x)\nreturn y", x=R(3))
    gm.graph.output_node().args = (node(gm, "y"),)
    for step in (note_outputs, keep_outputs_apart):
        run(step, gm)
    assert gm.graph.output_node().args == (node(gm, "y"),)


# ------------------------------------------------------------------------- what goes before autograd: see lower


def test_copies_and_zeros_are_written_out():
    gm = graph("z = aten.zero(w)\ny = aten.copy(z, x)\nn = aten.neg(y)\nreturn n", w=R(3, 4), x=R(4))
    node(gm, "y").meta["stack_trace"] = "here"
    run(write_out_copies, gm)
    assert not {"aten.copy.default", "aten.zero.default"} & {str(n.target) for n in gm.graph.nodes}
    clone = node(gm, "n").all_input_nodes[0]
    assert (clone.target, clone.meta["stack_trace"]) == (aten.clone.default, "here")
    x = R(4)
    torch.testing.assert_close(evaluate(gm, R(3, 4), x)[0], -x.expand(3, 4))
    before = written(gm)
    run(write_out_copies, gm)
    assert written(gm) == before


@pytest.mark.parametrize(("item", "is_refused"), [(0, False), (1, True)])
def test_a_tangent_that_needs_what_has_no_gradient_is_refused(item: int, is_refused: bool):
    text = f"""
    both = aten.native_layer_norm(x, [4], None, None, 0.1)
    o = both[{item}]
    y_dot = aten.mul.Tensor(o, x)
    return y_dot
    """
    gm = linearized(text, x=R(3, 4))
    before = written(gm)
    if is_refused:
        with pytest.raises(UnsupportedOp, match=r"native_layer_norm.* depends on its output 1"):
            run(check_gradients, gm)
    else:
        run(check_gradients, gm)
    assert written(gm) == before
