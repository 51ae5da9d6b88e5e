"""Results lie in memory as those of the packages, however their operands do: models call view on them."""

from __future__ import annotations

import pytest

from tests.foreign.plain import plain
from tests.foreign.test_swaps import check, cu, importing

pytestmark = [pytest.mark.slow, pytest.mark.sampled(4)]
of_flash_attn, of_flash_attn_interface = importing("flash_attn"), importing("flash_attn_interface")
of_sage, of_natten, of_xformers = importing("sageattention"), importing("natten"), importing("xformers")


def by_heads(x):
    """[B, L, H, D] in the memory of [B, H, L, D], as after a rotary embedding of heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def in_order(result):
    """Views of the result, as models write them."""
    return result.view(*result.shape[:-2], -1).view(result.shape)


def of_varlen(function, q, k, v, **options):
    b, n = q.shape[:2]
    ends = cu([n] * b)
    o = function(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, n, n, **options)
    return in_order(o).view(q.shape)


MODULES = "flash_attn", "flash_attn_interface", "sageattention", "natten", "xformers.ops"
CALLS = {
    "flash_attn, sequences": lambda m, q, k, v: of_varlen(m["flash_attn"].flash_attn_varlen_func, q, k, v),
    "flash_attn 3": lambda m, q, k, v: in_order(m["flash_attn_interface"].flash_attn_func(q, k, v)),
    "flash_attn 3, sequences": lambda m, q, k, v: of_varlen(m["flash_attn_interface"].flash_attn_varlen_func, q, k, v),
    "xformers": lambda m, q, k, v: in_order(m["xformers.ops"].memory_efficient_attention(q, k, v)),
    "NHD": lambda m, q, k, v: in_order(m["sageattention"].sageattn(q, k, v, "NHD")),
    "HND": lambda m, q, k, v: in_order(m["sageattention"].sageattn(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(
        1, 2
    ),
    "na1d": lambda m, q, k, v: in_order(m["natten"].na1d(q, k, v, 12)),
    "natten.attention": lambda m, q, k, v: in_order(m["natten"].attention(q, k, v)),
}


@pytest.mark.parametrize("memory", ["by tokens", "by heads"])
@pytest.mark.parametrize("name", CALLS)
def test_results_can_be_viewed(of_flash_attn, of_flash_attn_interface, of_sage, of_natten, of_xformers, name, memory):
    """With tokens before heads in memory, and for SageAttention's layout HND with heads before tokens."""
    lay = by_heads if memory == "by heads" else lambda x: x
    modules, call = {module: of_sage(module) for module in MODULES}, CALLS[name]
    check(lambda q, k, v: call(modules, lay(q), lay(k), lay(v)), plain, sizes=((2, 12), (3, 12)))
