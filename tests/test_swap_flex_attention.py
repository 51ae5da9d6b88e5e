"""flex_attention as attention with a dense mask: against forward AD of attention written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.testing import assert_close

import jvpgraph

N = 300
DOCUMENTS = torch.tensor([0] * 150 + [1] * 150)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def causal_documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """With a captured tensor, and other for each head; the first query sees nothing."""
    return (q >= k) & (DOCUMENTS[q] == DOCUMENTS[k]) & (q + h != k) & (q > 0)


class Flex(nn.Module):
    def __init__(self, block_mask: BlockMask | None, **how):
        super().__init__()
        self.block_mask, self.how = block_mask, how

    def forward(self, x: Tensor) -> Tensor:
        k, v = x.sin()[:, : self.how.get("kv_heads", 2)], x.cos()[:, : self.how.get("kv_heads", 2)]
        how = {name: value for name, value in self.how.items() if name != "kv_heads"}
        return flex_attention(x, k, v, block_mask=self.block_mask, **how)


def by_hand(x: Tensor, mask: Tensor | None, scale: float, kv_heads: int = 2) -> Tensor:
    k, v = (y[:, :kv_heads].repeat_interleave(2 // kv_heads, 1) for y in (x.sin(), x.cos()))
    s = scale * x @ k.mT
    if mask is None:
        return s.softmax(-1) @ v
    p = torch.where(mask, s, -1e30).softmax(-1) * mask.any(-1, keepdim=True)
    return p @ v


def check(model: Flex, mask: Tensor | None, scale: float = 16**-0.5, kv_heads: int = 2, **settings) -> None:
    x, x_dot = torch.randn(2, 1, 2, N, 16, dtype=torch.float64)
    y, y_dot = jvpgraph.transform(model, **{"backend": "eager", **settings})(x, tangents={"x": x_dot})
    want = torch.func.jvp(lambda x: by_hand(x, mask, scale, kv_heads), (x,), (x_dot,))
    assert_close((y, y_dot), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"dynamic": True}, {"backend": "inductor"}], ids=str)
def test_a_mask_of_the_models_own(settings):
    block_mask = create_block_mask(causal_documents, None, 2, N, N, device="cpu")
    check(Flex(block_mask), create_mask(causal_documents, None, 2, N, N, device="cpu"), **settings)


@pytest.mark.slow
def test_without_a_mask():
    check(Flex(None), None)
    check(Flex(None, scale=0.3, kv_heads=1, enable_gqa=True), None, 0.3, 1)


def test_blocks_that_are_listed_rather_than_computed():
    """As a model that sorts blocks by their weight has them; in any order, with places that are not used."""
    count = torch.tensor([[[2, 1, 3]]], dtype=torch.int32)
    index = torch.tensor([[[[2, 0, 0], [1, 0, 2], [0, 2, 1]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=128, seq_lengths=(N, N))
    listed = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    dense = listed.repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :N]
    check(Flex(block_mask), dense)


@pytest.mark.slow
def test_it_is_told():
    x, x_dot = torch.randn(2, 1, 2, N, 16, dtype=torch.float64)
    found = jvpgraph.transform(Flex(None)).explain(x, tangents={"x": x_dot})
    assert [form for _, _, form in found.swapped] == ["flex_attention"]
    assert found.fused == 1


def test_a_score_mod_is_refused():
    """It may bend the scores in any way."""
    model = Flex(None, score_mod=lambda score, b, h, q, k: score * 2)
    x = torch.randn(1, 2, N, 16, dtype=torch.float64)
    with pytest.raises(jvpgraph.UnsupportedOp, match="flex_attention"):
        jvpgraph.transform(model, backend="eager")(x, tangents={"x": x})
