"""aten::_efficient_attention_forward with a stand-in for its kernels, which are for GPUs only."""

from __future__ import annotations

import math

import pytest
import torch

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from tests.foreign.plain import band, blocks, plain
from tests.foreign.test_swaps import C, D, H, Net, check, cu, lengths

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]
efficient = torch.ops.aten._efficient_attention_forward
BACKENDS = ("eager", "op_by_op")


def seen_by(q, k, cu_q, cu_k, kind, window):
    """[Lq, Lkv]"""
    left, right = -1 if window is None else window - 1, 0 if kind else -1

    def block(n, m):
        return band(n, m, left, right, from_the_end=kind == 2)

    if cu_q is None:
        return block(q.shape[1], k.shape[1])
    return blocks(cu_q.diff().tolist(), (cu_q if cu_k is None else cu_k).diff().tolist(), block)


def math_attention(q, k, v, bias, cu_q, cu_k, kind, scale, window):
    """o [B, L, H, D] and lse [B, H, L], of all rows one after the other."""
    seen, bias = seen_by(q, k, cu_q, cu_k, kind, window), 0 if bias is None else bias
    s = (scale or q.shape[-1] ** -0.5) * q.transpose(1, 2) @ k.transpose(1, 2).mT + bias
    return plain(q, k, v, seen, bias, scale), s.masked_fill(~seen, -math.inf).logsumexp(-1)


def forward(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, kind, with_lse=False, *, scale=None, seqlen_k=None,
            window_size=None):  # fmt: skip
    o, lse = math_attention(q, k, v, bias, cu_q, cu_k, kind, scale, window_size)
    if cu_q is not None:
        lse = torch.nn.utils.rnn.pad_sequence([x.mT for x in lse[0].split(cu_q.diff().tolist(), -1)], True, math.inf).mT
    most = max_q or q.shape[1]
    rows = -(-most // 32) * 32 if with_lse else 0
    padded = torch.full((*lse.shape[:2], rows), math.inf)
    if with_lse:
        padded[..., : lse.shape[-1]] = lse
    seed = torch.zeros((), dtype=torch.long)
    return o.contiguous(), padded, seed, seed.clone(), most, max_k or k.shape[1]


def backward(dout, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, p, seed, offset, kind, with_bias, *, scale=None,
             num_splits_key=None, window_size=None, shared_storage_dqdkdv=False):  # fmt: skip
    seen = seen_by(q, k, cu_q, cu_k, kind, window_size)
    scale = scale or q.shape[-1] ** -0.5
    dout, q, k, v = (x.transpose(1, 2) for x in (dout, q, k, v))
    s = scale * q @ k.mT + (0 if bias is None else bias)
    p = s.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dk, dv = scale * ds @ k, scale * ds.mT @ q, p.mT @ dout
    return *(x.transpose(1, 2) for x in (dq, dk, dv)), ds if with_bias else torch.empty(0)


@pytest.fixture(autouse=True)
def kernels():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_efficient_attention_forward", forward, "CPU")
    library.impl("_efficient_attention_backward", backward, "CPU")
    yield
    library._destroy()


def bias_of(q, n):
    bias = (q[..., :1] * 2).transpose(1, 2).expand(-1, -1, -1, n)
    return bias * torch.arange(n).cos().to(q)


CASES = {  # arguments from custom_mask_type on, and by keyword; how many queries; whether there is a bias
    "plain": ((0, True), {}, None, True),
    "no logsumexp, scale": ((0,), {"scale": 0.3}, 5, False),
    "causal": ((1, True), {}, 5, True),
    "causal from the end": ((2, True), {}, 5, True),
    "window": ((1, True), {"window_size": 3}, None, False),
    "window from the end": ((2, True), {"window_size": 3, "scale": 0.3}, 5, True),
}
WITH_RULES = [name for name in CASES if "window" not in name]
WAYS = [("eager", efficient, name) for name in CASES] + [("op_by_op", efficient, name) for name in WITH_RULES]
WAYS += [("eager", efficient.default, "window")]


@pytest.mark.long
@pytest.mark.parametrize(("backend", "op", "name"), WAYS, ids=str)
def test_batches(backend, op, name):
    (kind, *with_lse), named, last, with_bias = CASES[name]

    def call(q, k, v):
        bias = bias_of(q, k.shape[1]) if with_bias else None
        return op(q, k, v, bias, None, None, None, None, 0.0, kind, *with_lse, **named)[0]

    def reference(q, k, v):
        bias = bias_of(q, k.shape[1]) if with_bias else None
        return math_attention(q, k, v, bias, None, None, kind, named.get("scale"), named.get("window_size"))[0]

    check(call, reference, backend=backend, last=last)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "op", "name"), WAYS, ids=str)
def test_sequences(backend, op, name):
    """Of several lengths; all but the first have more keys than queries."""
    (kind, *with_lse), named, *_ = CASES[name]

    def call(q, k, v, cu_q, cu_k):
        return op(q, k, v, None, cu_q, cu_k, 9, 11, 0.0, kind, *with_lse, **named)[0]

    def reference(q, k, v, cu_q, cu_k):
        return math_attention(q, k, v, None, cu_q, cu_k, kind, named.get("scale"), named.get("window_size"))[0]

    check(
        call,
        reference,
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"cu_q": cu([2, 4, 1]), "cu_k": cu(lengths(n))},
        last=7,
        backend=backend,
    )


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16(backend):
    def call(q, k, v):
        return efficient(q, k, v, None, None, None, None, None, 0.0, 1, True)[0]

    def reference(q, k, v):
        return plain(q, k, v, band(q.shape[1], k.shape[1], right=0))

    check(call, reference, backend=backend, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_logsumexp(backend, packed):
    """In rows of 32, of each sequence."""
    q, k, v, *dots = (torch.randn(1, 12, H, D) for _ in range(6))
    of = [3, 5, 4]
    ends = (cu(of), cu(of), 5, 5) if packed else (None,) * 4

    def call(q, k, v):
        return efficient(q, k, v, None, *ends, 0.0, 2, True)[1]

    def exact(q, k, v):
        lse = math_attention(q, k, v, None, *ends[:2], 2, None, None)[1]
        parts = lse.split(of if packed else [12], -1)
        return torch.cat([torch.nn.functional.pad(x, (0, 32 - x.shape[-1])) for x in parts])

    double = [tuple(x.double() for x in xs) for xs in ((q, k, v), dots)]
    wanted, wanted_dot = torch.func.jvp(exact, *double)
    with torch.no_grad():
        lse, lse_dot = jvpgraph.jvp(call, (q, k, v), tuple(dots), backend=backend)
    assert torch.isposinf(lse[wanted == 0]).all()
    torch.testing.assert_close(lse.masked_fill(wanted == 0, 0).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_dot.double(), wanted_dot, rtol=1e-5, atol=1e-5)


def test_a_swapped_call_is_one_sweep():
    call = Net(lambda q, k, v: efficient(q, k, v, None, None, None, None, None, 0.0, 1, True)[0])
    dual, x = jvpgraph.transform(call, backend="eager"), torch.randn(1, 6, C)
    dual(x, torch.rand(1), tangents={"x": x})
    assert dual.reports[0].fused == 1
    assert len(dual.reports[0].swapped) == 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("backend", "op"), [("eager", efficient), ("eager", efficient.default), ("op_by_op", efficient)], ids=str
)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout is drawn"),
        ({"seqlen_k": cu([6])[1:]}, "keys end before the next sequence"),
        ({"window_size": 3}, "windows are of causal masks only"),
        ({"custom_mask_type": 3}, "does not know"),
        ({"cu_seqlens_q": cu([6]), "max_seqlen_q": 6}, "either both are packed"),
        ({"bias": torch.zeros(6, 6)}, "four dims"),
    ],
    ids=str,
)
def test_refusals(backend, op, changed, reason):
    given = dict.fromkeys(("bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    given |= {"dropout_p": 0.0, "custom_mask_type": 0} | changed

    def call(q, k, v):
        return op(q, k, v, **given)[0]

    dual, x = jvpgraph.transform(Net(call), backend=backend), torch.randn(1, 6, C)
    with torch.no_grad(), pytest.raises(UnsupportedOp, match=reason) as told:
        dual(x, torch.rand(1), tangents={"x": x})
    assert "test_efficient_op.py:" in str(told.value)


def test_windows_need_the_swap():
    """PyTorch's own gradient of the op does not know of them."""
    net = Net(lambda q, k, v: efficient(q, k, v, None, None, None, None, None, 0.0, 1, window_size=3)[0])
    dual, x = jvpgraph.transform(net, backend="op_by_op"), torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match=r"window_size: .*PyTorch's gradient"):
        dual(x, torch.rand(1), tangents={"x": x})
